"""Exact speculative decoding for Hugging Face models: the tokens of `generate`, faster."""

from speclm._version import __version__
from speclm.errors import SpeclmError
from speclm.model import SpecModel, SpeculativeOutput, patch
from speclm.stats import SpeculationStats

__all__ = [
    "SpecModel",
    "SpeclmError",
    "SpeculationStats",
    "SpeculativeOutput",
    "__version__",
    "patch",
]
