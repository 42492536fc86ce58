"""What computes tree attention in the benchmarks: ours, FlexAttention, SDPA and eager."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import eager_attention_forward

from benchmarks.kernels.cases import random_parents, relative_error
from benchmarks.kernels.timing import num_buffers
from speclm.kernels import tree_attention, tree_words
from speclm.tree.words import unpack_words

BLOCK = 128
"""Slots of a block of FlexAttention's masks; caches are a multiple of it."""
FLEX_OPTIONS: tuple[Mapping[str, Any], ...] = (
    {},
    {"num_warps": 4, "num_stages": 3},
    {"num_warps": 8, "num_stages": 2},
    {"num_warps": 8, "num_stages": 2, "SPLIT_KV": 16},
    {"BLOCK_M": 64, "num_warps": 4, "num_stages": 3},
)
"""Settings of FlexAttention that are tried; the first one is its own choice."""

Attend = Callable[[int], Tensor]
"""Computes attention over the buffer of a number, heads before or after nodes."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What is attended to.

    Args:
        prefix: Slots before the tree, of the longest row.
        nodes: Nodes of the tree.
        batch: Rows; several have prefixes of unequal lengths.
        q_heads: Query heads.
        kv_heads: Key heads.
        head_dim: Width of a head.
        dtype: Of all tensors.
    """

    prefix: int
    nodes: int
    batch: int = 1
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16

    @property
    def lengths(self) -> list[int]:
        """Prefix of each row: from a quarter of the longest one up to it."""
        steps = max(self.batch - 1, 1)
        return [
            self.prefix - (self.prefix * 3 // 4) * row // steps // 8 * 8
            for row in range(self.batch)
        ]

    @property
    def capacity(self) -> int:
        """Slots of the cache."""
        return -(-(self.prefix + self.nodes) // BLOCK) * BLOCK

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values that rows see."""
        slots = sum(self.lengths) + self.batch * self.nodes
        return 2 * slots * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def operations(self) -> int:
        """Floating-point operations of the two products."""
        slots = sum(self.lengths) + self.batch * self.nodes
        return 4 * slots * self.nodes * self.q_heads * self.head_dim


class Workload:
    """Queries, a tree, and enough caches that none stays in the device's cache.

    Trees begin at one slot in all rows; what lies between a shorter row and it is masked.
    """

    def __init__(self, shape: Shape, *, device: str, is_timed: bool = True) -> None:
        """Fill the caches with random numbers; one is enough where nothing is timed."""
        self.shape, self.device = shape, device
        generator = torch.Generator(device=device).manual_seed(0)
        size = (shape.batch, shape.kv_heads, shape.capacity, shape.head_dim)
        given = {"dtype": shape.dtype, "device": device, "generator": generator}
        whole = 2 * shape.batch * shape.capacity * shape.kv_heads * shape.head_dim
        self.num_buffers = 1
        if is_timed:
            self.num_buffers = num_buffers(whole * shape.dtype.itemsize, device)
        self.caches = [
            (torch.randn(size, **given), torch.randn(size, **given))
            for _ in range(self.num_buffers)
        ]
        size = (shape.batch, shape.nodes, shape.q_heads, shape.head_dim)
        self.query = (1.5 * torch.randn(size, **given)).transpose(1, 2)
        parents = random_parents(1, shape.nodes, torch.Generator().manual_seed(1))
        self.words, self.depths = tree_words(parents.to(device))
        self.lengths = torch.tensor(shape.lengths, dtype=torch.int32, device=device)
        self.begins = self.lengths.max().expand(shape.batch).contiguous()
        self.module = SimpleNamespace(
            num_key_value_groups=shape.q_heads // shape.kv_heads, training=False
        )
        self.num_slots = shape.prefix + shape.nodes
        self.visible = self._visible()

    def _visible(self) -> Tensor:
        """Return what nodes see, as Transformers makes it: ``[batch, 1, nodes, slots]``."""
        slots = torch.arange(self.shape.prefix, device=self.device)
        prefix = (slots < self.lengths[:, None])[:, None].expand(-1, self.shape.nodes, -1)
        tree = unpack_words(self.words, num_bits=self.shape.nodes)
        return torch.cat([prefix, tree.expand(self.shape.batch, -1, -1)], dim=2)[:, None]

    def cache(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the slots of a buffer that are in use."""
        key, value = self.caches[index]
        return key[:, :, : self.num_slots], value[:, :, : self.num_slots]

    def ours(self, **options: Any) -> Attend:
        """Return our op."""
        return self._tree_attention(self.caches, **options)

    def _tree_attention(self, caches: Sequence[tuple[Tensor, ...]], **options: Any) -> Attend:
        given = {
            "prefix_lengths": self.lengths,
            "tree_starts": self.begins if self.shape.batch > 1 else None,
            "ancestor_words": self.words,
            "depths": self.depths,
            "check_values": False,
            **options,
        }
        return lambda index: tree_attention(self.query, *caches[index], **given)

    def sdpa(self) -> Attend:
        """Return what Transformers computes with a mask: heads are repeated."""
        return lambda index: sdpa_attention_forward(
            self.module, self.query, *self.cache(index), self.visible
        )[0]

    def grouped_sdpa(self) -> Attend:
        """Return PyTorch's attention with a mask and without repeated heads."""

        def attend(index: int) -> Tensor:
            output = F.scaled_dot_product_attention(
                self.query, *self.cache(index), attn_mask=self.visible, enable_gqa=True
            )
            return output.transpose(1, 2)

        return attend

    def eager(self) -> Attend:
        """Return what Transformers computes step by step."""
        hidden = torch.finfo(self.shape.dtype).min
        bias = torch.zeros_like(self.visible, dtype=self.shape.dtype)
        bias.masked_fill_(~self.visible, hidden)
        scale = self.shape.head_dim**-0.5
        return lambda index: eager_attention_forward(
            self.module, self.query, *self.cache(index), bias, scale
        )[0]

    def flex(self, options: Mapping[str, Any], *, compiler: str = "inductor") -> Attend:
        """Return FlexAttention with a block mask that is made by hand, once."""
        mask = self.block_mask()
        function = torch.compile(flex_attention, backend=compiler, dynamic=False, fullgraph=True)
        given = {"enable_gqa": True, "kernel_options": dict(options) or None}
        attend = partial(function, self.query, block_mask=mask, **given)

        def attend_to(index: int) -> Tensor:
            return attend(*self.caches[index]).transpose(1, 2)

        return attend_to

    def block_mask(self) -> BlockMask:
        """Return the mask: blocks that all nodes see in full, and blocks that are looked into."""
        room = self.shape.capacity - self.num_slots
        visible = F.pad(self.visible[:, 0], (0, room))  # [batch, nodes, capacity]
        blocks = visible.unflatten(2, (-1, BLOCK))
        is_full = blocks.all(3).all(1)
        is_partial = blocks.any(3).any(1) & ~is_full
        rows = self.shape.nodes * self.module.num_key_value_groups
        tables = [_table(found) for found in (is_partial, is_full)]

        def sees(batch: Tensor, head: Tensor, node: Tensor, slot: Tensor) -> Tensor:  # noqa: ARG001
            return visible[batch, node, slot]

        return BlockMask.from_kv_blocks(
            *tables[0],
            *tables[1],
            BLOCK_SIZE=(max(BLOCK, 1 << (rows - 1).bit_length()), BLOCK),
            mask_mod=sees,
            seq_lengths=(self.shape.nodes, self.shape.capacity),
        )

    def expected(self) -> Tensor:
        """Return what is right for the first buffer, accumulated in float32."""
        return self._tree_attention(self.caches, backend="reference")(0)

    def complaint(self, attend: Attend, expected: Tensor, *, bound: float) -> str | None:
        """Say how far the output of a method is off; None if it is right."""
        error = relative_error(attend(0), expected)
        return None if error <= bound else f"off by {error:.1e} of its norm, expected {bound}"


def _table(found: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of blocks in each row, and their indices before all others."""
    order = found.int().argsort(dim=1, descending=True, stable=True)
    return found.sum(1, dtype=torch.int32)[:, None, None], order.int()[:, None, None]
