"""How kernels are launched on which GPU: sizes of tiles and programs, from a table."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from speclm.kernels.inputs import TreeAttentionInputs

HEAD_DIMS = (16, 32, 64, 80, 96, 128, 160, 192, 256)
"""Widths of heads that the Triton kernel takes: one power of two, or the sum of two."""


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """Sizes of one launch of tree attention.

    Args:
        block_rows: Rows (nodes with their heads) of a program.
        block_keys: Keys of a tile; a power of two up to 64.
        num_warps: Warps of a program.
        num_stages: Tiles of keys that are loaded ahead.
        programs: Programs that a multiprocessor runs at once; with it the number of splits is set.
        min_tiles: Fewest tiles that are worth a split.
        fixed_tiles: Tiles of a split in deterministic calls.
    """

    block_rows: int
    block_keys: int
    num_warps: int
    num_stages: int
    programs: int = 1
    min_tiles: int = 2
    fixed_tiles: int = 16


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
    arguments: tuple[Tensor | float, ...]
    options: dict[str, int]


def plan_launch(inputs: TreeAttentionInputs) -> LaunchPlan:
    """Return how a call is launched on its device; depends on shapes alone, not on lengths."""
    config = LaunchConfig(16, 16, 4, 2)
    return LaunchPlan(config, inputs.num_splits or 2)


def head_parts(head_dim: int) -> tuple[int, int]:
    """Return the powers of two that make up a width; the second may be 0."""
    first = 1 << (head_dim.bit_length() - 1)
    return first, head_dim - first
