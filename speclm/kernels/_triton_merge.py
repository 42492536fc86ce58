"""The second step of tree attention in Triton: merge the results of the splits."""

import triton
import triton.language as tl
from torch import Tensor

from speclm.kernels.launch import Launch

_BLOCK_ROWS = 4  # few, or the programs of a small tree would leave most of a GPU idle
_BLOCK_SPLITS = 8  # loaded at once
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(
    do_not_specialize=["num_nodes", "num_splits"],
    do_not_specialize_on_alignment=["parts_lse_ptr", "sinks_ptr", "lse_ptr"],
)
def merge_kernel(
    parts_ptr, parts_lse_ptr, sinks_ptr, output_ptr, lse_ptr, num_nodes, num_splits,
    KV_HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    HAS_SINKS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """Merge the parts of each row in order; parts that saw nothing change no bit."""
    batch, kv_head = tl.program_id(1) // KV_HEADS, tl.program_id(1) % KV_HEADS
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    node, head = rows // GROUPS, kv_head * GROUPS + rows % GROUPS
    is_row = node < num_nodes
    columns = tl.arange(0, PADDED)
    is_column = columns < WIDTH
    maximum = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    if HAS_SINKS:  # only in the denominator
        maximum = tl.load(sinks_ptr + head, mask=is_row, other=0.0).to(tl.float32)
        maximum *= 1.4426950408889634
        total += 1.0
    mean = tl.zeros([BLOCK_ROWS, PADDED], tl.float32)
    for first in range(0, num_splits, BLOCK_SPLITS):
        for offset in tl.static_range(BLOCK_SPLITS):  # the loads do not wait for each other
            split = first + offset
            part = tl.program_id(1).to(tl.int64) * num_splits + split
            part = part * num_nodes * GROUPS + rows
            is_part = node < tl.where(split < num_splits, num_nodes, 0)
            lse = tl.load(parts_lse_ptr + part, mask=is_part, other=float("-inf"))
            has_seen = lse > float("-inf")
            found = tl.load(
                parts_ptr + part[:, None] * WIDTH + columns[None, :],
                mask=has_seen[:, None] & is_column[None, :],
                other=0.0,
            )
            highest = tl.maximum(maximum, lse)
            finite = tl.where(highest == float("-inf"), 0.0, highest)
            kept, share = tl.exp2(maximum - finite), tl.exp2(lse - finite)
            total = tl.fma(total, kept, share)
            mean = mean * kept[:, None] + found * share[:, None]
            maximum = highest
    row = ((batch * num_nodes + node) * KV_HEADS * GROUPS + head).to(tl.int64)
    total = tl.where(total > 0, total, 1.0)  # outside the rows, and for rows that see nothing
    output = (mean / total[:, None]).to(output_ptr.dtype.element_ty)
    at = output_ptr + row[:, None] * WIDTH + columns[None, :]
    tl.store(at, output, mask=is_row[:, None] & is_column[None, :])
    lse_at = lse_ptr + ((batch * KV_HEADS * GROUPS + head) * num_nodes + node).to(tl.int64)
    tl.store(lse_at, (maximum + tl.log2(total)) * _LN_2, mask=is_row)


def merge_launch(
    parts: Tensor, parts_lse: Tensor, sinks: Tensor | None, output: Tensor, lse: Tensor
) -> Launch:
    """Return the launch that fills `output` and `lse`.

    Args:
        parts: Means of the parts, ``[batch * kv_heads, splits, nodes * groups, head_dim]``; not
            read for a part that saw nothing.
        parts_lse: Logarithms, to base 2, of their denominators; minus infinity for a part that saw
            nothing.
        sinks: Logit of each query head that only adds to the denominator.
        output: ``[batch, nodes, q_heads, head_dim]``.
        lse: Natural logarithms of the denominators, ``[batch, q_heads, nodes]``.
    """
    batch, num_nodes, q_heads, head_dim = output.shape
    programs, num_splits, rows = parts_lse.shape
    kv_heads = programs // batch
    return Launch(
        kernel=merge_kernel,
        grid=(triton.cdiv(rows, _BLOCK_ROWS), programs),
        arguments=(
            parts,
            parts_lse,
            lse if sinks is None else sinks,
            output,
            lse,
            num_nodes,
            num_splits,
        ),
        options={
            "KV_HEADS": kv_heads,
            "GROUPS": q_heads // kv_heads,
            "WIDTH": head_dim,
            "PADDED": triton.next_power_of_2(head_dim),
            "HAS_SINKS": sinks is not None,
            "BLOCK_ROWS": _BLOCK_ROWS,
            "BLOCK_SPLITS": _BLOCK_SPLITS,
            "num_warps": 4,
            "enable_fp_fusion": False,
        },
    )
