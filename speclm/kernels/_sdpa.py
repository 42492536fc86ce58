"""Attention of tree nodes by PyTorch's own kernels, without copies of shared key heads."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from speclm.kernels.inputs import TreeAttentionInputs
from speclm.tree.topology import unpack_words

Mask = Shaped[Tensor, "mask_rows mask_heads nodes kv_len"]


def grouped_attention(
    query: Float[Tensor, "batch q_heads nodes head_dim"],
    key: Float[Tensor, "batch kv_heads kv_len head_dim"],
    value: Float[Tensor, "batch kv_heads kv_len value_dim"],
    mask: Mask,
    *,
    scale: float | None,
    repeat: Callable[[Tensor, int], Tensor] | None = None,
) -> Float[Tensor, "batch nodes q_heads value_dim"]:
    """Compute masked attention, as far as possible without copies of shared key heads.

    The query heads that share a key head are laid behind each other as nodes, which then share its
    mask, too. With many nodes that mask would be larger than the keys and values.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        mask: Additive, or true where a node sees a slot; one for all heads or one for each.
        scale: Factor of the scores; None for one over the square root of `head_dim`.
        repeat: Lays a mask behind itself a number of times; for callers that keep what it returns.
    """
    batch, q_heads, nodes, head_dim = query.shape
    kv_heads = key.shape[1]
    groups = q_heads // kv_heads
    if groups > 1 and nodes <= head_dim:
        query = query.reshape(batch, kv_heads, groups * nodes, head_dim)
        if mask.shape[1] == 1:
            mask = mask.repeat(1, 1, groups, 1) if repeat is None else repeat(mask, groups)
        else:
            mask = mask.reshape(mask.shape[0], kv_heads, groups * nodes, -1)
    elif query.device.type != "cpu":  # there a mask and grouped heads exclude fused kernels
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
    )
    return output.reshape(batch, q_heads, nodes, -1).transpose(1, 2).contiguous()


def sdpa_obstacle(inputs: TreeAttentionInputs) -> str | None:
    """Say what a call asks for that PyTorch's attention has no form for; None if nothing."""
    if inputs.softcap is not None:
        return "PyTorch's attention has no softcap"
    if inputs.sinks is not None:
        return "PyTorch's attention has no sinks"
    if inputs.deterministic:
        return "PyTorch's attention does not promise equal bits"
    if inputs.return_lse:
        return "PyTorch's attention does not return the denominator"
    return None


def tree_attention_sdpa(
    inputs: TreeAttentionInputs,
) -> Float[Tensor, "batch nodes q_heads head_dim"]:
    """Compute tree attention over the slots that rows use, and no others.

    Reads the lengths on the host. Rows of equal lengths go through one call, others through one
    each.
    """
    lengths = inputs.prefix_lengths.tolist()
    starts, begins = [0] * inputs.batch, lengths
    if inputs.prefix_starts is not None:
        starts = inputs.prefix_starts.tolist()
    if inputs.tree_starts is not None:
        begins = inputs.tree_starts.tolist()
    places = list(zip(starts, lengths, begins, strict=True))
    if len(set(places)) == 1 and inputs.block_table is None:
        return _attend(inputs, slice(0, inputs.batch), *places[0])
    rows = [_attend(inputs, slice(row, row + 1), *place) for row, place in enumerate(places)]
    return torch.cat(rows)


def _attend(
    inputs: TreeAttentionInputs, rows: slice, start: int, length: int, begin: int
) -> Float[Tensor, "rows nodes q_heads head_dim"]:
    past = begin + inputs.num_slots
    taken = [_slots(inputs, stored, rows, start, past) for stored in (inputs.key, inputs.value)]
    if begin > length:  # what lies between may hold anything
        head, tail = length - start, begin - start
        taken = [torch.cat([part[:, :, :head], part[:, :, tail:]], dim=2) for part in taken]
    mask = _mask(inputs, rows, start, length)
    return grouped_attention(inputs.query[rows], taken[0], taken[1], mask, scale=inputs.scale)


def _slots(
    inputs: TreeAttentionInputs, stored: Tensor, rows: slice, first: int, past: int
) -> Float[Tensor, "rows kv_heads slots head_dim"]:
    if inputs.block_table is None:
        return stored[rows, :, first:past]
    page_len = inputs.page_len
    blocks = slice(first // page_len, -(-past // page_len))
    pages = stored[inputs.block_table[rows.start, blocks]]  # [blocks, kv_heads, page_len, head_dim]
    first_of_all = blocks.start * page_len
    slots = pages.transpose(0, 1).flatten(1, 2)[None]
    return slots[:, :, first - first_of_all : past - first_of_all]


def _mask(
    inputs: TreeAttentionInputs, rows: slice, start: int, length: int
) -> Bool[Tensor, "mask_rows 1 nodes slots"]:
    words, depths = (
        shared if shared.shape[0] == 1 else shared[rows]
        for shared in (inputs.ancestor_words, inputs.depths)
    )
    tree = unpack_words(words, num_bits=inputs.num_slots)  # [mask_rows, nodes, slots]
    own = depths[:, -inputs.num_nodes :, None]
    if inputs.window is None:
        prefix = tree.new_ones(1, 1, 1).expand(*tree.shape[:2], length - start)
    else:
        slots = torch.arange(start, length, device=tree.device)
        prefix = length + own - slots < inputs.window
        tree = tree & (own - depths[:, None] < inputs.window)
    mask_rows = max(len(prefix), len(tree))
    return torch.cat([part.expand(mask_rows, -1, -1) for part in (prefix, tree)], dim=2)[:, None]
