"""What the nodes of one forward may see, as masks for PyTorch and for kernels."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils._pytree import tree_map

from speclm.cache.tree_cache import TreeCache
from speclm.kernels import pays
from speclm.kernels.inputs import MAX_SLOTS
from speclm.tree.words import pack_words, unpack_words


@dataclass(slots=True)
class _Source:
    """What a mask shares with its copies on other devices.

    Args:
        compute: Returns the mask.
        is_touched: Whether an operation has read the computed mask, and may have changed it.
    """

    compute: Callable[[], Tensor | None]
    is_touched: bool = False


class TreeMask(Tensor):
    """A step's additive mask, which is computed when an operation reads it.

    The kernel only needs the window. Any other operation on the tensor computes the mask and runs
    on it; its result is an ordinary tensor. Moves to another device are the exception.
    """

    window: int | None
    """Window of the layers that the mask is for."""

    _source: _Source

    @classmethod
    def of(
        cls,
        compute: Callable[[], Tensor | None],
        window: int | None,
        *,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Self:
        """Return a mask of the given shape that `compute` computes."""
        return cls._made(_Source(compute), window, shape=shape, dtype=dtype, device=device)

    @property
    def is_touched(self) -> bool:
        """Whether an operation has read the computed mask, which it may have changed."""
        return self._source.is_touched

    def dense(self) -> Tensor:
        """Return the mask as an ordinary tensor."""
        mask = self._source.compute()
        assert mask is not None  # only regular steps have none
        return mask.to(self.device)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return copy.deepcopy(self.dense(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        dense: Any = self.dense().contiguous()
        return dense.__reduce_ex__(protocol)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # a class method

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # as PyTorch calls it
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation on the mask itself."""
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and not args[0].is_touched:
            (mask,) = args
            if kwargs.get("dtype") in {None, mask.dtype} and kwargs.get("device") is not None:
                return cls._made(
                    mask._source,
                    mask.window,
                    shape=tuple(mask.shape),
                    dtype=mask.dtype,
                    device=torch.device(kwargs["device"]),
                )

        def looked_into(value: Any) -> Any:
            if not isinstance(value, cls):
                return value
            value._source.is_touched = True  # a view of it may be written to later
            return value.dense()

        args, kwargs = tree_map(looked_into, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def _made(
        cls,
        source: _Source,
        window: int | None,
        *,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Self:
        mask: Self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        mask.window, mask._source = window, source
        return mask


@dataclass(frozen=True, slots=True)
class KernelMask:
    """The slots that nodes see, as arguments of `speclm.kernels.tree_attention`."""

    prefix_lengths: Int[Tensor, " batch"]
    ancestor_words: Int[Tensor, "rows nodes words"]
    depths: Int[Tensor, "depth_rows slots"]
    prefix_starts: Int[Tensor, " batch"] | None
    tree_starts: Int[Tensor, " batch"] | None

    def to(self, device: torch.device) -> "KernelMask":
        """Return the mask with its tensors on `device`."""
        if self.depths.device == device:
            return self
        moved: dict[str, Any] = {}
        for field in fields(self):
            tensor = getattr(self, field.name)
            moved[field.name] = None if tensor is None else tensor.to(device)
        return replace(self, **moved)


class TreeStep:
    """What the nodes of one forward may see.

    Args:
        visible: True at ``[i, j]`` if new node i sees pending slot j; the last slots are the new
            nodes. None if there are `words`, or for a single new node that sees all.
        slot_depths: Depth of each pending slot and new node.
        cache: Cache that the forward appends to.
        words: `visible` packed into words, if the caller has them.
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
        self.is_regular = has_one and not cache.is_ragged and not cache.has_padding
        """Whether it is a step of regular generation: one node in each row, at its position."""
        self.windows: set[int | None] = set()
        """Windows for which the model has requested masks; None for full attention."""
        self._biases: dict[tuple[int | None, torch.dtype], Tensor | None] = {}
        self._repeated: dict[tuple[int, int], Tensor] = {}
        self._masks: dict[int | None, Bool[Tensor, "batch 1 nodes kv_len"] | None] = {}
        self._kernel_masks: dict[torch.device, KernelMask] = {}

    def mask(self, window: int | None) -> Bool[Tensor, "batch 1 nodes kv_len"] | None:
        """Return the attention mask of a layer with a sliding window; built once for each window.

        Args:
            window: Positions, not slots, that a node sees, itself included: siblings are at the
                same position. None for full attention.

        Returns:
            None in a regular step, for which the model's own mask is right.
        """
        if window not in self._masks:
            self._masks[window] = self._build(window)
        return self._masks[window]

    def bias(
        self, window: int | None, dtype: torch.dtype
    ) -> Float[Tensor, "batch 1 nodes kv_len"] | None:
        """Return `mask` as numbers to add to scores; built once for each window and dtype.

        A hidden slot has the lowest finite number, as in Transformers.
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
        """Return `bias`, as a `TreeMask` if kernels on this device do not need it."""
        device, slots = self._slot_depths.device, self._slot_depths.shape[1]
        if self.is_regular or slots > MAX_SLOTS or not pays(device):
            return self.bias(window, dtype)
        kv_len = self._cache.tree_start + self._cache.num_pending + self._nodes
        shape = (len(self._cache.host_lengths), 1, self._nodes, kv_len)
        return TreeMask.of(
            lambda: self.bias(window, dtype), window, shape=shape, dtype=dtype, device=device
        )

    def kernel_mask(self, device: torch.device) -> KernelMask:
        """Return the mask for kernels on a device; built once for each device."""
        if device not in self._kernel_masks:
            cache = self._cache
            begins = torch.full_like(cache.lengths, cache.tree_start) if cache.is_ragged else None
            words = pack_words(self._visible_slots()) if self._words is None else self._words
            self._kernel_masks[device] = KernelMask(
                prefix_lengths=cache.lengths,
                ancestor_words=words.contiguous(),  # a row's part of what was sent, or of a table
                depths=self._slot_depths.contiguous(),
                prefix_starts=self._prefix_starts(),
                tree_starts=begins,
            ).to(device)
        return self._kernel_masks[device]

    def _prefix_starts(self) -> Int[Tensor, " batch"] | None:
        if not self._cache.has_padding:
            return None
        # A prompt that is read along with a tree is part of that tree, and so is its padding.
        return torch.minimum(self._cache.num_padding, self._cache.lengths)

    def repeated(
        self, bias: Float[Tensor, "batch 1 nodes kv_len"], groups: int
    ) -> Float[Tensor, "batch 1 grouped_nodes kv_len"]:
        """Return a mask repeated along its nodes; built once for the step's own masks."""
        if not any(own is bias for own in self._biases.values()):
            return bias.repeat(1, 1, groups, 1)  # the model has changed it
        key = (id(bias), groups)
        if key not in self._repeated:
            self._repeated[key] = bias.repeat(1, 1, groups, 1)
        return self._repeated[key]

    def _visible_slots(self) -> Bool[Tensor, "rows nodes slots"]:
        if self._visible is not None:
            return self._visible
        if self._words is not None:
            return unpack_words(self._words, num_bits=self._slot_depths.shape[1])
        return self._slot_depths.new_ones(1, 1, self._cache.num_pending + 1, dtype=torch.bool)

    def _build(self, window: int | None) -> Bool[Tensor, "rows 1 nodes kv_len"] | None:
        if self.is_regular:
            return None
        cache, visible = self._cache, self._visible_slots()
        rows, nodes, _ = visible.shape
        batch = cache.num_padding.shape[0]
        max_reach = cache.tree_start + self._slot_depths.shape[1]  # no node is deeper
        fits = window is None or max_reach <= window
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


@runtime_checkable
class Step(Protocol):
    """What attention asks of a step."""

    is_regular: bool
    windows: set[int | None]

    def lazy_bias(self, window: int | None, dtype: torch.dtype, /) -> Tensor | None:
        """Return the additive mask of layers with a window."""
        ...

    def kernel_mask(self, device: torch.device, /) -> KernelMask:
        """Return the mask for kernels on a device."""
        ...

    def repeated(self, bias: Tensor, groups: int, /) -> Tensor:
        """Return a mask repeated along its nodes."""
        ...


_STEP: ContextVar[Step | None] = ContextVar("speclm_tree_step", default=None)


@contextmanager
def tree_step(step: Step) -> Iterator[None]:
    """Make `step` the active tree step."""
    token = _STEP.set(step)
    try:
        yield
    finally:
        _STEP.reset(token)


def active_step() -> Step | None:
    """Return the tree step of the running forward; None outside of one."""
    return _STEP.get()
