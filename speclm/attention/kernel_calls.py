"""Has the attention of a layer computed by the tree-attention kernel, where that gives the same."""

import importlib
import logging
from collections.abc import Callable
from functools import cache
from types import CodeType
from typing import Any

from jaxtyping import Float
from torch import Tensor

from speclm.attention.step import TreeStep
from speclm.attention.tree_mask import TreeMask
from speclm.kernels import attention_obstacle, tree_attention

_LIKE_EAGER: dict[str, frozenset[str]] = {
    "llama": frozenset(),
    "gemma2": frozenset({"softcap"}),
    "gpt_oss": frozenset({"s_aux"}),
}
"""Modeling files whose eager attention the kernel computes, and the arguments it goes by.

Most modeling files hold a copy of one of these.
"""
_FUSED = frozenset({"softcap", "s_aux"})
"""Arguments that implementations of other libraries, such as flash attention, go by."""

_log = logging.getLogger("speclm")


def attend_by_kernel(
    mask: TreeMask,
    step: TreeStep,
    states: tuple[
        Float[Tensor, "batch q_heads nodes head_dim"],
        Float[Tensor, "batch kv_heads kv_len head_dim"],
        Float[Tensor, "batch kv_heads kv_len value_dim"],
    ],
    *,
    takes: frozenset[str] | None,
    scaling: float | None,
    extras: dict[str, Any],
) -> Float[Tensor, "batch nodes q_heads head_dim"] | None:
    """Compute a layer's attention.

    Args:
        mask: The step's mask, as it arrived.
        step: The active step.
        states: Queries, keys and values.
        takes: Arguments beyond a softmax that the layer's own function goes by; None for a
            function that is not known.
        scaling: Factor of the scores.
        extras: Arguments beyond a softmax that the layer gives.

    Returns:
        None where the kernel cannot stand in for the layer's own function; the reason is logged
        once.
    """
    query, key, value = states
    obstacle = None
    if takes is None:
        obstacle = "the modeling file computes attention in a way of its own"
    elif extras.keys() - takes:
        obstacle = f"layers pass {', '.join(sorted(extras.keys() - takes))} to attention"
    elif key.shape != value.shape or query.shape[2] != mask.shape[2]:
        obstacle = "keys, values and nodes differ in more than the kernel takes"
    obstacle = obstacle or attention_obstacle(query.device, query.dtype, query.shape[3])
    if obstacle is not None:
        _log_once(obstacle)
        return None
    sight = step.sight(query.device)
    output = tree_attention(
        query,
        key,
        value,
        prefix_lengths=sight.prefix_lengths,
        ancestor_words=sight.ancestor_words,
        depths=sight.depths,
        prefix_starts=sight.prefix_starts,
        tree_starts=sight.tree_starts,
        sinks=extras.get("s_aux"),
        softcap=extras.get("softcap"),
        scale=scaling,
        window=mask.window,
        check_values=False,  # a topology is right, and nothing may wait for the device
    )
    assert isinstance(output, Tensor)  # without the denominator
    return output


def taken_arguments(name: str, function: Callable[..., Any]) -> frozenset[str] | None:
    """Return the arguments beyond a softmax that an attention function goes by; None if unknown.

    Args:
        name: Of the implementation.
        function: The implementation; of ``"eager"`` the modeling file's own.
    """
    if name == "sdpa":
        return frozenset()
    if name != "eager":
        return _FUSED
    return _eager_arguments(function.__code__)


@cache
def _eager_arguments(code: CodeType) -> frozenset[str] | None:
    for family, taken in _LIKE_EAGER.items():
        file = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        known: CodeType = file.eager_attention_forward.__code__
        parts = ("co_code", "co_consts", "co_names", "co_varnames")
        if all(getattr(code, part) == getattr(known, part) for part in parts):
            return taken
    return None


@cache
def _log_once(obstacle: str) -> None:
    _log.info("tree attention is computed without the kernel: %s", obstacle)
