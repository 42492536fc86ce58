"""Builds the models of the table, and says which the installed Transformers has."""

import warnings
from collections.abc import Mapping
from functools import cache

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from tests.families.attention_rows import ATTENTION_ROWS
from tests.families.recurrent_rows import RECURRENT_ROWS
from tests.models import SHAPE, randomise

ROWS = (*ATTENTION_ROWS, *RECURRENT_ROWS)


def is_known(model_type: str) -> bool:
    """Return whether the installed Transformers has a model type."""
    return model_type in CONFIG_MAPPING_NAMES


FAMILIES = {row.name: row for row in ROWS if is_known(row.model_type)}
"""Rows whose models the installed Transformers can build."""
ONCE = "session"
"""Scope of a parameter that is a family: tests of one run in a row, and so in one process."""


def build_family(name: str) -> PreTrainedModel:
    """Return a new random model of a row."""
    row = FAMILIES[name]
    model = build_type(row.model_type, row.settings)
    return randomise(model, seed=row.seed, embedding_scale=row.embedding_scale)


def build_type(
    model_type: str,
    settings: Mapping[str, object],
    *,
    sizes: Mapping[str, object] = SHAPE,
) -> PreTrainedModel:
    """Return a model of a type; of the sizes, a config takes those that it knows."""
    default = AutoConfig.for_model(model_type)
    shape = {
        key: value
        for key, value in sizes.items()
        if hasattr(default, key) or key.endswith("_token_id")
    }
    config = AutoConfig.for_model(model_type, **{**shape, **settings})
    with warnings.catch_warnings():
        # gpt_bigcode of Transformers 5.17, where it is imported.
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
        return AutoModelForCausalLM.from_config(config)


@cache
def shared_family(name: str) -> PreTrainedModel:
    """Return the same model to every test, which must leave it as it is."""
    return build_family(name)
