"""The key/value cache: its last slots hold a tree, of which one path is kept."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from speclm.devices import upload
from speclm.errors import CacheError
from speclm.kernels import keep_path_, pays

BLOCK = 256
"""The storage grows by this many slots: few rounds copy it, and little memory is unused."""


Allocate = Callable[[Tensor, tuple[int, ...]], Tensor]
"""Returns storage of a shape, with the type and device of a tensor."""


class TreeCache(Cache):
    """Keys and values of every layer, with a length per row.

    Slots ``[0, lengths[b])`` of row b hold its prompt (with its left padding) and its committed
    tokens. Tree nodes are appended for all rows at slot `tree_start`, the longest length. They are
    pending until `keep` moves each row's path to the end of that row and drops the other nodes.
    Slots between a row's length and `tree_start` must be masked. `lengths` is on the device of
    `num_padding`, `host_lengths` on the host. `position_shift`, if any, is the difference between
    positions of new tokens and their slots without padding; it has leading axes if a model has
    several positions per token.

    The storage grows in blocks, and is never allocated in advance for the longest possible
    sequence. Layers of equal shape share one tensor, so that `keep` moves them in one operation.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_padding: Int[Tensor, " batch"],
        allocate: Allocate | None = None,
    ) -> None:
        """Create an empty cache.

        Args:
            num_layers: Layers of the model that keep keys and values.
            num_padding: Padding slots at the start of each row.
            allocate: Returns the storage; with it, capacity doubles whenever it is full, so that
                few shapes occur.
        """
        self._allocate = allocate
        self._rows: list[TreeLayer] = [TreeLayer(self) for _ in range(num_layers)]
        super().__init__(layers=list(self._rows))
        self.num_padding = num_padding
        self.position_shift: Int[Tensor, "*axes batch"] | None = None
        self.has_padding = bool(num_padding.any())  # once a generation, before the first forward
        self.tree_start = 0
        self.num_pending = 0
        self.capacity = 0
        self._lengths = [0] * num_padding.shape[0]
        self.lengths: Int[Tensor, " batch"] = torch.zeros_like(num_padding)
        self._arenas: list[tuple[Tensor, bool]] = []  # and whether a kernel moves its slots

    @property
    def host_lengths(self) -> list[int]:
        """Committed slots of each row, padding included, on the host."""
        return self._lengths

    @property
    def is_ragged(self) -> bool:
        """Whether a row is shorter than another, so that slots below `tree_start` are unused."""
        return any(length != self.tree_start for length in self._lengths)

    @property
    def storage(self) -> Float[Tensor, "keys_and_values batch kv_heads capacity head_dim"] | None:
        """Keys and values of each layer in turn; None if layers differ, or nothing was written."""
        arena = self._arenas[0][0] if len(self._arenas) == 1 else None
        return None if arena is None or len(arena) != 2 * len(self._rows) else arena

    def load(
        self,
        states: Sequence[tuple[Tensor | None, Tensor | None]],
        *,
        length: int,
        room: int = 0,
    ) -> None:
        """Commit copies of keys and values to the empty cache, as a prefix of every row.

        Args:
            states: Keys and values of the first layers, ``[batch, kv_heads, stored, head_dim]``:
                the last `stored` of the `length` slots. The slots before them are set to zero,
                which stays finite under a mask. None for a layer that reads another one's.
            length: Slots of the prefix, left padding included.
            room: Further slots to reserve for the next forwards.
        """
        for layer, (keys, values) in zip(self._rows, states, strict=False):
            if keys is not None and values is not None:
                layer.lazy_initialization(keys, values)
        self._set_lengths([length] * len(self._lengths))
        self._grow(length + room)

    def commit_prompt(self) -> None:
        """Commit the slots that the prefill wrote."""
        self.split(self._rows[0].get_seq_length(), num_pending=0)

    def split(self, length: int, *, num_pending: int) -> None:
        """Commit the first `length` slots of every row and leave the next ones pending."""
        self._set_lengths([length] * len(self._lengths))
        self.num_pending = num_pending
        if self.capacity == 0:
            self._grow(length + num_pending)

    def reserve(self, num_slots: int) -> None:
        """Make room for `num_slots` more pending nodes; copies only when a block is full."""
        needed = self.tree_start + self.num_pending + num_slots
        if needed > self.capacity > 0:  # the first forward writes the storage
            self._grow(needed)

    def append(self, num_slots: int) -> None:
        """Count the nodes that a forward has just written as pending.

        Raises:
            CacheError: If a first forward wrote more or fewer.
        """
        self.num_pending += num_slots
        if self.capacity == 0:
            written = {layer.keys.shape[2] for layer in self._rows if layer.keys is not None}
            if not written <= {self.num_pending}:
                raise CacheError(
                    f"a forward over {self.num_pending} tokens wrote {max(written)} slots, "
                    "expected one for each token, as masks and positions count them; images "
                    "next to the text are decoded with .base.generate"
                )
            self._grow(self.num_pending)

    @property
    def arenas(self) -> list[Float[Tensor, "layers batch kv_heads capacity head_dim"]]:
        """The storage: keys and values of all layers, in as few tensors as possible."""
        return [arena for arena, _ in self._arenas]

    def parts(self) -> list[Tensor]:
        """Return keys and values of each layer that has them, ``capacity`` slots long."""
        return [
            part
            for layer in self._rows
            if layer.keys is not None and layer.values is not None
            for part in (layer.keys, layer.values)
        ]

    def keep(
        self,
        paths: Sequence[Sequence[int]],
        *,
        device_paths: Int[Tensor, "batch path"] | None = None,
        have_moved: bool = False,
    ) -> None:
        """Commit the pending nodes on each row's path and drop all others.

        Args:
            paths: For each row the pending slots to keep, counted from `tree_start`, ascending;
                empty for a row that does not change.
            device_paths: The same on the device, short ones padded with -1, with anything after the
                longest one; None to send them there.
            have_moved: Whether the nodes are at the end of their row already.
        """
        moves = not have_moved and [
            (row, self.tree_start + slot, length + offset)
            for row, (length, path) in enumerate(zip(self._lengths, paths, strict=True))
            for offset, slot in enumerate(path)
            if self.tree_start + slot != length + offset
        ]
        if moves:
            for arena, has_kernel in self._arenas:
                if has_kernel:
                    self._move_in_one_launch(arena, paths, device_paths)
                else:
                    self._move(arena, moves, device_paths)
        lengths = [length + len(path) for length, path in zip(self._lengths, paths, strict=True)]
        if device_paths is None:
            self._set_lengths(lengths)
        else:
            added = set(map(len, paths))
            is_kept = device_paths[:, : max(added)] >= 0 if len(added) > 1 else None
            counts = added.pop() if is_kept is None else is_kept.sum(1)
            self._set_lengths(lengths, on_device=self.lengths + counts)

    def crop(self, max_length: int) -> None:
        """Drop the last slots, as Transformers' caches do.

        Args:
            max_length: Length to keep, or, when negative, the number of slots to drop from every
                row. Pending nodes are dropped in any case.
        """
        bounds = [
            max(length + max_length, 0) if max_length < 0 else max_length
            for length in self._lengths
        ]
        self._set_lengths([min(pair) for pair in zip(self._lengths, bounds, strict=True)])

    def _set_lengths(self, lengths: list[int], *, on_device: Tensor | None = None) -> None:
        self._lengths = lengths
        if on_device is None:
            on_device = upload(lengths, self.num_padding.device)
        self.lengths = on_device
        self.tree_start = max(lengths)
        self.num_pending = 0

    def _grow(self, needed: int) -> None:
        num_blocks = -(-(needed + BLOCK // 2) // BLOCK)
        if self._allocate is not None:
            num_blocks = 1 << (num_blocks - 1).bit_length()
        capacity = num_blocks * BLOCK
        used = self.tree_start + self.num_pending
        groups: dict[tuple[object, ...], list[TreeLayer]] = {}
        for layer in self._rows:
            if layer.keys is not None:
                groups.setdefault(layer.signature(), []).append(layer)
        if not groups:
            return  # nothing has been written
        allocate = self._allocate or Tensor.new_empty
        arenas = [_build_arena(layers, used, capacity, allocate) for layers in groups.values()]
        self._arenas = [(arena, pays(arena.device)) for arena in arenas]
        self.capacity = capacity

    def _move(
        self, arena: Tensor, moves: list[tuple[int, int, int]], device_paths: Tensor | None
    ) -> None:
        if len(self._lengths) > 1:
            rows, sources, targets = upload(moves, arena.device).T
            arena[:, rows, :, targets] = arena[:, rows, :, sources]
            return
        first, past = moves[0][2], moves[-1][2] + 1
        if device_paths is None:
            indices = upload([source for _, source, _ in moves], arena.device)
        else:
            start = self._lengths[0]
            indices = device_paths[0, first - start : past - start] + self.tree_start
        arena[..., first:past, :] = arena.index_select(-2, indices)

    def _move_in_one_launch(
        self, arena: Tensor, paths: Sequence[Sequence[int]], device_paths: Tensor | None
    ) -> None:
        longest = max(map(len, paths))
        if device_paths is None:
            padded = [[*path, *[-1] * (longest - len(path))] for path in paths]
            device_paths = upload(padded, arena.device)
        device_paths = device_paths[:, :longest].to(arena.device)
        starts = None
        if self.is_ragged:
            starts = torch.full_like(self.lengths, self.tree_start)
        keep_path_(
            arena,
            device_paths,
            prefix_lengths=self.lengths.to(arena.device),
            tree_starts=None if starts is None else starts.to(arena.device),
            check_values=False,
        )


class TreeLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # its __init_subclass__
    """One layer of a `TreeCache`."""

    is_compileable = False  # a growing cache, with which regular generation prefills the same way
    is_croppable = True
    is_sliding = False

    def __init__(self, owner: TreeCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Transformers'
        self._owner = owner

    def lazy_initialization(
        self,
        key_states: Float[Tensor, "batch kv_heads seq head_dim"],
        value_states: Float[Tensor, "batch kv_heads seq value_dim"],
    ) -> None:
        """Hold the prompt's keys and values until the cache builds its storage."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states, value_states
        self.is_initialized = True

    def update(
        self,
        key_states: Float[Tensor, "batch kv_heads seq head_dim"],
        value_states: Float[Tensor, "batch kv_heads seq value_dim"],
        *args: Any,  # noqa: ARG002 - of other cache types
        **kwargs: Any,  # noqa: ARG002
    ) -> tuple[
        Float[Tensor, "batch kv_heads kv_len head_dim"],
        Float[Tensor, "batch kv_heads kv_len value_dim"],
    ]:
        """Append keys and values and return all of them."""
        if self.keys is None or self.values is None:
            if self._owner.tree_start > 0:
                raise CacheError(
                    f"cache holds {self._owner.tree_start} slots and none of a layer that the "
                    "model writes to; pass a cache that this model made"
                )
            self.lazy_initialization(key_states, value_states)
            return key_states, value_states
        first, added = self._owner.tree_start + self._owner.num_pending, key_states.shape[2]
        past = first + added
        if past > self._owner.capacity:
            raise CacheError(
                f"cache has room for {self._owner.capacity} slots, a forward wrote slot {past}; "
                "decode through speclm, or pass a DynamicCache to the model itself"
            )
        if key_states.dtype != self.keys.dtype or key_states.shape[:2] != self.keys.shape[:2]:
            raise CacheError(  # copying would round, or repeat a row or head
                f"cache holds {self.keys.dtype} for {tuple(self.keys.shape[:2])} rows and heads, "
                f"the model wrote {key_states.dtype} for {tuple(key_states.shape[:2])}; pass a "
                "cache that this model made for these rows"
            )
        self.keys.narrow(2, first, added).copy_(key_states)
        self.values.narrow(2, first, added).copy_(value_states)
        return self.keys.narrow(2, 0, past), self.values.narrow(2, 0, past)

    def get_seq_length(self) -> int:
        """Return the slots in use, pending nodes included."""
        if self.keys is None:
            return 0
        if self._owner.capacity == 0:
            return self.keys.shape[2]
        return self._owner.tree_start + self._owner.num_pending

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the key/value length and offset that a mask has to cover."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: the layer grows as needed."""
        return -1

    def signature(self) -> tuple[object, ...]:
        """Return the properties that layers must share to share storage."""
        if self.keys is None or self.values is None:
            return (None,)
        keys, values = self.keys, self.values
        return (keys.shape[:2], keys.shape[3], values.shape[3], keys.dtype, keys.device)

    def adopt(self, keys: Tensor, values: Tensor, *, used: int) -> None:
        """Copy the first `used` slots into the given storage; the first ones may be absent."""
        if self.keys is not None and self.values is not None:
            first = max(used - self.keys.shape[2], 0)
            for storage, stored in ((keys, self.keys), (values, self.values)):
                storage[:, :, :first] = 0
                storage[:, :, first:used] = stored[:, :, : used - first]
            self.keys, self.values = keys, values


def _build_arena(
    layers: list[TreeLayer],
    used: int,
    capacity: int,
    allocate: Allocate,
) -> Tensor:
    """Give layers of one signature a common storage of `capacity` slots.

    Returns:
        The storage, ``[2 * layers, batch, kv_heads, capacity, head_dim]``, when keys and values
        are equally wide; otherwise the two are concatenated along the last axis.
    """
    keys, values = layers[0].keys, layers[0].values
    assert keys is not None
    assert values is not None
    batch, heads, _, key_dim = keys.shape
    value_dim = values.shape[3]
    if key_dim == value_dim:
        arena = allocate(keys, (2 * len(layers), batch, heads, capacity, key_dim))
        for index, layer in enumerate(layers):
            layer.adopt(arena[2 * index], arena[2 * index + 1], used=used)
    else:
        arena = allocate(keys, (len(layers), batch, heads, capacity, key_dim + value_dim))
        for index, layer in enumerate(layers):
            layer.adopt(arena[index, ..., :key_dim], arena[index, ..., key_dim:], used=used)
    return arena
