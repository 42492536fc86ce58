"""Inputs of tree attention that have shapes and types, but no values."""

import torch
from torch import Tensor

from speclm.kernels.inputs import TreeAttentionInputs
from speclm.tree.words import num_words


def meta_inputs(
    *,
    nodes: int,
    groups: int = 4,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    batch: int = 2,
    kv_heads: int = 8,
    kv_len: int = 131_072,
    has_all: bool = False,
    deterministic: bool = False,
) -> TreeAttentionInputs:
    """Return inputs of shapes and types alone, with all features switched on or none."""

    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    lengths = empty(batch, of=torch.int32)
    cache_shape = (batch, kv_heads, kv_len, head_dim)
    return TreeAttentionInputs(
        query=empty(batch, kv_heads * groups, nodes, head_dim),
        key=empty(*cache_shape),
        value=empty(*cache_shape),
        prefix_lengths=lengths,
        ancestor_words=empty(batch, nodes, num_words(nodes), of=torch.int64),
        depths=empty(batch, nodes, of=torch.int32),
        prefix_starts=lengths if has_all else None,
        tree_starts=lengths if has_all else None,
        sinks=empty(kv_heads * groups) if has_all else None,
        scale=head_dim**-0.5,
        window=4096 if has_all else None,
        softcap=50.0 if has_all else None,
        deterministic=deterministic,
    )
