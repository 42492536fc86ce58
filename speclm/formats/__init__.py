"""Checkpoints of draft heads, in the layouts that others write and read."""

from speclm.formats.medusa import MedusaCheckpoint, find_medusa, read_medusa
from speclm.formats.medusa_writer import require_place_for_heads, write_medusa

__all__ = [
    "MedusaCheckpoint",
    "find_medusa",
    "read_medusa",
    "require_place_for_heads",
    "write_medusa",
]
