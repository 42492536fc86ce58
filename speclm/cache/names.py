"""The names under which models of Transformers take and return their cache."""

import inspect
from dataclasses import fields

from transformers import PreTrainedModel
from transformers.generation.utils import GenerateDecoderOnlyOutput

_OLD_NAMES = ("past_key_values", "cache_params")
_FIELDS = {field.name for field in fields(GenerateDecoderOnlyOutput)}

CACHE_NAME = "cache" if "cache" in _FIELDS else "past_key_values"
"""Input of models and field of outputs: ``cache``, before Transformers 5.24 ``past_key_values``."""

CACHE_NAMES = tuple(dict.fromkeys((CACHE_NAME, *_OLD_NAMES)))
"""All names that `generate` takes. Newer versions of Transformers translate the old ones."""


def cache_name(model: PreTrainedModel) -> str:
    """Return the name of a model's cache input, which older versions name by the kind of model."""
    accepted = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_NAMES if name in accepted), CACHE_NAME)
