"""Checkpoints of draft heads, in the layouts that others write and read."""

from speclm.formats.medusa import MedusaCheckpoint, find_medusa, read_medusa
from speclm.formats.medusa_writer import write_medusa

__all__ = ["MedusaCheckpoint", "find_medusa", "read_medusa", "write_medusa"]
