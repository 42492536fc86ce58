"""Tree attention in Triton: the keys are split over programs, whose results are then merged.

A program computes a tile of rows over a range of key tiles. A row is a node with one of the query
heads that share a key head, so each key is read once for all of these heads. Key tiles are counted
from the first slot of the prefix; those of the tree come last. Tiles that all rows of a program see
in full go through a loop without masks. The other tiles (the edge of a window, the end of the
prefix, the tree) go through a second loop with masks.

Products and sums that decide a result are written as fused multiply-adds, and the compiler may not
fuse others. Both loops then round alike: a row's result does not depend on which loop a tile goes
through.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from speclm.kernels._triton_merge import merge_launch
from speclm.kernels.inputs import TreeAttentionInputs
from speclm.kernels.launch import Launch, LaunchPlan, head_parts

_LOG2_E = 1.4426950408889634
_LN_2 = tl.constexpr(0.6931471805599453)
IS_INTERPRETED = bool(triton.knobs.runtime.interpret)


@triton.jit
def _dot(left, right, total, WIDEN: tl.constexpr):
    if WIDEN:  # the interpreter multiplies the bits of bf16 as if they were integers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def _load(pointers, is_key, FIRST: tl.constexpr, WIDTH: tl.constexpr, IS_MASKED: tl.constexpr):
    """Load columns of rows; zeros where there is no row: [rows, WIDTH]."""
    at = pointers[:, None] + (FIRST + tl.arange(0, WIDTH))[None, :]
    if IS_MASKED:
        return tl.load(at, mask=is_key[:, None], other=0.0)
    return tl.load(at)


@triton.jit
def _slots_at(base, slot, columns, stride_slot, IS_MASKED: tl.constexpr):
    """Address of each slot from `slot` on: [BLOCK_KEYS]."""
    if IS_MASKED:  # needs fewer registers, of which masks leave few
        return base + (slot + columns).to(tl.int64) * stride_slot
    return base + slot.to(tl.int64) * stride_slot + columns.to(tl.int64) * stride_slot


@triton.jit
def _lowest(count):
    """A word whose lowest bits are set; `count` may be any whole number."""
    bits = (tl.full([], 1, tl.int64) << tl.minimum(tl.maximum(count, 0), 63).to(tl.int64)) - 1
    return tl.where(count > 63, -1, bits)


@triton.jit
def _unpack(word, BLOCK_KEYS: tl.constexpr):
    """Spread the lowest bits of words, by the halves that GPUs shift: [BLOCK_ROWS, BLOCK_KEYS]."""
    columns = tl.arange(0, BLOCK_KEYS)[None, :]
    half = word.to(tl.int32)[:, None]
    if BLOCK_KEYS > 32:
        half = tl.where(columns < 32, half, (word >> 32).to(tl.int32)[:, None])
    return ((half >> (columns % 32)) & 1) != 0


@triton.jit
def _cap(scores, cap_scale, HAS_CAP: tl.constexpr):
    """Soft cap, in units of the cap: tanh in a form that does not overflow."""
    if not HAS_CAP:
        return scores
    return 1.0 - 2.0 / (1.0 + tl.exp2(scores * cap_scale))


@triton.jit
def _weigh(scores, unit, maximum, total, IS_MASKED: tl.constexpr):
    """Fold a tile of scores into a running softmax; `unit` turns them into powers of two."""
    highest = tl.maximum(maximum, tl.max(scores, 1) * unit)
    finite = highest
    if IS_MASKED:  # a row may have seen nothing yet
        finite = tl.where(highest == float("-inf"), 0.0, highest)
    shares = tl.exp2(tl.fma(scores, unit, -finite[:, None]))
    kept = tl.exp2(maximum - finite)
    return highest, tl.fma(total, kept, tl.sum(shares, 1)), kept, shares


@triton.jit(
    do_not_specialize=[
        "num_nodes", "num_slots", "num_splits", "window", "words_row", "depths_row",
    ],
    do_not_specialize_on_alignment=[
        "lengths_ptr", "starts_ptr", "begins_ptr", "words_ptr", "depths_ptr",
        "sinks_ptr", "lse_ptr",
    ],
)  # fmt: skip
def split_kernel(  # noqa: C901, PLR0912 - constants decide most branches
    query_ptr, key_ptr, value_ptr, lengths_ptr, starts_ptr, begins_ptr, words_ptr,
    depths_ptr, sinks_ptr, output_ptr, lse_ptr,
    unit, cap_scale, num_nodes, num_slots, num_splits, window,
    query_row, query_head, query_node, key_row, key_head, key_slot, value_row, value_head,
    value_slot, words_row, depths_row,
    KV_HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, REST: tl.constexpr,
    HAS_STARTS: tl.constexpr, HAS_BEGINS: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, HAS_SINKS: tl.constexpr,
    IS_SPLIT: tl.constexpr, FIXED_TILES: tl.constexpr, MIN_TILES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, STAGES: tl.constexpr,
    EDGE_STAGES: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Attend to one range of key tiles; DIM and REST are powers of two that add up to head_dim.

    Writes the mean of the values and the logarithm (to base 2) of the denominator. If the keys
    are not split, writes the output itself.
    """
    split = tl.program_id(1)
    batch, kv_head = tl.program_id(2) // KV_HEADS, tl.program_id(2) % KV_HEADS
    length = tl.load(lengths_ptr + batch).to(tl.int32)
    start = tl.load(starts_ptr + batch).to(tl.int32) if HAS_STARTS else 0
    if HAS_STARTS:  # unchecked numbers hide no tile of the tree
        start = tl.minimum(start, length)
    begin = tl.load(begins_ptr + batch).to(tl.int32) if HAS_BEGINS else length

    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    node, head = rows // GROUPS, kv_head * GROUPS + rows % GROUPS
    is_row = node < num_nodes
    row_depths = depths_ptr + batch.to(tl.int64) * depths_row
    depth = tl.load(row_depths + num_slots - num_nodes + node, mask=is_row, other=0).to(tl.int32)

    # Tiles [first, past) are this program's, of which [open, shut) need no mask.
    num_prefix = tl.cdiv(length - start, BLOCK_KEYS)
    past = num_prefix + tl.cdiv(num_slots, BLOCK_KEYS)
    first, open_tile = 0, 0
    if HAS_WINDOW:
        unseen = length - start - window + 1  # slots that the root no longer sees
        first = tl.minimum(tl.maximum(unseen + tl.min(depth), 0) // BLOCK_KEYS, num_prefix)
        open_tile = tl.cdiv(tl.maximum(unseen + tl.max(depth), 0), BLOCK_KEYS)
        is_narrow = tl.max(depth) >= window
        hidden = depth - window  # depths up to here are outside a row's window
    if FIXED_TILES > 0:
        if HAS_WINDOW:  # what needs no mask depends on the rows, and with it the order of tiles
            open_tile = past
        past = tl.minimum(past, (split + 1) * FIXED_TILES)
        first = tl.maximum(first, split * FIXED_TILES)
    else:
        share = tl.maximum(tl.cdiv(past - first, num_splits), MIN_TILES)
        first += split * share
        past = tl.minimum(past, first + share)
    open_tile = tl.minimum(tl.maximum(open_tile, first), tl.maximum(past, first))
    shut = tl.maximum(tl.minimum(past, (length - start) // BLOCK_KEYS), open_tile)

    query_at = (
        query_ptr + batch.to(tl.int64) * query_row + head.to(tl.int64) * query_head
        + node.to(tl.int64) * query_node
    )  # fmt: skip
    key_base = key_ptr + kv_head.to(tl.int64) * key_head + batch.to(tl.int64) * key_row
    value_base = value_ptr + kv_head.to(tl.int64) * value_head + batch.to(tl.int64) * value_row
    query = _load(query_at, is_row, 0, DIM, IS_MASKED=True)  # [BLOCK_ROWS, DIM]
    mean = tl.zeros([BLOCK_ROWS, DIM], tl.float32)
    if REST > 0:
        query_rest = _load(query_at, is_row, DIM, REST, IS_MASKED=True)
        mean_rest = tl.zeros([BLOCK_ROWS, REST], tl.float32)
    maximum = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    zeros = tl.zeros([BLOCK_ROWS, BLOCK_KEYS], tl.float32)
    columns = tl.arange(0, BLOCK_KEYS)
    words_at = words_ptr + batch.to(tl.int64) * words_row + node * tl.cdiv(num_slots, 64)

    for tile in tl.range(open_tile, shut, num_stages=STAGES):
        slot = start + tile * BLOCK_KEYS
        at = _slots_at(key_base, slot, columns, key_slot, IS_MASKED=False)
        key = _load(at, at, 0, DIM, IS_MASKED=False)
        scores = _dot(query, tl.trans(key), zeros, WIDEN)
        if REST > 0:
            key = _load(at, at, DIM, REST, IS_MASKED=False)
            scores = _dot(query_rest, tl.trans(key), scores, WIDEN)
        scores = _cap(scores, cap_scale, HAS_CAP)
        maximum, total, kept, shares = _weigh(scores, unit, maximum, total, IS_MASKED=False)
        at = _slots_at(value_base, slot, columns, value_slot, IS_MASKED=False)
        value = _load(at, at, 0, DIM, IS_MASKED=False)
        shares = shares.to(value.dtype)
        mean = _dot(shares, value, mean * kept[:, None], WIDEN)
        if REST > 0:
            value = _load(at, at, DIM, REST, IS_MASKED=False)
            mean_rest = _dot(shares, value, mean_rest * kept[:, None], WIDEN)

    for step in tl.range(first + shut - open_tile, past, num_stages=EDGE_STAGES):
        tile = step
        if HAS_WINDOW:  # its edge comes before the tiles without masks
            tile = tl.where(step < shut, step - (shut - open_tile), step)
        is_tree = tile >= num_prefix
        in_tree = (tile - num_prefix) * BLOCK_KEYS
        slot = tl.where(is_tree, begin + in_tree, start + tile * BLOCK_KEYS)
        num_keys = tl.where(is_tree, num_slots - in_tree, length - slot)
        is_key = columns < num_keys
        word = tl.load(words_at + tl.maximum(in_tree, 0) // 64, mask=is_row, other=0)
        word = (word >> (in_tree & 63)) | tl.where(is_tree, 0, -1)  # all see the prefix
        word &= _lowest(num_keys)
        if HAS_WINDOW:
            word &= ~_lowest(tl.where(is_tree, 0, length + hidden + 1 - slot))
        at = _slots_at(key_base, slot, columns, key_slot, IS_MASKED=True)
        scores = _dot(query, tl.trans(_load(at, is_key, 0, DIM, IS_MASKED=True)), zeros, WIDEN)
        if REST > 0:
            key = _load(at, is_key, DIM, REST, IS_MASKED=True)
            scores = _dot(query_rest, tl.trans(key), scores, WIDEN)
        scores = _cap(scores, cap_scale, HAS_CAP)
        scores = tl.where(_unpack(word, BLOCK_KEYS), scores, float("-inf"))
        if HAS_WINDOW:  # noqa: SIM102 - a constant, and a tensor
            if is_tree & is_narrow:  # windows are rarely narrower than a tree is deep
                above = tl.load(row_depths + in_tree + columns, mask=is_key, other=0)
                is_near = above[None, :] > hidden[:, None]
                scores = tl.where(is_near, scores, float("-inf"))
        maximum, total, kept, shares = _weigh(scores, unit, maximum, total, IS_MASKED=True)
        at = _slots_at(value_base, slot, columns, value_slot, IS_MASKED=True)
        value = _load(at, is_key, 0, DIM, IS_MASKED=True)
        shares = shares.to(value.dtype)
        mean = _dot(shares, value, mean * kept[:, None], WIDEN)
        if REST > 0:
            value = _load(at, is_key, DIM, REST, IS_MASKED=True)
            mean_rest = _dot(shares, value, mean_rest * kept[:, None], WIDEN)

    if IS_SPLIT:
        part = (tl.program_id(2).to(tl.int64) * num_splits + split) * num_nodes * GROUPS + rows
        has_seen = is_row & (total > 0)  # parts of rows that see nothing are not read
        lse_at = lse_ptr + part
    else:
        part = ((batch * num_nodes + node) * KV_HEADS * GROUPS + head).to(tl.int64)
        has_seen = is_row
        lse_at = lse_ptr + ((batch * KV_HEADS * GROUPS + head) * num_nodes + node).to(tl.int64)
        if HAS_SINKS:
            sink = tl.load(sinks_ptr + head, mask=is_row, other=0.0).to(tl.float32)
            sink *= 1.4426950408889634
            highest = tl.maximum(maximum, sink)
            kept = tl.exp2(maximum - highest)
            total = tl.fma(total, kept, tl.exp2(sink - highest))
            maximum = highest
            mean *= kept[:, None]
            if REST > 0:
                mean_rest *= kept[:, None]
    divisor = tl.where(total > 0, total, 1.0)  # of a row that sees nothing; its maximum is -inf
    lse = maximum + tl.log2(divisor)
    if not IS_SPLIT:
        lse *= _LN_2
    tl.store(lse_at, lse, mask=is_row)
    share = 1.0 / divisor
    output_at = output_ptr + part[:, None] * (DIM + REST)
    kind = output_ptr.dtype.element_ty
    columns_of = tl.arange(0, DIM)[None, :]
    tl.store(output_at + columns_of, (mean * share[:, None]).to(kind), mask=has_seen[:, None])
    if REST > 0:
        columns_of = DIM + tl.arange(0, REST)[None, :]
        mean_rest *= share[:, None]
        tl.store(output_at + columns_of, mean_rest.to(kind), mask=has_seen[:, None])


def tree_attention_triton(inputs: TreeAttentionInputs, plan: LaunchPlan) -> tuple[Tensor, Tensor]:
    """Launch the kernels; does not sync with the device.

    Args:
        inputs: Checked by shape.
        plan: Sizes of tiles and programs, and how keys are split.

    Returns:
        The output, ``[batch, nodes, q_heads, head_dim]``, and the logarithm of the denominator,
        ``[batch, q_heads, nodes]``.
    """
    query = inputs.query
    output = query.new_empty(inputs.batch, inputs.num_nodes, inputs.q_heads, inputs.head_dim)
    lse = query.new_empty(inputs.batch, inputs.q_heads, inputs.num_nodes, dtype=torch.float32)
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]  # launch where it is
        for launch in attention_launches(inputs, plan, output, lse):
            launch.kernel[launch.grid](*launch.arguments, **launch.options)
    return output, lse


def attention_launches(
    inputs: TreeAttentionInputs, plan: LaunchPlan, output: Tensor, lse: Tensor
) -> list[Launch]:
    """Return the launches that fill `output` and `lse`, in order."""
    if plan.num_splits == 1:
        return [_split_launch(inputs, plan, output, lse)]
    shape = (inputs.batch * inputs.kv_heads, plan.num_splits, inputs.num_rows)
    parts = output.new_empty(*shape, inputs.head_dim, dtype=torch.float32)
    parts_lse = lse.new_empty(shape)
    merge = merge_launch(parts, parts_lse, inputs.sinks, output, lse)
    return [_split_launch(inputs, plan, parts, parts_lse), merge]


def _split_launch(
    inputs: TreeAttentionInputs, plan: LaunchPlan, output: Tensor, lse: Tensor
) -> Launch:
    config, num_splits = plan.config, plan.num_splits
    query, key, value = inputs.query, inputs.key, inputs.value
    sinks, lengths = inputs.sinks, inputs.prefix_lengths
    dim, rest = head_parts(inputs.head_dim)
    row_tiles = triton.cdiv(inputs.num_rows, config.block_rows)
    return Launch(
        kernel=split_kernel,
        grid=(row_tiles, num_splits, inputs.batch * inputs.kv_heads),
        arguments=(
            query,
            key,
            value,
            lengths,
            lengths if inputs.prefix_starts is None else inputs.prefix_starts,
            lengths if inputs.tree_starts is None else inputs.tree_starts,
            inputs.ancestor_words,
            inputs.depths,
            lse if sinks is None else sinks,
            output,
            lse,
            (inputs.softcap or inputs.scale) * _LOG2_E,
            2 * inputs.scale / (inputs.softcap or 1.0) * _LOG2_E,
            inputs.num_nodes,
            inputs.num_slots,
            num_splits,
            inputs.window or 0,
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            _row_stride(inputs.ancestor_words),
            _row_stride(inputs.depths),
        ),
        options={
            "KV_HEADS": inputs.kv_heads,
            "GROUPS": inputs.groups,
            "DIM": dim,
            "REST": rest,
            "HAS_STARTS": inputs.prefix_starts is not None,
            "HAS_BEGINS": inputs.tree_starts is not None,
            "HAS_WINDOW": inputs.window is not None,
            "HAS_CAP": inputs.softcap is not None,
            "HAS_SINKS": sinks is not None and num_splits == 1,
            "IS_SPLIT": num_splits > 1,
            "FIXED_TILES": config.fixed_tiles if inputs.deterministic else 0,
            "MIN_TILES": config.min_tiles,
            "BLOCK_ROWS": config.block_rows,
            "BLOCK_KEYS": config.block_keys,
            "STAGES": config.num_stages,
            "EDGE_STAGES": min(config.num_stages, 2),
            "WIDEN": IS_INTERPRETED and query.dtype == torch.bfloat16,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "enable_fp_fusion": False,
        },
    )


def _row_stride(tensor: Tensor) -> int:
    """Return the stride of the batch; 0 for a tree shared by all rows."""
    return 0 if tensor.shape[0] == 1 else tensor.stride(0)
