"""Place the weights of a small layer in a wide one, so that the wide one computes the same."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.inflation.shapes import InflatedShape
from speclm.errors import OptionError, UnsupportedModelError

BOUND = 0.02 * math.sqrt(3)
"""Of a uniform distribution with the deviation of a fresh Llama's weights."""

_ROPE_BY_FREQUENCY = ("default", "linear", "llama3")  # each pair is scaled by its frequency alone


@dataclass(frozen=True, slots=True)
class HeadRows:
    """Rows of the old heads in the projections of an inflated layer."""

    q_rows: Tensor
    q_unused: Tensor  # other rows of the same heads, which must not see keys
    k_rows: Tensor
    k_sources: Tensor  # old row that each of `k_rows` and `v_rows` repeats
    v_rows: Tensor
    o_columns: Tensor
    q_scale: float


def place_heads(old: InflatedShape, new: InflatedShape) -> HeadRows:
    """Give every old head a new one; old keys are repeated where new groups are smaller."""
    copies = math.ceil(old.group_size / new.group_size)
    factor = new.head_dim // old.head_dim
    # rope turns entry i together with half + i
    half = torch.arange(old.head_dim // 2, device="cpu") * factor
    rope = torch.cat([half, half + new.head_dim // 2])
    entries = torch.arange(new.head_dim, device="cpu")
    unused = entries[~torch.isin(entries, rope)]
    straight = torch.arange(old.head_dim, device="cpu")
    query = torch.arange(old.num_heads, device="cpu")
    rank = query % old.group_size
    new_kv = query // old.group_size * copies + rank // new.group_size
    new_query = (new_kv * new.group_size + rank % new.group_size)[:, None] * new.head_dim
    repeated = torch.arange(old.num_kv_heads * copies, device="cpu")[:, None]
    return HeadRows(
        q_rows=(new_query + rope).flatten(),
        q_unused=(new_query + unused).flatten(),
        k_rows=(repeated * new.head_dim + rope).flatten(),
        k_sources=(repeated // copies * old.head_dim + straight).flatten(),
        v_rows=(repeated * new.head_dim + straight).flatten(),
        o_columns=(new_query + straight).flatten(),
        q_scale=math.sqrt(new.head_dim / old.head_dim),
    )


def fill_rows(
    new: nn.Linear,
    old: nn.Linear,
    rows: Tensor,
    sources: Tensor,
    *,
    scale: float = 1.0,
    columns: Tensor | None = None,
) -> None:
    """Write rows of a matrix that reads the stream; columns beyond meet zeros.

    Args:
        new: The wide matrix.
        old: The small one.
        rows: Where they lie in the wide one.
        sources: Where they come from in the small one.
        scale: Factor of them.
        columns: Where the small one's inputs lie among the wide one's; None for the first.
    """
    inputs = torch.arange(old.in_features, device="cpu") if columns is None else columns
    new.weight[rows[:, None], inputs] = old.weight[sources] * scale
    if old.bias is not None:
        new.bias[rows] = old.bias[sources] * scale


def fill_columns(new: nn.Linear, old: nn.Linear, columns: Tensor) -> None:
    """Write a matrix that adds to the stream: what is not an old unit or entry adds nothing."""
    new.weight.zero_()
    new.weight[: old.out_features, columns] = old.weight
    if old.bias is not None:
        new.bias.zero_()
        new.bias[: old.out_features] = old.bias


def fill_norm(new: nn.Module, old: nn.Module, *, columns: Tensor | None = None) -> None:
    """Scale a norm's weights: the mean square of a padded stream is smaller."""
    to, of = new.get_parameter("weight"), old.get_parameter("weight")
    indices = torch.arange(len(of), device="cpu") if columns is None else columns
    to.fill_(1)
    to[indices] = (of.float() * math.sqrt(len(of) / len(to))).to(to.dtype)


def require_head_room(
    old: InflatedShape, new: InflatedShape, heads: HeadRows, *, rope: Mapping[str, Any]
) -> None:
    """Check that the old attention heads fit among the new ones.

    Raises:
        OptionError: If there are too few, or their width is no multiple of the old.
        UnsupportedModelError: If they widen and the rotation depends on their width.
    """
    if new.head_dim % old.head_dim:
        raise OptionError(
            f"head_dim is {new.head_dim}, expected a multiple of the model's {old.head_dim}, so "
            "that its rope frequencies are among the new ones; choose a multiple"
        )
    needed = len(heads.k_rows) // old.head_dim
    if new.num_kv_heads < needed:
        raise OptionError(
            f"num_kv_heads is {new.num_kv_heads}, expected at least {needed} in groups of "
            f"{new.group_size}; choose more heads or larger groups"
        )
    rope_type = rope.get("rope_type", "default")
    if new.head_dim != old.head_dim and rope_type not in _ROPE_BY_FREQUENCY:
        raise UnsupportedModelError(
            f"rope_type is {rope_type!r}, which depends on head_dim, expected one of "
            f"{_ROPE_BY_FREQUENCY!r}; keep head_dim {old.head_dim}"
        )


def require_grown(name: str, old: int, new: int) -> None:
    """Check that a number does not shrink.

    Raises:
        OptionError: If it does.
    """
    if new < old:
        raise OptionError(
            f"{name} is {new}, expected at least the model's {old}; choose a larger one"
        )
