"""One tiny random model for each family, and how it is expected to be verified.

A row names a model type of Transformers and the settings that could go wrong: windows shorter than
prompts, grouped heads, biases, odd widths of heads, scaled or capped logits, tied embeddings. Sizes
come from `tests.models.SHAPE`; what a config does not know is left out.
"""

from tests.families.building import (
    FAMILIES,
    ONCE,
    ROWS,
    build_family,
    build_type,
    is_known,
    shared_family,
)
from tests.families.family import Family

__all__ = [
    "FAMILIES",
    "ONCE",
    "ROWS",
    "Family",
    "build_family",
    "build_type",
    "is_known",
    "shared_family",
]
