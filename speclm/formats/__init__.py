"""Checkpoints of draft heads, in the layouts that others write and read."""

from speclm.formats._heads_files import CARD_NAME, hub_id
from speclm.formats.eagle import EagleCheckpoint, find_eagle, read_eagle
from speclm.formats.eagle_config import EagleConfig
from speclm.formats.eagle_writer import require_place_for_eagle, write_eagle
from speclm.formats.medusa import MedusaCheckpoint, find_medusa, read_medusa
from speclm.formats.medusa_writer import require_place_for_heads, write_medusa

__all__ = [
    "CARD_NAME",
    "EagleCheckpoint",
    "EagleConfig",
    "MedusaCheckpoint",
    "find_eagle",
    "find_medusa",
    "hub_id",
    "read_eagle",
    "read_medusa",
    "require_place_for_eagle",
    "require_place_for_heads",
    "write_eagle",
    "write_medusa",
]
