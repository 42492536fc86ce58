"""Keys and values of committed tokens, which every block attends to."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from speclm.devices import upload
from speclm.drafting.decoder_parts import CausalMasks, Rotation
from speclm.methods.block.network import BlockHeads, block_masks

CHUNK = 512
"""Most tokens whose features are projected at once, which bounds the memory for a prompt."""

_LEAST_CAPACITY = 256

Allocate = Callable[[Tensor, tuple[int, ...]], Tensor]
"""Returns zeros of a shape, with dtype and device of a tensor."""

Masks = tuple[Tensor | None, ...]
"""For each layer ``[batch or 1, 1, positions, seen]``, as `BlockHeads.forward` takes them."""


class BlockContext:
    """Keys and values that block heads compute from the target's features, for all layers.

    The first ``lengths[b]`` entries of row b belong to its padding and its committed tokens; what
    follows them is never seen. Nothing is stored for draft tokens. The storage doubles when it is
    full.
    """

    def __init__(
        self,
        heads: BlockHeads,
        *,
        first_positions: list[int],
        allocate: Allocate | None = None,
    ) -> None:
        """Create an empty context.

        Args:
            heads: The network.
            first_positions: For each row the position of its first entry; below 0 by the number of
                padding entries.
            allocate: Returns the storage; None for new memory.
        """
        self._heads = heads
        self.first_positions = self._first = first_positions
        self._allocate = allocate or Tensor.new_zeros
        self.lengths = [0] * len(first_positions)
        self._storage: Tensor | None = None  # keys and values
        self._causal = CausalMasks()
        self._copies: dict[tuple[int, ...], Tensor] = {}  # on the device, of numbers of each row

    @property
    def keys(self) -> Float[Tensor, "layers batch kv_heads kv_len head_dim"]:
        """Keys of all layers, up to the end of the longest row."""
        return self._stored(0)

    @property
    def values(self) -> Float[Tensor, "layers batch kv_heads kv_len head_dim"]:
        """Values of all layers, up to the end of the longest row."""
        return self._stored(1)

    def append(self, features: Float[Tensor, "batch seq features"], counts: list[int]) -> None:
        """Project the features of committed tokens and keep the keys and values.

        Args:
            features: The target's features; rows with fewer tokens end in padding.
            counts: Number of tokens of each row.
        """
        for start in range(0, features.shape[1], CHUNK):
            num_new = min(features.shape[1] - start, CHUNK)
            part = features
            if num_new < features.shape[1]:
                part = features.narrow(1, start, num_new)
            keys, values = self._heads.context(part, self.rotation(num_new))
            self.reserve(num_new)
            self._write(keys, values)
            self.advance([min(max(count - start, 0), num_new) for count in counts])

    def advance(self, counts: Sequence[int]) -> None:
        """Count entries of each row that were written to `storage`."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    @property
    def storage(self) -> Float[Tensor, "2 layers batch kv_heads capacity head_dim"]:
        """Keys and values of all layers, with room after them."""
        assert self._storage is not None, "reserve before storage"
        return self._storage

    def with_room(
        self, num: int
    ) -> tuple[
        Float[Tensor, "layers batch kv_heads kv_len head_dim"],
        Float[Tensor, "layers batch kv_heads kv_len head_dim"],
    ]:
        """Return `keys` and `values`, followed by room for `num` positions of a block."""
        self.reserve(num)
        keys, values = self.storage.narrow(4, 0, max(self.lengths) + num).unbind(0)
        return keys, values

    def rotation(self, num: int) -> Rotation:
        """Return the rotation of the next positions of each row."""
        starts = self._anchors()
        if starts[0] >= 0 and len(set(starts)) == 1:
            return self._heads.rotation_from(starts[0], num)
        ahead = torch.arange(num, device=self._heads.fc.weight.device)
        return self._heads.rotation((self._starts()[:, None] + ahead).clamp_(min=0))

    def masks(self, num_positions: int) -> Masks:
        """Return for each layer what the positions of a block see, the context first.

        Args:
            num_positions: Positions of the block, the anchor's included.
        """
        config, longest = self._heads.config, max(self.lengths)
        weight = self._heads.fc.weight
        is_whole = min(self.lengths) == longest and min(self._first) >= 0
        reach = longest + num_positions
        if is_whole and all(window is None or reach <= window for window in config.windows):
            mask = None
            if any(config.is_causal):
                mask = self._causal.cut(num_positions, num_cached=longest, like=weight)
            return tuple(mask if is_causal else None for is_causal in config.is_causal)
        entries = torch.arange(longest, device=weight.device)
        context_positions = entries + self._tensor(self._first)[:, None]  # [batch, kv_len]
        is_seen = (context_positions >= 0) & (entries < self._tensor(self.lengths)[:, None])
        return block_masks(
            config,
            is_seen[:, None],
            context_positions=context_positions,
            anchors=self._starts()[:, None],
            num_positions=num_positions,
        )

    def _anchors(self) -> list[int]:
        """Return the position after the last token of each row."""
        return [first + length for first, length in zip(self._first, self.lengths, strict=True)]

    def _starts(self) -> Int[Tensor, " batch"]:
        """Return `_anchors` on the device."""
        return self._tensor(self._first) + self._tensor(self.lengths)

    def _tensor(self, values: list[int]) -> Int[Tensor, " batch"]:
        """Return numbers of each row on the device, copied once for as long as they stay."""
        key, device = tuple(values), self._heads.fc.weight.device
        if key not in self._copies:
            kept = tuple(self._first)
            self._copies = {k: copy for k, copy in self._copies.items() if k == kept}
            self._copies[key] = upload(values, device)
        return self._copies[key]

    def _stored(self, part: int) -> Tensor:
        if self._storage is None:  # the anchor is the first token of the text
            return self._heads.fc.weight.new_empty(self._shape(0)[1:])
        return self._storage[part].narrow(3, 0, max(self.lengths))

    def _shape(self, capacity: int) -> tuple[int, ...]:
        config, batch = self._heads.config, len(self.lengths)
        return 2, config.num_layers, batch, config.num_kv_heads, capacity, config.head_dim

    def reserve(self, num: int) -> None:
        """Make room for some entries after the longest row; the storage may become another."""
        needed = max(self.lengths) + num
        before = self._storage
        capacity = 0 if before is None else before.shape[4]
        if needed <= capacity:
            return
        # Few sizes, because stages are prepared for each.
        doublings = max(-(-needed // _LEAST_CAPACITY) - 1, 0).bit_length()
        shape = self._shape(_LEAST_CAPACITY << doublings)
        # Zeros, because NaN in entries that a mask hides would spread.
        self._storage = self._allocate(self._heads.fc.weight, shape)
        if before is not None:
            self._storage.narrow(4, 0, capacity).copy_(before)

    def _write(self, keys: Tensor, values: Tensor) -> None:
        """Write keys and values after the entries of each row; padding is overwritten later."""
        num_new, first = keys.shape[3], self.lengths[0]
        if len(set(self.lengths)) == 1:
            to_keys, to_values = self.storage.narrow(4, first, num_new).unbind(0)
            to_keys.copy_(keys)
            to_values.copy_(values)
            return
        ahead = torch.arange(num_new, device=keys.device)
        entries = self._tensor(self.lengths)[:, None] + ahead  # [batch, seq]
        rows = torch.arange(len(self.lengths), device=keys.device)[:, None]
        for stored, new in zip(self.storage.unbind(0), (keys, values), strict=True):
            # Under autocast the dtypes differ.
            stored[:, rows, :, entries] = new.to(stored.dtype).permute(1, 3, 0, 2, 4)
