"""Hooks tree attention into a Hugging Face model through its own attention and mask interfaces.

While a tree step is active, the mask that a model asks Transformers for is the step's own, for the
window that is asked for. The model's attention then computes with the mask that it is given, and so
does what a model does to its mask before. Outside a step all is as it was. No modeling code is
replaced.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from threading import RLock
from types import FunctionType
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from speclm.cache.tree_cache import TreeCache
from speclm.errors import UnsupportedModelError

_PREFIX = "speclm_"
_TAKES_MASK = {"eager", "sdpa"}
"""Implementations that compute with any additive mask."""
_PLAIN = {
    "sliding_window",  # stands in the mask
    "is_causal",
    "position_ids",
    "use_cache",
    "output_attentions",
    "output_router_logits",
}
"""Arguments of attention that change nothing beside a mask. Any other is the model's own."""

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]
MaskFunction = Callable[..., Tensor | None]


class TreeStep:
    """What the nodes of one forward may see.

    Args:
        visible: True at ``[i, j]`` when new node i sees pending slot j; the last slots are the new
            nodes themselves. None for a single new node that sees all.
        slot_depths: Depth of every pending slot and new node.
        cache: Cache that the forward appends to.
    """

    def __init__(
        self,
        visible: Bool[Tensor, "rows nodes slots"] | None,
        slot_depths: Int[Tensor, "depth_rows slots"],
        cache: TreeCache,
    ) -> None:
        self._visible = visible
        self._slot_depths = slot_depths
        self._cache = cache
        has_one = visible is None or visible.shape[1] + cache.num_pending == 1
        self.is_plain = has_one and not cache.is_ragged and not cache.has_padding
        """Whether this is a step of plain decoding: one node a row, whose slot is its position."""
        self.windows: set[int | None] = set()
        """Windows that the model has asked masks for; None among them for full attention."""
        self._biases: dict[tuple[int | None, torch.dtype], Tensor | None] = {}
        self._repeated: dict[tuple[int, int], Tensor] = {}
        self._masks: dict[int | None, Bool[Tensor, "batch 1 nodes kv_len"] | None] = {}

    def mask(self, window: int | None) -> Bool[Tensor, "batch 1 nodes kv_len"] | None:
        """Return the attention mask of a layer with the given sliding window.

        Args:
            window: Positions that a node sees, itself included, by position and not by slot: two
                siblings are at the same position. None for full attention.

        Returns:
            None in a step of plain decoding, for which the model's own mask is right.
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

    def _build(self, window: int | None) -> Bool[Tensor, "rows 1 nodes kv_len"] | None:
        if self.is_plain:
            return None
        cache, visible = self._cache, self._visible
        if visible is None:
            visible = self._slot_depths.new_ones(1, 1, cache.num_pending + 1, dtype=torch.bool)
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


@contextmanager
def attached(configs: Sequence[PretrainedConfig]) -> Iterator[None]:
    """Route the attention of models with these configs through this module, then restore it.

    Models may share a config, and run in several threads: it is restored behind the last of them.
    What a thread without a tree step runs meanwhile computes what it always does.
    """
    user = object()
    try:
        for config in configs:
            _ATTACHMENTS.add(config, user)
        yield
    finally:
        for config in configs:
            _ATTACHMENTS.remove(config, user)


@dataclass(slots=True)
class _Attachment:
    """A config that is attached.

    Args:
        config: Kept here so that its id is no other's.
        implementation: What it named before.
        users: One object for each forward that needs it.
    """

    config: PretrainedConfig
    implementation: str
    users: set[object] = field(default_factory=set)


class _Attachments:
    """The configs that are attached, by id."""

    def __init__(self) -> None:
        # The collector may close a forward that was abandoned while this thread holds it.
        self._lock = RLock()
        self._found: dict[int, _Attachment] = {}

    def add(self, config: PretrainedConfig, user: object) -> None:
        with self._lock:
            name = config._attn_implementation
            attachment = self._found.setdefault(id(config), _Attachment(config, name))
            attachment.users.add(user)
            if not isinstance(name, _Name):
                config._attn_implementation_internal = _Name(name)

    def remove(self, config: PretrainedConfig, user: object) -> None:
        """Restore the config if nobody else uses it; of no effect for one that was not added."""
        with self._lock:
            attachment = self._found.get(id(config))
            if attachment is None:
                return
            attachment.users.discard(user)
            if not attachment.users:
                config._attn_implementation_internal = attachment.implementation
                del self._found[id(config)]


_ATTACHMENTS = _Attachments()


def attention_configs(model: nn.Module) -> list[PretrainedConfig]:
    """Return the distinct configs of a model's modules."""
    found = {
        id(config): config
        for module in model.modules()
        if isinstance(config := getattr(module, "config", None), PretrainedConfig)
    }
    return list(found.values())


class _Name(str):
    """Name under which tree attention stands in Transformers' registries.

    Some modeling files compare the name of their implementation with a word, and then compute
    attention themselves. In such a comparison it equals the name it stands for, so that they do
    what they always do; a registry finds it by its text.
    """

    __slots__ = ("previous",)
    previous: str

    def __new__(cls, previous: str) -> Self:
        """Register tree attention on top of `previous` and return its name."""
        name = super().__new__(cls, _register(previous))
        name.previous = previous
        return name

    def __getnewargs__(self) -> tuple[str]:
        """Let copies of a config be made while it is attached."""
        return (self.previous,)

    def __eq__(self, other: object) -> bool:
        """Tell whether `other` is the same text, or the name that this stands for."""
        return str.__eq__(self, other) is True or self.previous == other

    def __ne__(self, other: object) -> bool:
        """Tell the opposite."""
        return not self == other

    __hash__ = str.__hash__  # of its text: no registry takes it for `previous`


