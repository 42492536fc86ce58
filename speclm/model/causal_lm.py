"""Loads causal language models, and names the option or file that is wrong."""

import difflib
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from speclm.errors import CheckpointError, OptionError

OPTIONS_OF_LOADING = ("heads", "heads_kwargs", "num_draft_tokens", "adaptive", "tree")
"""What `SpecModel.from_pretrained` takes itself, and nothing else."""

_DAMAGE = (SafetensorError, StrictDataclassError, pickle.UnpicklingError, EOFError, KeyError)


def load_causal_lm(
    name: str | Path, options: Mapping[str, Any], *, owner: str, known: Iterable[str] = ()
) -> PreTrainedModel:
    """Return the model that `name` stands for.

    Args:
        name: Folder or hub id.
        options: Arguments of its ``from_pretrained``.
        owner: What it is to be, for messages.
        known: Names that one of the options may be a misspelling of.

    Raises:
        OptionError: If the model does not take one of the options.
        CheckpointError: If a file is damaged.
    """
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, **options)
    except TypeError as error:
        unknown = [option for option in options if repr(option) in str(error)]
        if not unknown:
            raise
        raise OptionError(
            f"{owner} {str(name)!r} does not take {unknown!r} ({error}); "
            f"{suggest(unknown[0], known)}"
        ) from error
    except _DAMAGE as error:
        raise CheckpointError(
            f"{owner} {str(name)!r} cannot be loaded ({type(error).__name__}: {error}), expected "
            "an undamaged config and weights; download or export them again"
        ) from error
    return model


def require_no_options(options: Mapping[str, Any]) -> None:
    """Check that nothing is to be loaded with where the base is a loaded model.

    Raises:
        OptionError: If there are options.
    """
    if options:
        raise OptionError(
            f"base is a loaded model and {sorted(options)!r} would have no effect; "
            f"{suggest(next(iter(options)), OPTIONS_OF_LOADING)}, or pass it where the model is "
            "loaded"
        )


def suggest(name: str, known: Iterable[str]) -> str:
    """Return what to do about an option that nothing takes: correct it to one like it, or drop it.

    Example:
        >>> suggest("num_draft_token", ["num_draft_tokens", "tree"])
        "did you mean 'num_draft_tokens'?"
    """
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else f"drop {name!r}"
