"""Weights that FSDP or DeepSpeed ZeRO-3 divide among the processes of a training.

The layers of a frozen base are divided by PyTorch's ``fully_shard`` in both cases: a layer is whole
only while it runs. Embeddings, last norm and output matrix, which losses read outside the base's
forward, stay whole in every process. ZeRO-3 divides the heads too; FSDP leaves them whole.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from typing import Any

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations import deepspeed as integration

from speclm.errors import OptionError, UnsupportedModelError
from speclm.target import TargetView
from speclm.target.features import decoder_layers

_log = logging.getLogger("speclm")
_FSDP, _OFFLOADS = "ACCELERATE_USE_FSDP", "FSDP_OFFLOAD_PARAMS"


def place_base(view: TargetView, args: TrainingArguments) -> None:
    """Move a base to the device of training, and divide its layers if FSDP or ZeRO-3 is on.

    A base that was loaded with a device map stays where it is. Dividing is for several processes,
    each of which must then run the base as often as the others.

    Args:
        view: The base, which each process has loaded as a whole.
        args: The arguments of training.

    Raises:
        OptionError: If FSDP is on for a base that is trained too, quantised or spread by a device
            map, which stays whole under ZeRO-3; or if it offloads weights.
        UnsupportedModelError: If the base is divided already by DeepSpeed, or has no layers.
    """
    base = view.model
    _require_whole(base)
    if args.n_gpu > 1:
        _log.warning("using one of %d devices; start with torchrun to use all", args.n_gpu)
        args._n_gpu = 1  # as Trainer does for a model spread over devices
    if divides_base(args):
        _divide_layers_(view, args)
    if getattr(base, "hf_device_map", None) is None and base.device != args.device:
        base.to(args.device)  # type: ignore[arg-type]  # Transformers' decorator


def divides_base(args: TrainingArguments) -> bool:
    """Return whether FSDP or ZeRO-3 is on and several processes train."""
    config: Any = getattr(args, "hf_deepspeed_config", None)
    has_zero3 = config is not None and config.is_zero3()
    return args.world_size > 1 and (_has_fsdp(args) or has_zero3)


def is_divided(base: PreTrainedModel) -> bool:
    """Return whether the layers of a base are divided, so that all processes run it together."""
    return any(isinstance(weight, DTensor) for weight in base.parameters())


@contextmanager
def heads_whole(args: TrainingArguments | None = None) -> Iterator[None]:
    """Inside the block, Accelerate and Transformers apply no FSDP of their own.

    Args:
        args: Training arguments that may switch it on too.
    """
    is_on, plugin = os.environ.pop(_FSDP, None), args and args.fsdp_plugin_args
    if args is not None:
        args.fsdp_plugin_args = None
    try:
        yield
    finally:
        if is_on is not None:
            os.environ[_FSDP] = is_on
        if args is not None:
            args.fsdp_plugin_args = plugin


def whole_parameters(module: nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which every process has all parameters; all processes must enter it."""
    divided = [parameter for parameter in module.parameters() if _is_partition(parameter)]
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
    if config is not None:
        found.unset_hf_deepspeed_config()
    try:
        with heads_whole():
            yield
    finally:
        if config is not None:
            found.set_hf_deepspeed_config(config)


def _require_whole(base: PreTrainedModel) -> None:
    name = next((name for name, weight in base.named_parameters() if _is_partition(weight)), None)
    if name is not None:
        raise UnsupportedModelError(
            f"{name} of {base.config.name_or_path} is divided among processes, expected a base "
            "that each process has as a whole; load it before the TrainingArguments are made"
        )


def _has_fsdp(args: TrainingArguments) -> bool:
    return args.fsdp_plugin_args is not None or _is_set(_FSDP)


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in {"true", "1"}


def _divide_layers_(view: TargetView, args: TrainingArguments) -> None:
    """Divide each layer of a base, on the devices of training."""
    base: Any = view.model
    name = base.config.name_or_path
    has_map = getattr(base, "hf_device_map", None) is not None
    if any(weight.requires_grad for weight in base.parameters()):
        obstacle = "is trained too"
    elif has_map or getattr(base, "hf_quantizer", None) is not None:
        obstacle = "is quantised or spread by a device map"
    else:
        obstacle = ""
    if obstacle and not _has_fsdp(args):
        _log.warning("%s %s: ZeRO-3 leaves it whole in each process", name, obstacle)
        return
    if obstacle:
        raise OptionError(
            f"FSDP is on and {name} {obstacle}, expected a frozen base with plain weights in one "
            "place, whose layers can be divided; load it so, or leave FSDP out"
        )
    if _is_set(_OFFLOADS) or (args.fsdp_plugin_args or {}).get("cpu_offload"):
        raise OptionError(
            "FSDP offloads weights to the CPU, expected layers that stay on the devices; set "
            "fsdp_offload_params to false"
        )
    mesh = init_device_mesh(args.device.type, (args.world_size,))
    for layer in decoder_layers(view.decoder, view.num_layers):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)


def _is_partition(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")
