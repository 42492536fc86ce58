"""What the small decoders of several methods share: their rotation and checks of their config."""

import math
from collections.abc import Mapping
from typing import Any, Protocol, cast, runtime_checkable

import torch
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from speclm.config import require_positive
from speclm.errors import OptionError, reason_of, shown

DEFAULT_ROPE_THETA = 10000.0
"""Base of the rotation if the heads' config names none; the target's does not apply."""

_ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_FACTORS = ("short_factor", "long_factor")
_MAX_NUMBER = 1e30
_LEARNED = ("prelu", "xielu")  # activations with parameters of their own


def unscaled_rope(theta: float = DEFAULT_ROPE_THETA) -> dict[str, Any]:
    """Return the parameters of a rotation without scaling."""
    return {"rope_type": "default", "rope_theta": theta}


def read_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotation of a config.json, in the form of Transformers 5.

    Older configs have ``rope_theta`` at the top level and ``rope_scaling`` with ``type`` or
    ``rope_type``; without either, the rotation is unscaled, with base 10000.
    """
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(found, Mapping):
        raise OptionError(f"the rotation is {shown(found)}, expected a dict of numbers; correct it")
    nested = found.get("full_attention")
    rope = dict(nested if isinstance(nested, Mapping) else found)
    old_type = rope.pop("type", None)
    rope_type = rope.get("rope_type") or old_type or "default"
    theta = rope.get("rope_theta") or config.get("rope_theta") or DEFAULT_ROPE_THETA
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if rope_type in ("default", "mrope"):  # axes of images coincide on text
        rope, rope_type = {}, "default"
    rope |= {"rope_type": rope_type, "rope_theta": theta}
    return rope if share in (None, 1) else rope | {"partial_rotary_factor": share}


def rope_theta(config: Any) -> float:
    """Return the base of the rotation of a Transformers config."""
    named = {name: getattr(config, name, None) for name in ("rope_parameters", "rope_theta")}
    return float(read_rope(named)["rope_theta"])


@runtime_checkable
class Rotated(Protocol):
    """The part of a config that decides a rotation."""

    @property
    def rope_parameters(self) -> Mapping[str, Any]:
        """Its parameters, as Transformers 5 writes them."""
        ...

    @property
    def head_dim(self) -> int:
        """Width of what is rotated."""
        ...

    @property
    def max_position_embeddings(self) -> int:
        """Number of positions that it was made for."""
        ...


def require_rope(config: Rotated) -> None:
    """Check that a rotation is known and can be computed.

    Raises:
        OptionError: If it cannot.
    """
    rope = config.rope_parameters
    if config.head_dim % 2:
        raise OptionError(
            f"head_dim is {config.head_dim}, expected an even number, since pairs are rotated; "
            "correct it or num_attention_heads"
        )
    rope_type = rope.get("rope_type")
    if not isinstance(rope_type, str) or rope_type not in _ROPE_NEEDS:
        raise OptionError(
            f"rope_type is {shown(rope_type)}, expected one of {sorted(_ROPE_NEEDS)!r}; correct "
            "rope_parameters"
        )
    require_positive("rope_theta", rope.get("rope_theta"))
    missing = [name for name in _ROPE_NEEDS[rope_type] if rope.get(name) is None]
    if missing:
        raise OptionError(
            f"rope_parameters of type {rope_type!r} name no {missing[0]!r}, found "
            f"{sorted(rope)!r}; add it"
        )
    if rope.get("partial_rotary_factor", 1) != 1:
        raise OptionError(
            f"partial_rotary_factor is {shown(rope['partial_rotary_factor'])}, expected 1: heads "
            "rotate all of each query and key; remove it if they were trained so"
        )
    for name, value in rope.items():
        length = config.head_dim // 2 if name in _FACTORS else None
        if not _is_rope_value(value, length):
            expected = "a finite number" if length is None else f"{length} finite numbers"
            raise OptionError(
                f"{name} of rope_parameters is {shown(value)}, expected {expected}; correct it"
            )
    if rope_type != "default":
        _require_frequencies(config)


def _is_rope_value(value: object, length: int | None) -> bool:
    if length is not None:
        is_list = isinstance(value, list | tuple) and len(value) == length
        return is_list and all(_is_rope_value(part, None) for part in cast("list[Any]", value))
    if isinstance(value, int | float):
        return abs(value) <= _MAX_NUMBER  # which NaN is not
    return value is None or isinstance(value, str)


def _require_frequencies(config: Rotated) -> None:
    """Check that a rotation can be computed with any values it may have."""
    rope = shown(dict(config.rope_parameters))
    try:
        rotary = make_rotary(config)
    except Exception as error:
        raise OptionError(
            f"rope_parameters {rope} cannot be computed with ({reason_of(error)}); correct them"
        ) from error
    is_finite = math.isfinite(rotary.attention_scaling) and bool(rotary.inv_freq.isfinite().all())
    if not is_finite:
        raise OptionError(
            f"rope_parameters {rope} give frequencies that are not finite; correct them"
        )


def make_rotary(config: Rotated) -> LlamaRotaryEmbedding:
    """Return the module that computes a rotation, on the CPU; see `require_rope`."""
    llama = LlamaConfig(
        hidden_size=config.head_dim,
        head_dim=config.head_dim,
        num_attention_heads=1,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters=dict(config.rope_parameters),
    )
    with torch.device("cpu"):
        return LlamaRotaryEmbedding(llama)


def require_activation(name: object) -> None:
    """Check that an activation has no weights of its own and is known to Transformers.

    Raises:
        OptionError: If it is not.
    """
    if name not in ACT2FN or name in _LEARNED:
        raise OptionError(
            f"hidden_act is {shown(name)}, expected an activation that Transformers "
            "knows and that has no weights, such as 'silu'; correct it"
        )


def first_number(config: Any, *names: str) -> int | None:
    """Return the first of some attributes that is a number, not a list by layer."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
