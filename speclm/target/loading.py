"""Load causal language models, take them out of PEFT's wrappers, and read where they stop."""

import glob
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from speclm.errors import (
    CheckpointError,
    OptionError,
    SpeclmError,
    UnknownNameError,
    UnsupportedModelError,
    reason_of,
    shown,
    suggest,
)
from speclm.files.hub import HubOptions, cached_commit, download, is_hub_id, path_exists
from speclm.files.weights import read_json, weights_of

# Not signs of damage: paths and values that callers name, packages, and memory or devices.
_OTHER_REASONS = (
    *(SpeclmError, OSError, ValueError, ImportError),
    *(torch.OutOfMemoryError, torch.AcceleratorError),
)
_CONFIGS = ("config.json", "generation_config.json", "*.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_OF_OTHER_FILES = {"variant", "use_safetensors", "state_dict", "config"}
_WIDTHS = ("hidden_size", "n_embd", "d_model", "intermediate_size", "vocab_size")
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_MOST_PER_BYTE = 16
"""Maximum numbers per byte of a weight file; a quantised number takes at least a quarter."""

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
    if "gguf_file" not in options:
        is_here = path_exists(name)
        folder = Path(name, str(options.get("subfolder") or ""))
        fetched = folder if is_here else _fetched(str(name), options)
        if fetched is not None:
            require_sound(fetched)
            if not is_here:  # or else other files than the checked ones might be read
                options = {**options, "force_download": False}
    try:
        loader: Any = AutoModelForCausalLM
        model, report = loader.from_pretrained(name, **options, output_loading_info=True)
    except _OTHER_REASONS:
        raise
    except TypeError as error:
        unknown = [option for option in options if repr(option) in str(error)]
        if not unknown:
            raise _damaged(name, owner, error) from error
        known = sorted(known)
        listed = f", known options are {known!r}" if known else ""
        raise OptionError(
            f"{owner} {str(name)!r} does not take {unknown!r} ({error}){listed}; "
            f"{suggest(unknown[0], known)}"
        ) from error
    except Exception as error:  # damaged configs raise nearly everything
        raise _damaged(name, owner, error) from error
    if owner != "base" and (missing := sorted(report["missing_keys"])):
        raise CheckpointError(
            f"{owner} {str(name)!r} lacks {len(missing)} weights such as {missing[0]!r}, which "
            "would be random, expected those of a whole language model and not of heads; name "
            "another folder"
        )
    remember_commit(model, name, options)
    loaded: PreTrainedModel = model
    return loaded


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


def _damaged(name: str | Path, owner: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{owner} {str(name)!r} cannot be loaded ({reason_of(error)}), expected an undamaged "
        "config and weights; download or export them again"
    )


def _fetched(name: str, options: Mapping[str, Any]) -> Path | None:
    """Download the files of a model that Transformers would read; return their folder.

    None if the options name other files, or some are missing, which Transformers reports.
    """
    if options.keys() & _OF_OTHER_FILES or not is_hub_id(name):
        return None
    hub, _ = HubOptions.split(options)
    try:
        folder = download(name, hub, _CONFIGS)
        for single in _SINGLE:
            index = folder / f"{single}.index.json"
            if (download(name, hub, (single,)) / single).exists():
                return folder
            if index.exists():
                return download(name, hub, tuple(map(glob.escape, _shards(index))))
    except UnknownNameError:
        return None
    return folder


def _shards(index: Path) -> list[str]:
    """Return the files next to an index that it names, as far as it names any."""
    found = read_json(index).get("weight_map")
    names = {*map(str, found.values())} if isinstance(found, dict) else set()
    return sorted(name for name in names if Path(name).name == name)


def require_sound(folder: Path) -> None:
    """Check the files of a model before Transformers reads them and makes what its config names.

    Raises:
        CheckpointError: If one is damaged, or the config names more than the weights can hold.
    """
    for path in sorted(path for pattern in _CONFIGS for path in folder.glob(pattern)):
        read_json(path)
    path = folder / "config.json"
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not weights or not path.is_file() or (folder / "adapter_config.json").exists():
        return  # Transformers says what is missing; weights of an adapter are not the model's
    num_tensors = sum(len(weights_of(file).files) for file in weights)
    num_bytes = sum(file.stat().st_size for file in weights)
    config = read_json(path)
    nested = config.get("text_config")
    for part in (config, nested if isinstance(nested, dict) else {}):
        bounds = dict.fromkeys(_WIDTHS, _MOST_PER_BYTE * num_bytes)
        for field, most in {**bounds, **dict.fromkeys(_DEPTHS, num_tensors)}.items():
            size = part.get(field)
            if isinstance(size, int) and not isinstance(size, bool) and not 0 <= size <= most:
                raise CheckpointError(
                    f"{path}: {field} is {shown(size)}, expected at most {most} for weights of "
                    f"{num_bytes} bytes in {num_tensors} tensors; download them again"
                )


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
