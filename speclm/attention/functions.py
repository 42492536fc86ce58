"""The attention and mask functions that replace a model's own during tree steps."""

import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from speclm.attention.kernel_calls import attend_by_kernel, taken_arguments
from speclm.attention.step import TreeMask, active_step
from speclm.errors import UnsupportedModelError

_TAKES_MASK = {"eager", "sdpa"}
"""Implementations that accept any additive mask."""
_IGNORED_ARGUMENTS = {
    "sliding_window",  # part of the mask
    "is_causal",
    "position_ids",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
}
"""Arguments of attention that have no effect if there is a mask; others are the model's own."""

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]
MaskFunction = Callable[..., Tensor | None]


def tree_attention_function(previous: str) -> AttentionFunction:
    """Return an attention function that computes the same as `previous`, and trees."""

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
        step, name = active_step(), previous
        if step is not None and not step.is_regular:
            extras = {
                name: kwargs[name]
                for name in kwargs.keys() - _IGNORED_ARGUMENTS
                if kwargs[name] is not None
            }
            if dropout > 0:
                extras["dropout"] = dropout
            mask = _require_mask(module, attention_mask)
            states = (query, key, value)
            if isinstance(mask, TreeMask) and not mask.is_touched:
                function = previous_function(previous, module)
                takes = taken_arguments(previous, function, query.dtype)
                found = attend_by_kernel(
                    mask, step, states, takes=takes, scaling=scaling, extras=extras
                )
                if found is not None:
                    return found, None
            if isinstance(mask, TreeMask):
                mask = mask.dense()
            if mask.dtype != query.dtype:  # embeddings of another precision
                mask = mask.to(query.dtype)
            if previous not in _TAKES_MASK:
                name = "eager" if extras else "sdpa"
            if name == "sdpa" and not extras:
                repeat = step.repeated
                return grouped_attention(*states, mask, scale=scaling, repeat=repeat), None
            attention_mask = mask
        return previous_function(name, module)(
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


def tree_mask_function(previous: str) -> MaskFunction:
    """Return a mask function that makes the masks of `previous`, and those of trees."""

    def mask(*args: Any, **kwargs: Any) -> Tensor | None:
        step, window = active_step(), kwargs.get("local_size")
        if step is not None:
            step.windows.add(window)
        if step is not None and not step.is_regular:
            _require_window(kwargs.get("mask_function", causal_mask_function), window)
            return step.lazy_bias(window, kwargs.get("dtype", torch.float32))
        if previous not in ALL_MASK_ATTENTION_FUNCTIONS:
            return None  # like Transformers for a name without a mask function
        return cast("Tensor | None", ALL_MASK_ATTENTION_FUNCTIONS[previous](*args, **kwargs))

    return mask


def grouped_attention(
    query: Float[Tensor, "batch q_heads nodes head_dim"],
    key: Float[Tensor, "batch kv_heads kv_len head_dim"],
    value: Float[Tensor, "batch kv_heads kv_len value_dim"],
    mask: Shaped[Tensor, "mask_rows mask_heads nodes kv_len"],
    *,
    scale: float | None,
    repeat: Callable[[Tensor, int], Tensor],
) -> Float[Tensor, "batch nodes q_heads value_dim"]:
    """Compute masked attention with PyTorch, without copies of shared key heads where possible.

    The query heads of a key head become further nodes, with the same mask. With many nodes the
    repeated mask would be larger than the copies of keys and values.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        mask: Additive; one for all heads or one for each.
        scale: Factor of the scores; None for ``head_dim ** -0.5``.
        repeat: Repeats a mask along its nodes; a caller may reuse the result.
    """
    batch, q_heads, nodes, head_dim = query.shape
    kv_heads = key.shape[1]
    groups = q_heads // kv_heads
    if groups > 1 and nodes <= head_dim:
        query = query.reshape(batch, kv_heads, groups * nodes, head_dim)
        if mask.shape[1] == 1:
            mask = repeat(mask, groups)
        else:
            mask = mask.reshape(mask.shape[0], kv_heads, groups * nodes, -1)
    elif query.device.type != "cpu":  # a mask with grouped heads excludes fused kernels there
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
    )
    return output.reshape(batch, q_heads, nodes, -1).transpose(1, 2).contiguous()


def _require_mask(module: nn.Module, mask: Tensor | None) -> Tensor:
    if mask is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} attends without a mask, trees need one that Transformers "
            "makes; the model decodes without trees"
        )
    return mask


def _require_window(mask_function: Callable[..., Any], window: int | None) -> None:
    """Check that a model asks for causal attention, full or in a sliding window."""
    expected = (
        causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    )
    if not _is_same(mask_function, expected):
        name = getattr(mask_function, "__qualname__", repr(mask_function))
        raise UnsupportedModelError(
            f"the model asks for a mask by {name}, "
            "trees need causal attention, full or in a sliding window; it decodes without trees"
        )


def _is_same(left: object, right: object) -> bool:
    """Return whether two functions are the same code over the same captured values."""
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


def previous_function(name: str, module: nn.Module) -> AttentionFunction:
    """Return the attention function of a name, for ``"eager"`` that of the modeling file."""
    if name != "eager":
        return cast("AttentionFunction", ALL_ATTENTION_FUNCTIONS[name])
    for kind in type(module).__mro__:  # every modeling file has its own
        eager = vars(sys.modules[kind.__module__]).get("eager_attention_forward")
        if eager is not None:
            return cast("AttentionFunction", eager)
    raise UnsupportedModelError(
        f"no eager_attention_forward next to {type(module).__name__}; load the model with "
        'attn_implementation="sdpa"'
    )
