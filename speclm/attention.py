"""Hooks tree attention into a Hugging Face model through its own attention interface.

While a tree step is active, the registered function computes attention of the tree's nodes over
the cache with the step's mask; outside it calls the implementation that the model had before. No
modeling code is replaced.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from threading import RLock
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from speclm.cache.tree_cache import TreeCache
from speclm.errors import UnsupportedModelError

_PREFIX = "speclm_"
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


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
        self.windows: set[int | None] = set()  # what layers have asked for
        self._biases: dict[tuple[int | None, torch.dtype], Tensor | None] = {}
        self._masks: dict[int | None, Bool[Tensor, "batch 1 nodes kv_len"] | None] = {}

    def mask(self, window: int | None) -> Bool[Tensor, "batch 1 nodes kv_len"] | None:
        """Return the attention mask of a layer with the given sliding window.

        Args:
            window: Positions that a node sees, itself included, by position and not by slot: two
                siblings are at the same position. None for full attention.

        Returns:
            None when a single node sees all slots: that is a step of plain decoding.
        """
        if window not in self._masks:
            self._masks[window] = self._build(window)
        return self._masks[window]

    def bias(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Return `mask` as the scores to add to attention logits, ``-inf`` where it is False.

        What every layer would otherwise derive from the mask is derived once a step.
        """
        self.windows.add(window)
        key = (window, dtype)
        if key not in self._biases:
            mask = self.mask(window)
            self._biases[key] = (
                None
                if mask is None
                else torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))
            )
        return self._biases[key]

    def _build(self, window: int | None) -> Bool[Tensor, "batch 1 nodes kv_len"] | None:
        cache, visible = self._cache, self._visible
        is_plain = not cache.is_ragged and not cache.has_padding
        fits = window is None or cache.tree_start + self._reach() <= window
        if visible is None:
            if is_plain and fits:
                return None
            visible = self._slot_depths.new_ones(1, 1, cache.num_pending + 1, dtype=torch.bool)
        rows, nodes, _ = visible.shape
        batch = cache.num_padding.shape[0]
        if is_plain and fits:
            if nodes == 1 and cache.num_pending == 0:
                return None
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
            if not name.startswith(_PREFIX):
                config._attn_implementation_internal = _register(name)

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
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        step = _STEP.get()
        bias = None if step is None else step.bias(kwargs.get("sliding_window"), query.dtype)
        if bias is None:
            return _previous_function(previous, module)(
                module, query, key, value, attention_mask, scaling=scaling, **kwargs
            )
        for name in _UNSUPPORTED:
            if kwargs.get(name) is not None:
                raise UnsupportedModelError(
                    f"attention of {type(module).__name__} uses {name}, tree attention computes "
                    "plain softmax attention; the model decodes without trees"
                )
        if query.device.type != "cpu":  # off the CPU a mask and grouped heads exclude fused kernels
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, scale=scaling, enable_gqa=True
        )
        return output.transpose(1, 2).contiguous(), None

    return attend


def _tree_mask(previous: str) -> Callable[..., Tensor | None]:
    def mask(*args: Any, **kwargs: Any) -> Tensor | None:
        if _STEP.get() is not None:
            return None  # the step has its own
        return cast("Tensor | None", ALL_MASK_ATTENTION_FUNCTIONS[previous](*args, **kwargs))

    return mask


def _previous_function(name: str, module: nn.Module) -> AttentionFunction:
    if name == "eager":  # every modeling file has its own
        eager = sys.modules[type(module).__module__].__dict__["eager_attention_forward"]
        return cast("AttentionFunction", eager)
    return cast("AttentionFunction", ALL_ATTENTION_FUNCTIONS[name])
