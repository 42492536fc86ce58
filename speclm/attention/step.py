"""What the nodes of one forward may see, as masks and as what kernels take."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from speclm.attention.tree_mask import TreeMask
from speclm.cache.tree_cache import TreeCache
from speclm.kernels import pays
from speclm.kernels.inputs import MAX_SLOTS
from speclm.tree.topology import pack_words, unpack_words


@dataclass(frozen=True, slots=True)
class Sight:
    """Which slots nodes see, as `speclm.kernels.tree_attention` takes it."""

    prefix_lengths: Int[Tensor, " batch"]
    ancestor_words: Int[Tensor, "rows nodes words"]
    depths: Int[Tensor, "depth_rows slots"]
    prefix_starts: Int[Tensor, " batch"] | None
    tree_starts: Int[Tensor, " batch"] | None

    def to(self, device: torch.device) -> "Sight":
        """Return it with its tensors on `device`."""
        if self.depths.device == device:
            return self

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return Sight(
            prefix_lengths=self.prefix_lengths.to(device),
            ancestor_words=self.ancestor_words.to(device),
            depths=self.depths.to(device),
            prefix_starts=moved(self.prefix_starts),
            tree_starts=moved(self.tree_starts),
        )


class TreeStep:
    """What the nodes of one forward may see.

    Args:
        visible: True at ``[i, j]`` when new node i sees pending slot j; the last slots are the new
            nodes themselves. None where there are `words`, or for a single new node that sees all.
        slot_depths: Depth of every pending slot and new node.
        cache: Cache that the forward appends to.
        words: `visible` packed into words, where the caller has them.
    """

    def __init__(
        self,
        visible: Bool[Tensor, "rows nodes slots"] | None,
        slot_depths: Int[Tensor, "depth_rows slots"],
        cache: TreeCache,
        *,
        words: Int[Tensor, "rows nodes words"] | None = None,
    ) -> None:
        self._visible = visible
        self._words = words
        self._slot_depths = slot_depths
        self._cache = cache
        given = words if visible is None else visible
        self._nodes = 1 if given is None else given.shape[1]
        has_one = self._nodes + cache.num_pending == 1 or given is None
        self.is_plain = has_one and not cache.is_ragged and not cache.has_padding
        """Whether this is a step of regular generation: one node a row, whose slot is its
        position."""
        self.windows: set[int | None] = set()
        """Windows that the model has asked masks for; None among them for full attention."""
        self._biases: dict[tuple[int | None, torch.dtype], Tensor | None] = {}
        self._repeated: dict[tuple[int, int], Tensor] = {}
        self._masks: dict[int | None, Bool[Tensor, "batch 1 nodes kv_len"] | None] = {}
        self._sights: dict[torch.device, Sight] = {}

    def mask(self, window: int | None) -> Bool[Tensor, "batch 1 nodes kv_len"] | None:
        """Return the attention mask of a layer with the given sliding window.

        Args:
            window: Positions that a node sees, itself included, by position and not by slot: two
                siblings are at the same position. None for full attention.

        Returns:
            None in a step of regular generation, for which the model's own mask is right.
        """
        if window not in self._masks:
            self._masks[window] = self._build(window)
        return self._masks[window]

    def bias(
        self, window: int | None, dtype: torch.dtype
    ) -> Float[Tensor, "batch 1 nodes kv_len"] | None:
        """Return `mask` as scores to add to attention logits, the lowest number where it is False.

        That number is Transformers' own choice: models compute with it, and stay finite. It is
        derived once a step, not in every layer.
        """
        key = (window, dtype)
        if key not in self._biases:
            mask = self.mask(window)
            if mask is None:
                self._biases[key] = None
            else:
                bias = torch.zeros_like(mask, dtype=dtype)
                bias.masked_fill_(~mask, torch.finfo(dtype).min)
                # Models that reshape their mask expect all rows.
                self._biases[key] = bias.expand(len(self._cache.host_lengths), -1, -1, -1)
        return self._biases[key]

    def lazy_bias(
        self, window: int | None, dtype: torch.dtype
    ) -> Float[Tensor, "batch 1 nodes kv_len"] | None:
        """Return `bias`, uncomputed where kernels do without it on this device."""
        device, slots = self._slot_depths.device, self._slot_depths.shape[1]
        if self.is_plain or slots > MAX_SLOTS or not pays(device):
            return self.bias(window, dtype)
        kv_len = self._cache.tree_start + self._cache.num_pending + self._nodes
        shape = (len(self._cache.host_lengths), 1, self._nodes, kv_len)
        return TreeMask.of(
            lambda: self.bias(window, dtype), window, shape=shape, dtype=dtype, device=device
        )

    def sight(self, device: torch.device) -> Sight:
        """Return what says which slots nodes see, on a device; it is put together once a step."""
        if device not in self._sights:
            cache = self._cache
            begins = torch.full_like(cache.lengths, cache.tree_start) if cache.is_ragged else None
            words = self._words
            self._sights[device] = Sight(
                prefix_lengths=cache.lengths,
                ancestor_words=pack_words(self._seen()) if words is None else words,
                depths=self._slot_depths,
                prefix_starts=self._prefix_starts(),
                tree_starts=begins,
            ).to(device)
        return self._sights[device]

    def _prefix_starts(self) -> Int[Tensor, " batch"] | None:
        if not self._cache.has_padding:
            return None
        # Of a prompt that is read along with a tree nothing is a prefix, nor is its padding.
        return torch.minimum(self._cache.num_padding, self._cache.lengths)

    def repeated(
        self, bias: Float[Tensor, "batch 1 nodes kv_len"], groups: int
    ) -> Float[Tensor, "batch 1 grouped_nodes kv_len"]:
        """Return a mask `groups` times behind itself; of the step's own it is derived once."""
        if not any(own is bias for own in self._biases.values()):
            return bias.repeat(1, 1, groups, 1)  # the model has made another of it
        key = (id(bias), groups)
        if key not in self._repeated:
            self._repeated[key] = bias.repeat(1, 1, groups, 1)
        return self._repeated[key]

    def _seen(self) -> Bool[Tensor, "rows nodes slots"]:
        if self._visible is not None:
            return self._visible
        if self._words is not None:
            return unpack_words(self._words, num_bits=self._slot_depths.shape[1])
        return self._slot_depths.new_ones(1, 1, self._cache.num_pending + 1, dtype=torch.bool)

    def _build(self, window: int | None) -> Bool[Tensor, "rows 1 nodes kv_len"] | None:
        if self.is_plain:
            return None
        cache, visible = self._cache, self._seen()
        rows, nodes, _ = visible.shape
        batch = cache.num_padding.shape[0]
        fits = window is None or cache.tree_start + self._reach() <= window
        if fits and not cache.is_ragged and not cache.has_padding:
            prefix = visible.new_ones(1, 1, 1).expand(rows, nodes, cache.tree_start)
            return torch.cat([prefix, visible], dim=2)[:, None]
        lengths = cache.lengths[:, None, None]  # [batch, 1, 1]
        padding = cache.num_padding[:, None, None]
        slots = torch.arange(cache.tree_start, device=visible.device)
        prefix = ((slots >= padding) & (slots < lengths)).expand(batch, nodes, -1)
        if window is not None:
            depths = self._slot_depths[:, -nodes:, None]  # [rows, nodes, 1]
            prefix = prefix & (lengths + depths - slots < window)
            visible = visible & (depths - self._slot_depths[:, None, :] < window)
        return torch.cat([prefix, visible.expand(batch, -1, -1)], dim=2)[:, None]

    def _reach(self) -> int:
        """Positions below the root that a node can be at, at most."""
        return self._slot_depths.shape[1]


_STEP: ContextVar[TreeStep | None] = ContextVar("speclm_tree_step", default=None)


@contextmanager
def tree_step(step: TreeStep) -> Iterator[None]:
    """Make `step` the active tree step."""
    token = _STEP.set(step)
    try:
        yield
    finally:
        _STEP.reset(token)


def active_step() -> TreeStep | None:
    """Return the tree step that the running forward is in; None outside of one."""
    return _STEP.get()
