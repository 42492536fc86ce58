"""Ancestor bits and depths in Triton: a program paths up from all nodes of a row at once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from speclm.kernels.launch import Launch
from speclm.tree.topology import num_words


@triton.jit(do_not_specialize=["num_nodes", "num_words", "parents_row", "parents_node"])
def tree_words_kernel(
    parents_ptr, words_ptr, depths_ptr, num_nodes, num_words, parents_row, parents_node,
    BLOCK_NODES: tl.constexpr, BLOCK_WORDS: tl.constexpr,
):  # fmt: skip
    """Write the words and depths of one row."""
    row = tl.program_id(0).to(tl.int64)
    nodes, words = tl.arange(0, BLOCK_NODES), tl.arange(0, BLOCK_WORDS)
    is_node = nodes < num_nodes
    parents_at = parents_ptr + row * parents_row
    at = nodes.to(tl.int64)
    depths = tl.zeros([BLOCK_NODES], tl.int32)
    bits = tl.zeros([BLOCK_NODES, BLOCK_WORDS], tl.int64)
    steps, is_walking = 0, 1
    while is_walking > 0:
        own = tl.full([BLOCK_NODES], 1, tl.int64) << at % 64
        bits |= tl.where((at // 64)[:, None] == words[None, :], own[:, None], 0)
        above = tl.load(parents_at + at * parents_node, mask=is_node, other=0).to(tl.int64)
        # Parents that nobody has checked may lie outside, or go round in circles.
        above = tl.where((above >= 0) & (above < num_nodes) & is_node, above, at)
        climbs = (above != at).to(tl.int32)
        depths += climbs
        at = above
        steps += 1
        is_walking = tl.where(steps < num_nodes, tl.max(climbs), 0)
    tl.store(depths_ptr + row * num_nodes + nodes, depths, mask=is_node)
    words_at = words_ptr + (row * num_nodes + nodes)[:, None] * num_words + words[None, :]
    tl.store(words_at, bits, mask=is_node[:, None] & (words < num_words)[None, :])


def tree_words_triton(parents: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the kernel; nothing is read on the host.

    Args:
        parents: Checked by shape.

    Returns:
        The words, ``[rows, nodes, words]``, and the depths, ``[rows, nodes]``.
    """
    rows, nodes = parents.shape
    words = parents.new_empty(rows, nodes, num_words(nodes), dtype=torch.int64)
    depths = parents.new_empty(rows, nodes, dtype=torch.int32)
    launch = tree_words_launch(parents, words, depths)
    with torch.cuda.device_of(parents):  # type: ignore[no-untyped-call]  # launch where it is
        launch.kernel[launch.grid](*launch.arguments, **launch.options)
    return words, depths


def tree_words_launch(parents: Tensor, words: Tensor, depths: Tensor) -> Launch:
    """Return what is launched to fill `words` and `depths`."""
    rows, nodes, count = words.shape
    return Launch(
        kernel=tree_words_kernel,
        grid=(rows,),
        arguments=(parents, words, depths, nodes, count, *parents.stride()),
        options={
            "BLOCK_NODES": triton.next_power_of_2(nodes),
            "BLOCK_WORDS": triton.next_power_of_2(count),
            "num_warps": 4,
            "enable_fp_fusion": False,  # which Triton warns about where it is left open
        },
    )
