"""Compute a layer's attention with the tree-attention kernel, where the result is the same."""

import importlib.util
import logging
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from speclm.attention.step import Step, TreeMask
from speclm.kernels import attention_obstacle, tree_attention

_LIKE_EAGER: dict[str, frozenset[str]] = {
    "llama": frozenset(),
    "gemma2": frozenset({"softcap"}),
    "gpt_oss": frozenset({"s_aux"}),
}
"""Modeling files whose eager attention the kernel can compute, and the extra arguments it uses.

Most modeling files hold a copy of one of these.
"""
_FUSED = frozenset({"softcap", "s_aux"})
"""Extra arguments that implementations of other libraries, such as flash attention, use."""

_log = logging.getLogger("speclm")


def attend_by_kernel(
    mask: TreeMask,
    step: Step,
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
        mask: The step's mask, as the layer received it.
        step: The active step.
        states: Queries, keys and values.
        takes: Extra arguments that the layer's own function uses; None for an unknown function.
        scaling: Factor of the scores.
        extras: Extra arguments that the layer passes.

    Returns:
        None if the kernel cannot replace the layer's own function; the reason is logged once.
    """
    query, key, value = states
    obstacle = _obstacle(mask, states, takes=takes, scaling=scaling, extras=extras)
    if obstacle is not None:
        _log_once(obstacle)
        return None
    kernel_mask = step.kernel_mask(query.device)
    output = tree_attention(
        query,
        key,
        value,
        prefix_lengths=kernel_mask.prefix_lengths,
        ancestor_words=kernel_mask.ancestor_words,
        depths=kernel_mask.depths,
        prefix_starts=kernel_mask.prefix_starts,
        tree_starts=kernel_mask.tree_starts,
        sinks=extras.get("s_aux"),
        softcap=extras.get("softcap"),
        scale=scaling,
        window=mask.window,
        check_values=False,  # a topology is valid, and checks would sync
    )
    assert isinstance(output, Tensor)  # without the denominator
    return output


def _obstacle(
    mask: TreeMask,
    states: tuple[Tensor, Tensor, Tensor],
    *,
    takes: frozenset[str] | None,
    scaling: Any,
    extras: dict[str, Any],
) -> str | None:
    """Return why the kernel cannot replace a layer's own function; None if it can."""
    query, key, value = states
    batch, q_heads, nodes, head_dim = query.shape
    if takes is None:
        return "the modeling file has its own kind of eager attention, or rounds scores to half"
    if extras.keys() - takes:
        return f"layers pass {', '.join(sorted(extras.keys() - takes))} to attention"
    is_usual = key.shape == value.shape and q_heads % key.shape[1] == 0
    if not is_usual or (batch, nodes, key.shape[2]) != (len(mask), *mask.shape[2:]):
        return "keys, values and nodes differ in more than the kernel takes"
    if not query.dtype == key.dtype == value.dtype:
        return f"queries are {query.dtype}, keys {key.dtype} and values {value.dtype}"
    if torch.is_autocast_enabled(query.device.type):
        return "autocast chooses the type that attention is computed in"
    factors = {"scaling": scaling, "softcap": extras.get("softcap")}
    for name, factor in factors.items():
        is_usual = factor is None or (isinstance(factor, float | int) and 0 < factor < math.inf)
        if not is_usual:
            return f"{name} of layers is {factor!r}, not a number above 0"
    return attention_obstacle(query.device, query.dtype, head_dim)


def taken_arguments(
    name: str, function: Callable[..., Any], dtype: torch.dtype
) -> frozenset[str] | None:
    """Return the extra arguments that an attention function uses; None if it is unknown.

    Args:
        name: Name of the implementation.
        function: The implementation; for ``"eager"`` the modeling file's own.
        dtype: Type of the states. Eager attention, and so regular generation, rounds scores to it.
    """
    if name == "sdpa":
        return frozenset()
    if name != "eager":
        return _FUSED
    code = getattr(function, "__code__", None)
    if code is None or dtype not in {torch.float32, torch.float64}:
        return None
    helper = getattr(function, "__globals__", {}).get("repeat_kv")
    return _eager_arguments(code, getattr(helper, "__code__", None))


@cache
def _eager_arguments(code: CodeType, helper: CodeType | None) -> frozenset[str] | None:
    """Look code up in the sources of `_LIKE_EAGER`, which a patch at run time does not change."""
    for family, taken in _LIKE_EAGER.items():
        known = _written_functions(family)
        if _is_same(code, known["eager_attention_forward"]) and _is_same(
            helper, known["repeat_kv"]
        ):
            return taken
    return None


@cache
def _written_functions(family: str) -> dict[str, CodeType]:
    """Compile the functions of a modeling file from its source."""
    spec = importlib.util.find_spec(f"transformers.models.{family}.modeling_{family}")
    assert spec is not None
    assert spec.origin is not None
    module = compile(Path(spec.origin).read_bytes(), spec.origin, "exec")
    return {part.co_name: part for part in module.co_consts if isinstance(part, CodeType)}


def _is_same(left: CodeType | None, right: CodeType) -> bool:
    parts = ("co_code", "co_consts", "co_names", "co_varnames")
    return left is not None and all(getattr(left, part) == getattr(right, part) for part in parts)


@cache
def _log_once(obstacle: str) -> None:
    _log.info("tree attention is computed without the kernel: %s", obstacle)
