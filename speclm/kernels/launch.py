"""How tree attention is launched on which GPU: sizes of tiles and programs, and splits of keys."""

import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from speclm.kernels.inputs import TreeAttentionInputs
from speclm.kernels.launch_files import VARIABLE, read_table_once
from speclm.kernels.launch_table import CallSize, LaunchConfig, built_in_config, find_config

__all__ = [
    "HEAD_DIMS",
    "Launch",
    "LaunchConfig",
    "LaunchPlan",
    "architecture",
    "call_size",
    "head_parts",
    "multiprocessors",
    "plan_launch",
    "plan_launch_on",
    "split_keys",
]

HEAD_DIMS = (16, 32, 64, 80, 96, 128, 160, 192, 256)
"""Widths of heads that the Triton kernel takes: one power of two, or the sum of two."""

_MAX_SPLITS = 64  # parts are read one after the other when they are joined
_DETERMINISTIC_ROWS = 64  # for which sizes are chosen in deterministic calls, whatever they have


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """How one call of tree attention is launched.

    Args:
        config: Sizes of tiles and programs.
        num_splits: Programs that share the keys of a row and head.
    """

    config: LaunchConfig
    num_splits: int


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of a Triton kernel, ready to be made or to be compiled only.

    Args:
        kernel: The jitted function.
        grid: Programs along each axis.
        arguments: Tensors and numbers, by position.
        options: Constants of the kernel and options of the compiler, by name.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Tensor | int | float, ...]
    options: dict[str, int]


def plan_launch(inputs: TreeAttentionInputs) -> LaunchPlan:
    """Return how a call is launched on its device; depends on shapes alone, not on lengths.

    Raises:
        KernelError: If ``SPECLM_KERNEL_CONFIGS`` names a file that holds something else than rows.
    """
    device = inputs.query.device
    return plan_launch_on(architecture(device), multiprocessors(device), inputs)


def plan_launch_on(
    architecture: str, multiprocessors: int, inputs: TreeAttentionInputs
) -> LaunchPlan:
    """Return how a call is launched on some GPU.

    Sizes of deterministic calls depend on the GPU, the type and the width of heads alone, and
    splits have a fixed length, so that a row is computed alike whatever is computed with it.

    Args:
        architecture: As `architecture` names it.
        multiprocessors: How many of them the GPU has.
        inputs: Checked by shape.
    """
    config = _find_config(architecture, call_size(inputs), os.environ.get(VARIABLE, ""))
    return LaunchPlan(config, split_keys(config, multiprocessors, inputs))


def split_keys(config: LaunchConfig, multiprocessors: int, inputs: TreeAttentionInputs) -> int:
    """Return how many programs share the keys of a row and head.

    They fill the GPU once: programs that wait for others would take as long again. Deterministic
    calls have as many as the cache has room for.
    """
    # Most tiles that any lengths give: the tree begins a tile of its own.
    tree_tiles = -(-inputs.num_slots // config.block_keys)
    most_tiles = -(-max(inputs.kv_len - inputs.num_slots, 0) // config.block_keys) + tree_tiles
    if inputs.deterministic:
        # One part would be written out without a merge, which rounds sinks in another place.
        return max(-(-most_tiles // config.fixed_tiles), 2)
    if inputs.num_splits is not None:
        return inputs.num_splits
    row_tiles = -(-inputs.num_rows // config.block_rows)
    running = multiprocessors * config.programs
    fitting = running // (inputs.batch * inputs.kv_heads * row_tiles)
    worthwhile = -(-most_tiles // config.min_tiles)
    return max(min(fitting, worthwhile, _MAX_SPLITS), 1)


@cache
def architecture(device: torch.device) -> str:
    """Return what kernels are compiled for on a device, such as ``"sm_90"`` or ``"gfx942"``.

    It is ``"interpreter"`` on the CPU.
    """
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip is not None:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.partition(":")[0]  # features follow
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def multiprocessors(device: torch.device) -> int:
    """Return the multiprocessors of a device; some of the interpreter, so that keys are split."""
    if device.type == "cpu":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


def call_size(inputs: TreeAttentionInputs) -> CallSize:
    """Return what the sizes of a call are looked up by."""
    itemsize = inputs.query.element_size()
    rows = _DETERMINISTIC_ROWS if inputs.deterministic else inputs.num_rows
    return CallSize(rows, inputs.head_dim * itemsize, is_float32=itemsize > 2)


def head_parts(head_dim: int) -> tuple[int, int]:
    """Return the powers of two that make up a width; the second may be 0."""
    first = 1 << (head_dim.bit_length() - 1)
    return first, head_dim - first


@cache
def _find_config(architecture: str, size: CallSize, path: str) -> LaunchConfig:
    """Look a call up in the file at `path`, if there is one, and then in our table."""
    if path:
        config = find_config(read_table_once(path), architecture, size)
        if config is not None:
            return config
    return built_in_config(architecture, size)
