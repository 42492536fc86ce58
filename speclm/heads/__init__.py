"""Heads: draft networks that are trained on a target, built from plain numbers."""

from speclm.formats.eagle_config import EagleConfig
from speclm.heads._eagle_layer import KeyValueStore
from speclm.heads.eagle import EagleHeads, build_eagle, eagle_checkpoint
from speclm.heads.medusa import MedusaHeads, MedusaHeadsConfig

__all__ = [
    "EagleConfig",
    "EagleHeads",
    "KeyValueStore",
    "MedusaHeads",
    "MedusaHeadsConfig",
    "build_eagle",
    "eagle_checkpoint",
]
