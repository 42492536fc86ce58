"""Keep a path, and compute ancestor words, in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from speclm.kernels.launch import Launch
from speclm.tree.words import num_words

_BLOCK_PATH = 16
_BLOCK_DIM = 128


@triton.jit(
    do_not_specialize=[
        "batch", "path_len", "paths_row", "paths_slot", "lengths_row", "begins_row",
    ]
)  # fmt: skip
def keep_path_kernel(
    storage_ptr, paths_ptr, lengths_ptr, begins_ptr, batch, path_len,
    storage_layer, storage_row, storage_head, storage_slot, paths_row, paths_slot, lengths_row,
    begins_row,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, HAS_BEGINS: tl.constexpr,
    BLOCK_PATH: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Move some columns of one row, head and layer; no two programs touch the same values.

    The path is ascending, so its i-th slot is at least i slots into the tree, and the tree does not
    begin before the end of the prefix: a target never comes after its source. The targets of a
    chunk therefore come before all sources of later chunks, which are read before they are
    overwritten. Within a chunk they may overlap: all of it is read before any of it is written.
    """
    program = tl.program_id(0).to(tl.int64)
    head, row = program % KV_HEADS, program // KV_HEADS % batch
    layer = program // KV_HEADS // batch
    length = tl.load(lengths_ptr + row * lengths_row).to(tl.int64)
    begin = tl.load(begins_ptr + row * begins_row).to(tl.int64) if HAS_BEGINS else length

    columns = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    is_column = columns < DIM
    base = storage_ptr + layer * storage_layer + row * storage_row + head * storage_head
    for first in range(0, path_len, BLOCK_PATH):
        offsets = first + tl.arange(0, BLOCK_PATH)
        path_at = paths_ptr + row * paths_row + offsets.to(tl.int64) * paths_slot
        path = tl.load(path_at, mask=offsets < path_len, other=-1).to(tl.int64)
        sources, targets = begin + path, length + offsets
        moves = (path >= 0) & (sources != targets)  # slots already in place stay untouched
        is_moved = moves[:, None] & is_column[None, :]
        at = (sources * storage_slot)[:, None] + columns[None, :]  # [BLOCK_PATH, BLOCK_DIM]
        moved = tl.load(base + at, mask=is_moved, other=0)
        at = (targets * storage_slot)[:, None] + columns[None, :]
        tl.debug_barrier()
        tl.store(base + at, moved, mask=is_moved)


def keep_path_triton(
    storage: Tensor,
    paths: Tensor,
    *,
    prefix_lengths: Tensor,
    tree_starts: Tensor | None,
) -> None:
    """Move slots of `storage`, whose bits are viewed as integers; does not sync."""
    launch = keep_path_launch(storage, paths, prefix_lengths, tree_starts)
    with torch.cuda.device_of(storage):  # type: ignore[no-untyped-call]  # launch where it is
        launch.kernel[launch.grid](*launch.arguments, **launch.options)
    torch.autograd.graph.increment_version(storage)  # autograd does not see the write


def keep_path_launch(
    storage: Tensor, paths: Tensor, prefix_lengths: Tensor, tree_starts: Tensor | None
) -> Launch:
    """Return the launch for all layers, rows and heads; its grid depends only on shapes."""
    layers, _, kv_heads, _, head_dim = storage.shape
    batch, path_len = paths.shape
    block_dim = min(triton.next_power_of_2(head_dim), _BLOCK_DIM)
    begins = prefix_lengths if tree_starts is None else tree_starts
    return Launch(
        kernel=keep_path_kernel,
        grid=(layers * batch * kv_heads, triton.cdiv(head_dim, block_dim)),
        arguments=(
            storage,
            paths,
            prefix_lengths,
            begins,
            batch,
            path_len,
            *storage.stride()[:4],
            *paths.stride(),
            prefix_lengths.stride(0),
            begins.stride(0),
        ),
        options={
            "KV_HEADS": kv_heads,
            "DIM": head_dim,
            "HAS_BEGINS": tree_starts is not None,
            "BLOCK_PATH": _BLOCK_PATH,
            "BLOCK_DIM": block_dim,
            "num_warps": 1,
            "num_stages": 1,
            "enable_fp_fusion": False,  # Triton warns if it is not set
        },
    )


@triton.jit(do_not_specialize=["num_nodes", "num_words", "parents_row", "parents_node"])
def tree_words_kernel(
    parents_ptr, words_ptr, depths_ptr, num_nodes, num_words, parents_row, parents_node,
    BLOCK_NODES: tl.constexpr, BLOCK_WORDS: tl.constexpr,
):  # fmt: skip
    """Write the words and depths of one row: climb from all nodes at once."""
    row = tl.program_id(0).to(tl.int64)
    nodes, words = tl.arange(0, BLOCK_NODES), tl.arange(0, BLOCK_WORDS)
    is_node = nodes < num_nodes
    parents_at = parents_ptr + row * parents_row
    at = nodes.to(tl.int64)
    depths = tl.zeros([BLOCK_NODES], tl.int32)
    bits = tl.zeros([BLOCK_NODES, BLOCK_WORDS], tl.int64)
    steps, is_climbing = 0, 1
    while is_climbing > 0:
        own = tl.full([BLOCK_NODES], 1, tl.int64) << at % 64
        bits |= tl.where((at // 64)[:, None] == words[None, :], own[:, None], 0)
        above = tl.load(parents_at + at * parents_node, mask=is_node, other=0).to(tl.int64)
        # Unchecked parents may lie outside the tree, or form a circle.
        above = tl.where((above >= 0) & (above < num_nodes) & is_node, above, at)
        climbs = (above != at).to(tl.int32)
        depths += climbs
        at = above
        steps += 1
        is_climbing = tl.where(steps < num_nodes, tl.max(climbs), 0)
    tl.store(depths_ptr + row * num_nodes + nodes, depths, mask=is_node)
    words_at = words_ptr + (row * num_nodes + nodes)[:, None] * num_words + words[None, :]
    tl.store(words_at, bits, mask=is_node[:, None] & (words < num_words)[None, :])


def tree_words_triton(parents: Tensor) -> tuple[Tensor, Tensor]:
    """Return the words and depths of `parents`, checked by shape; does not sync."""
    rows, nodes = parents.shape
    words = parents.new_empty(rows, nodes, num_words(nodes), dtype=torch.int64)
    depths = parents.new_empty(rows, nodes, dtype=torch.int32)
    launch = tree_words_launch(parents, words, depths)
    with torch.cuda.device_of(parents):  # type: ignore[no-untyped-call]  # launch where it is
        launch.kernel[launch.grid](*launch.arguments, **launch.options)
    return words, depths


def tree_words_launch(parents: Tensor, words: Tensor, depths: Tensor) -> Launch:
    """Return the launch that fills `words` and `depths`."""
    rows, nodes, count = words.shape
    return Launch(
        kernel=tree_words_kernel,
        grid=(rows,),
        arguments=(parents, words, depths, nodes, count, *parents.stride()),
        options={
            "BLOCK_NODES": triton.next_power_of_2(nodes),
            "BLOCK_WORDS": triton.next_power_of_2(count),
            "num_warps": 4,
            "enable_fp_fusion": False,  # Triton warns if it is not set
        },
    )
