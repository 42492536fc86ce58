"""Weights that DeepSpeed ZeRO-3 divides among the processes of a training."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import deepspeed as integration

from speclm.errors import OptionError, UnsupportedModelError


def require_whole(base: PreTrainedModel) -> None:
    """Check that every process has all weights of a base.

    Raises:
        UnsupportedModelError: If they are divided: the base is not part of the model that DeepSpeed
            runs, which therefore does not collect them.
    """
    name = next((name for name, weight in base.named_parameters() if _is_divided(weight)), None)
    if name is not None:
        raise UnsupportedModelError(
            f"{name} of {base.config.name_or_path} is divided among processes, expected a base "
            "that each process has as a whole; load it before the TrainingArguments are made"
        )


def require_no_fsdp(*, is_on: bool) -> None:
    """Check that heads are not divided by FSDP.

    Raises:
        OptionError: If they are.
    """
    if is_on:
        raise OptionError(
            "FSDP is on, expected distributed data parallel or DeepSpeed ZeRO: heads that FSDP "
            "divides cannot be written; start with torchrun, or configure accelerate without FSDP"
        )


def whole_parameters(module: nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which every process has all parameters; all processes must enter it."""
    divided = [parameter for parameter in module.parameters() if _is_divided(parameter)]
    if not divided:
        return nullcontext()
    deepspeed: Any = import_module("deepspeed")
    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(divided)
    return context


def num_elements(parameter: nn.Parameter) -> int:
    """Return the elements of a parameter, in all processes together."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


@contextmanager
def loading_whole() -> Iterator[None]:
    """Inside the block, models are loaded whole, whatever training arguments were made before."""
    found: Any = integration  # whose functions have no types
    config = found._hf_deepspeed_config_weak_ref and found._hf_deepspeed_config_weak_ref()
    if config is None:
        yield
        return
    found.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        found.set_hf_deepspeed_config(config)


def _is_divided(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")
