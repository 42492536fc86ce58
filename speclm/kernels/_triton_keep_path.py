"""Keeping a path in Triton: one launch for all layers, rows and heads."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from speclm.kernels.launch import Launch

_BLOCK_PATH = 16
_BLOCK_DIM = 128


@triton.jit
def _slots_at(
    table_ptr, slots, moves, storage_row, storage_slot, table_block, PAGE: tl.constexpr
):  # fmt: skip
    """Offset of each slot of a row, or of its page and the slot in it: [BLOCK_PATH]."""
    if PAGE == 0:
        return slots * storage_slot
    pages = tl.load(table_ptr + slots // PAGE * table_block, mask=moves, other=0)
    return pages.to(tl.int64) * storage_row + slots % PAGE * storage_slot


@triton.jit(
    do_not_specialize=[
        "batch", "path_len", "paths_row", "paths_slot", "lengths_row", "begins_row", "table_row",
        "table_block",
    ]
)  # fmt: skip
def keep_path_kernel(
    storage_ptr, paths_ptr, lengths_ptr, begins_ptr, table_ptr, batch, path_len,
    storage_layer, storage_row, storage_head, storage_slot, paths_row, paths_slot, lengths_row,
    begins_row, table_row, table_block,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, HAS_BEGINS: tl.constexpr,
    BLOCK_PATH: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Move some columns of one row, head and layer; no two programs touch the same values.

    The path is ascending, so its i-th slot is at least i slots into the tree, and the tree begins
    no sooner than the prefix ends: a target never lies behind its own source. Targets of a chunk
    therefore lie before every source of the later chunks, and none of those is overwritten before
    it is read. Within a chunk they may overlap: all of it is read before any of it is written.
    """
    program = tl.program_id(0).to(tl.int64)
    head, row = program % KV_HEADS, program // KV_HEADS % batch
    layer = program // KV_HEADS // batch
    length = tl.load(lengths_ptr + row * lengths_row).to(tl.int64)
    begin = tl.load(begins_ptr + row * begins_row).to(tl.int64) if HAS_BEGINS else length

    columns = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    is_column = columns < DIM
    base = storage_ptr + layer * storage_layer + head * storage_head
    if PAGE == 0:
        base += row * storage_row
    table_at = table_ptr + row * table_row
    for first in range(0, path_len, BLOCK_PATH):
        offsets = first + tl.arange(0, BLOCK_PATH)
        path_at = paths_ptr + row * paths_row + offsets.to(tl.int64) * paths_slot
        path = tl.load(path_at, mask=offsets < path_len, other=-1).to(tl.int64)
        sources, targets = begin + path, length + offsets
        moves = (path >= 0) & (sources != targets)  # what is in place is left alone
        is_moved = moves[:, None] & is_column[None, :]
        at = _slots_at(table_at, sources, moves, storage_row, storage_slot, table_block, PAGE)
        at = at[:, None] + columns[None, :]  # [BLOCK_PATH, BLOCK_DIM]
        moved = tl.load(base + at, mask=is_moved, other=0)
        at = _slots_at(table_at, targets, moves, storage_row, storage_slot, table_block, PAGE)
        at = at[:, None] + columns[None, :]
        tl.debug_barrier()
        tl.store(base + at, moved, mask=is_moved)


def keep_path_triton(
    storage: Tensor,
    paths: Tensor,
    *,
    prefix_lengths: Tensor,
    tree_starts: Tensor | None,
    block_table: Tensor | None,
) -> None:
    """Launch the kernel; nothing is read on the host.

    Args:
        storage: Bits of all layers, as a type of whole numbers; checked by shape, as all others.
        paths: Slots of the tree, padded with -1.
        prefix_lengths: Slots before the tree.
        tree_starts: First tree slot; None for `prefix_lengths`.
        block_table: Page of each block of each row; None for a contiguous cache.
    """
    launch = keep_path_launch(storage, paths, prefix_lengths, tree_starts, block_table)
    with torch.cuda.device_of(storage):  # type: ignore[no-untyped-call]  # launch where it is
        launch.kernel[launch.grid](*launch.arguments, **launch.options)
    torch.autograd.graph.increment_version(storage)  # which autograd does not see being written


def keep_path_launch(
    storage: Tensor,
    paths: Tensor,
    prefix_lengths: Tensor,
    tree_starts: Tensor | None,
    block_table: Tensor | None,
) -> Launch:
    """Return what is launched; its grid depends on shapes alone."""
    layers, _, kv_heads, page_len, head_dim = storage.shape
    batch, path_len = paths.shape
    block_dim = min(triton.next_power_of_2(head_dim), _BLOCK_DIM)
    begins = prefix_lengths if tree_starts is None else tree_starts
    table = paths if block_table is None else block_table
    return Launch(
        kernel=keep_path_kernel,
        grid=(layers * batch * kv_heads, triton.cdiv(head_dim, block_dim)),
        arguments=(
            storage,
            paths,
            prefix_lengths,
            begins,
            table,
            batch,
            path_len,
            *storage.stride()[:4],
            *paths.stride(),
            prefix_lengths.stride(0),
            begins.stride(0),
            *table.stride(),
        ),
        options={
            "KV_HEADS": kv_heads,
            "DIM": head_dim,
            "PAGE": 0 if block_table is None else page_len,
            "HAS_BEGINS": tree_starts is not None,
            "BLOCK_PATH": _BLOCK_PATH,
            "BLOCK_DIM": block_dim,
            "num_warps": 1,
            "num_stages": 1,
            "enable_fp_fusion": False,  # which Triton warns about where it is left open
        },
    )
