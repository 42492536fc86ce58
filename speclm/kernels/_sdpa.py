"""Attention of tree nodes by PyTorch's own kernels, without copies of shared key heads."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
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
    if inputs.query.device.type == "cpu" and inputs.window is None:
        return _attend_apart(inputs, rows, start, length, begin)
    stored, past = (inputs.key, inputs.value), begin + inputs.num_slots
    taken = [_slots(inputs, part, rows, start, past) for part in stored]
    if begin > length:  # what lies between may hold anything
        head, tail = length - start, begin - start
        taken = [torch.cat([part[:, :, :head], part[:, :, tail:]], dim=2) for part in taken]
    mask = _mask(inputs, rows, start, length)
    query, (key, value) = inputs.query[rows], taken
    return grouped_attention(query, key, value, mask, scale=inputs.scale)


def _attend_apart(
    inputs: TreeAttentionInputs, rows: slice, start: int, length: int, begin: int
) -> Float[Tensor, "rows nodes q_heads head_dim"]:
    """Attend to prefix and tree each by itself, and join the two by their denominators.

    The prefix, which may be long, then needs no mask, and what lies between is not looked at.
    """
    query = inputs.query[rows]
    batch, nodes, groups = len(query), inputs.num_nodes, inputs.groups
    query = query.reshape(batch, inputs.kv_heads, groups * nodes, -1)
    tree = unpack_words(_of_rows(inputs.ancestor_words, rows), num_bits=inputs.num_slots)
    bias = torch.zeros_like(tree, dtype=query.dtype).masked_fill_(~tree, -torch.inf)
    bias = bias.repeat(1, groups, 1)[:, None]  # [mask_rows, 1, groups * nodes, slots]
    # What scaled_dot_product_attention calls on a CPU; it alone returns the denominator.
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    stored, past = (inputs.key, inputs.value), begin + inputs.num_slots
    key, value = (_slots(inputs, part, rows, begin, past) for part in stored)
    output, lse = attend(query, key, value, attn_mask=bias, scale=inputs.scale)
    if length > start:
        key, value = (_slots(inputs, part, rows, start, length) for part in stored)
        prefix, prefix_lse = attend(query, key, value, scale=inputs.scale)
        share = torch.sigmoid(prefix_lse - lse)[..., None]
        output = torch.lerp(output.to(share.dtype), prefix.to(share.dtype), share)
    joined: Tensor = output.to(query.dtype).reshape(batch, inputs.q_heads, nodes, -1)
    return joined.transpose(1, 2).contiguous()


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
    depths = _of_rows(inputs.depths, rows)
    tree = unpack_words(_of_rows(inputs.ancestor_words, rows), num_bits=inputs.num_slots)
    own = depths[:, -inputs.num_nodes :, None]  # [depth_rows, nodes, 1]
    if inputs.window is None:
        prefix = tree.new_ones(1, inputs.num_nodes, length - start)
    else:
        slots = torch.arange(start, length, device=tree.device)
        prefix = length + own - slots < inputs.window
        tree = tree & (own - depths[:, None] < inputs.window)
    mask_rows = max(len(prefix), len(tree))
    return torch.cat([part.expand(mask_rows, -1, -1) for part in (prefix, tree)], dim=2)[:, None]


def _of_rows(shared: Int[Tensor, "shared_rows *rest"], rows: slice) -> Tensor:
    """Return what belongs to some rows of the batch; all rows may share one."""
    return shared if len(shared) == 1 else shared[rows]
