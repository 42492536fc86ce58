"""Load causal language models, take them out of PEFT's wrappers, and read where they stop."""

import pickle
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from speclm.errors import CheckpointError, OptionError, UnsupportedModelError, suggest
from speclm.files.hub import cached_commit

_DAMAGE = (SafetensorError, StrictDataclassError, pickle.UnpicklingError, EOFError, KeyError)

# As earlier versions of Transformers name it; it is not saved with the config.
_COMMIT = "_commit_hash"


def load_causal_lm(
    name: str | Path, options: Mapping[str, Any], *, owner: str, known: Iterable[str] = ()
) -> PreTrainedModel:
    """Load a model with its ``from_pretrained``, and name the option or file that is wrong.

    Args:
        name: Folder or hub id.
        options: Arguments of its ``from_pretrained``.
        owner: Role of the model, for messages.
        known: Names that one of the options may be a misspelling of.

    Raises:
        OptionError: If the model does not take one of the options, or there is no such dtype.
        CheckpointError: If a file is damaged.
    """
    dtype = options.get("dtype")
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    is_floating = isinstance(found, torch.dtype) and found.is_floating_point
    if dtype not in (None, "auto") and not isinstance(dtype, dict) and not is_floating:
        raise OptionError(
            f"dtype of the {owner} is {dtype!r}, expected one such as 'bfloat16' or 'auto'; "
            "correct it"
        )
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, **options)
    except TypeError as error:
        unknown = [option for option in options if repr(option) in str(error)]
        if not unknown:
            raise
        known = sorted(known)
        listed = f", known options are {known!r}" if known else ""
        raise OptionError(
            f"{owner} {str(name)!r} does not take {unknown!r} ({error}){listed}; "
            f"{suggest(unknown[0], known)}"
        ) from error
    except _DAMAGE as error:
        raise CheckpointError(
            f"{owner} {str(name)!r} cannot be loaded ({type(error).__name__}: {error}), expected "
            "an undamaged config and weights; download or export them again"
        ) from error
    remember_commit(model, name, options)
    return model


def remember_commit(model: PreTrainedModel, name: object, options: Mapping[str, Any]) -> None:
    """Keep the commit on the hub that a model was just loaded from; see `hub_commit`.

    Args:
        model: The model.
        name: What it was loaded from.
        options: Arguments of its ``from_pretrained``.
    """
    commit = cached_commit(name, options)
    if commit is not None:
        setattr(model.config, _COMMIT, commit)


def hub_commit(model: PreTrainedModel) -> str | None:
    """Return the commit on the hub that a model was loaded from; None if it is not known."""
    found = getattr(model.config, _COMMIT, None)
    return found if isinstance(found, str) else None


def is_adapted(model: object) -> bool:
    """Return whether a model is one of PEFT's."""
    peft = sys.modules.get("peft")  # if it was never imported, nothing can be one of its models
    return peft is not None and isinstance(model, peft.PeftModel)


def without_adapter(model: Any) -> Any:
    """Return the Transformers model inside a PEFT model, and anything else as it is.

    Adapters that sit in the layers, such as LoRA, stay active in it.

    Raises:
        UnsupportedModelError: If the adapter is a learned prompt, which sits outside the model.
    """
    if not is_adapted(model):
        return model
    config = model.active_peft_config
    if config.is_prompt_learning:
        raise UnsupportedModelError(
            f"{type(model).__name__} has the learned prompt {type(config).__name__}, which its "
            "inner model does not see, expected adapters inside the layers, such as LoRA; call its "
            "own generate"
        )
    return model.get_base_model()


def eos_token_ids(model: PreTrainedModel) -> frozenset[int]:
    """Return the tokens at which the model's generation config ends a row."""
    found: int | list[int] | None = model.generation_config.eos_token_id
    if found is None:
        return frozenset()
    return frozenset([found] if isinstance(found, int) else found)