@cache  # asked for at every forward
def _register(previous: str) -> str:
    """Register tree attention on top of `previous` and return its name."""
    name = _PREFIX + previous
    AttentionInterface.register(name, _tree_attention(previous))
    AttentionMaskInterface.register(name, _tree_mask(previous))
    return name


def _tree_attention(previous: str) -> AttentionFunction:
    def attend(
        module: nn.Module,
        query: Float[Tensor, "batch q_heads nodes head_dim"],
        key: Float[Tensor, "batch kv_heads kv_len head_dim"],
        value: Float[Tensor, "batch kv_heads kv_len value_dim"],
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        step = _STEP.get()
        is_own = dropout > 0 or any(kwargs[name] is not None for name in kwargs.keys() - _PLAIN)
        name = previous
        if step is not None and not step.is_plain:
            if attention_mask is None:
                raise UnsupportedModelError(
                    f"{type(module).__name__} attends without a mask, trees need one that "
                    "Transformers makes; the model decodes without trees"
                )
            if attention_mask.dtype != query.dtype:  # embeddings of another precision
                attention_mask = attention_mask.to(query.dtype)
            if previous not in _TAKES_MASK:
                name = "eager" if is_own else "sdpa"
            if name == "sdpa" and not is_own:
                return _attend(query, key, value, attention_mask, scaling, step), None
        return _previous_function(name, module)(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            dropout=dropout,
            **kwargs,
        )

    return attend


def _attend(
    query: Float[Tensor, "batch q_heads nodes head_dim"],
    key: Float[Tensor, "batch kv_heads kv_len head_dim"],
    value: Float[Tensor, "batch kv_heads kv_len value_dim"],
    bias: Float[Tensor, "batch mask_heads nodes kv_len"],
    scaling: float | None,
    step: TreeStep,
) -> Float[Tensor, "batch nodes q_heads value_dim"]:
    """Compute what Transformers' SDPA computes, as far as possible without copies of shared heads.

    The query heads that share a key head are laid behind each other as nodes, which then share its
    mask, too. With many nodes that mask would be larger than the keys and values.
    """
    batch, q_heads, nodes, head_dim = query.shape
    kv_heads = key.shape[1]
    groups = q_heads // kv_heads
    if groups > 1 and nodes <= head_dim:
        query = query.reshape(batch, kv_heads, groups * nodes, head_dim)
        if bias.shape[1] == 1:
            bias = step.repeated(bias, groups)
        else:
            bias = bias.reshape(bias.shape[0], kv_heads, groups * nodes, -1)
    elif query.device.type != "cpu":  # there a mask and grouped heads exclude fused kernels
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, scale=scaling, enable_gqa=True
    )
    return output.reshape(batch, q_heads, nodes, -1).transpose(1, 2).contiguous()


def _tree_mask(previous: str) -> MaskFunction:
    def mask(*args: Any, **kwargs: Any) -> Tensor | None:
        step, window = _STEP.get(), kwargs.get("local_size")
        if step is not None:
            step.windows.add(window)
        if step is not None and not step.is_plain:
            _require_window(kwargs.get("mask_function", causal_mask_function), window)
            return step.bias(window, kwargs.get("dtype", torch.float32))
        if previous not in ALL_MASK_ATTENTION_FUNCTIONS:
            return None  # as Transformers does for a name without a mask function
        return cast("Tensor | None", ALL_MASK_ATTENTION_FUNCTIONS[previous](*args, **kwargs))

    return mask


def _require_window(mask_function: Callable[..., Any], window: int | None) -> None:
    """Check that what a model asks for is causal attention, in full or in a sliding window."""
    expected = (
        causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    )
    if not _is_same(mask_function, expected):
        name = getattr(mask_function, "__qualname__", repr(mask_function))
        raise UnsupportedModelError(
            f"the model asks for a mask by {name}, "
            "trees need causal attention, in full or in a sliding window; it decodes without trees"
        )


def _is_same(left: object, right: object) -> bool:
    """Tell whether two functions are the same code over the same captured values."""
    if isinstance(left, tuple) and isinstance(right, tuple):
        return len(left) == len(right) and all(map(_is_same, left, right))
    if not isinstance(left, FunctionType) or not isinstance(right, FunctionType):
        return type(left) is type(right) is int and left == right
    if left.__code__ is not right.__code__:
        return False
    captured = [
        tuple(cell.cell_contents for cell in side.__closure__ or ()) for side in (left, right)
    ]
    return _is_same(*captured)


def _previous_function(name: str, module: nn.Module) -> AttentionFunction:
    if name != "eager":
        return cast("AttentionFunction", ALL_ATTENTION_FUNCTIONS[name])
    for kind in type(module).__mro__:  # every modeling file has its own
        eager = vars(sys.modules[kind.__module__]).get("eager_attention_forward")
        if eager is not None:
            return cast("AttentionFunction", eager)
    raise UnsupportedModelError(
        f"no eager_attention_forward beside {type(module).__name__}; load the model with "
        'attn_implementation="sdpa"'
    )
