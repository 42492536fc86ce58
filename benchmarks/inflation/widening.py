"""Place the weights of a small layer in a wide one, so that the wide one computes the same."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.inflation.shapes import InflatedShape
from speclm.drafting.heads_network import HeadsNetwork
from speclm.errors import OptionError, UnsupportedModelError

BOUND = 0.02 * math.sqrt(3)
"""Of a uniform distribution with the deviation of a fresh Llama's weights."""

EXTRA_LOGIT = -1e4
"""Logit, about, of the tokens that inflation adds: finite in every dtype, never chosen."""

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


def share_of(mine: int, small: int, large: int) -> int:
    """Return a number of heads that keeps its share of the base's, but does not fall."""
    return max(mine, round(mine * large / small))


def widen_shape(old: InflatedShape, shape: InflatedShape, *, base: InflatedShape) -> InflatedShape:
    """Return the shape of heads for an inflated base: the same share of everything.

    Args:
        old: Shape of the heads of the small base.
        shape: What the base is inflated to.
        base: Shape of the small base.
    """
    num_kv_heads = share_of(old.num_kv_heads, base.num_kv_heads, shape.num_kv_heads)
    group = max(1, round(old.group_size * shape.group_size / base.group_size))
    return replace(
        old,
        hidden_size=shape.hidden_size,
        intermediate_size=share_of(
            old.intermediate_size, base.intermediate_size, shape.intermediate_size
        ),
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        head_dim=old.head_dim * max(1, shape.head_dim // base.head_dim),
        vocab_size=shape.vocab_size,
    )


def prepare_output_(new: HeadsNetwork, old: HeadsNetwork) -> None:
    """Give allocated heads their draft vocabulary, and a bias for what it gains."""
    weight, num_columns = old.fc.weight, old.config.draft_vocab_size
    extra = new.config.draft_vocab_size - num_columns
    if new.lm_head is not None and extra:
        sizes = new.config.hidden_size, new.config.draft_vocab_size
        new.lm_head = nn.Linear(*sizes, device=weight.device, dtype=weight.dtype)
    if new.draft_columns is not None:
        mine = old.target_ids(torch.arange(num_columns, device=weight.device))
        first = old.config.vocab_size
        gained = torch.arange(first, first + extra, device=weight.device)
        new.set_draft_columns_(torch.cat([mine, gained]))


def fill_embeddings(new: HeadsNetwork, old: HeadsNetwork) -> None:
    """Write the embeddings that heads have themselves, each followed by zeros."""
    if new.embed_tokens is not None and old.embed_tokens is not None:
        rows, width = old.embed_tokens.weight.shape
        new.embed_tokens.weight[:, width:] = 0
        new.embed_tokens.weight[:rows, :width] = old.embed_tokens.weight


def fill_output(new: HeadsNetwork, old: HeadsNetwork) -> None:
    """Write the output matrix that heads have themselves; gained tokens get `EXTRA_LOGIT`."""
    if new.lm_head is not None and old.lm_head is not None:
        rows, width = old.lm_head.weight.shape
        new.lm_head.weight[:rows, :width] = old.lm_head.weight
        if new.lm_head.bias is not None:
            new.lm_head.bias[:rows] = 0
            new.lm_head.bias[rows:] = EXTRA_LOGIT


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
