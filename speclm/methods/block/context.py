"""Keys and values of committed tokens, which every block attends to."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from speclm.drafting.decoder_parts import CausalMasks, Rotation
from speclm.methods.block.network import BlockHeads, block_masks

CHUNK = 512
"""Most tokens whose features are projected at once, which bounds the memory for a prompt."""

_LEAST_CAPACITY = 256

Masks = tuple[Tensor | None, ...]
"""For each layer ``[batch or 1, 1, positions, seen]``, as `BlockHeads.forward` takes them."""


class BlockContext:
    """Keys and values that block heads compute from the target's features, for all layers.

    The first ``lengths[b]`` entries of row b belong to its padding and its committed tokens; what
    follows them is never seen. Nothing is stored for draft tokens. The storage doubles when it is
    full.
    """

    def __init__(self, heads: BlockHeads, *, first_positions: list[int]) -> None:
        """Create an empty context.

        Args:
            heads: The network.
            first_positions: For each row the position of its first entry; below 0 by the number of
                padding entries.
        """
        self._heads = heads
        self._first = first_positions
        self.lengths = [0] * len(first_positions)
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._causal = CausalMasks()
        self._copies: dict[tuple[int, ...], Tensor] = {}  # on the device, of numbers of each row

    @property
    def keys(self) -> Float[Tensor, "layers batch kv_heads kv_len head_dim"]:
        """Keys of all layers, up to the end of the longest row."""
        return self._stored(self._keys)

    @property
    def values(self) -> Float[Tensor, "layers batch kv_heads kv_len head_dim"]:
        """Values of all layers, up to the end of the longest row."""
        return self._stored(self._values)

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
            self._reserve(max(self.lengths) + num_new)
            self._write(keys, values)
            self.lengths = [
                length + min(max(count - start, 0), num_new)
                for length, count in zip(self.lengths, counts, strict=True)
            ]

    def with_room(
        self, num: int
    ) -> tuple[
        Float[Tensor, "layers batch kv_heads kv_len head_dim"],
        Float[Tensor, "layers batch kv_heads kv_len head_dim"],
    ]:
        """Return `keys` and `values`, followed by room for `num` positions of a block."""
        longest = max(self.lengths) + num
        self._reserve(longest)
        assert self._keys is not None
        assert self._values is not None
        return self._keys.narrow(3, 0, longest), self._values.narrow(3, 0, longest)

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
            self._copies[key] = torch.tensor(values, device=device, dtype=torch.long)
        return self._copies[key]

    def _stored(self, storage: Tensor | None) -> Tensor:
        if storage is None:  # the anchor is the first token of the text
            return self._heads.fc.weight.new_empty(self._shape(0))
        return storage.narrow(3, 0, max(self.lengths))

    def _shape(self, capacity: int) -> tuple[int, int, int, int, int]:
        config = self._heads.config
        return config.num_layers, len(self.lengths), config.num_kv_heads, capacity, config.head_dim

    def _reserve(self, needed: int) -> None:
        capacity = 0 if self._keys is None else self._keys.shape[3]
        if needed <= capacity:
            return
        weight, before = self._heads.fc.weight, (self._keys, self._values)
        shape = self._shape(max(needed, 2 * capacity, _LEAST_CAPACITY))
        # Zeros, because NaN in entries that a mask hides would spread.
        self._keys, self._values = weight.new_zeros(shape), weight.new_zeros(shape)
        for old, new in zip(before, (self._keys, self._values), strict=True):
            if old is not None:
                new.narrow(3, 0, capacity).copy_(old)

    def _write(self, keys: Tensor, values: Tensor) -> None:
        """Write keys and values after the entries of each row; padding is overwritten later."""
        assert self._keys is not None
        assert self._values is not None
        num_new, first = keys.shape[3], self.lengths[0]
        if len(set(self.lengths)) == 1:
            self._keys.narrow(3, first, num_new).copy_(keys)
            self._values.narrow(3, first, num_new).copy_(values)
            return
        ahead = torch.arange(num_new, device=keys.device)
        entries = self._tensor(self.lengths)[:, None] + ahead  # [batch, seq]
        rows = torch.arange(len(self.lengths), device=keys.device)[:, None]
        keys, values = keys.to(self._keys.dtype), values.to(self._keys.dtype)  # under autocast
        self._keys[:, rows, :, entries] = keys.permute(1, 3, 0, 2, 4)
        self._values[:, rows, :, entries] = values.permute(1, 3, 0, 2, 4)
