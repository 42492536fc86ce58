"""Config of EAGLE heads: read from a checkpoint or made for a base."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self, cast

from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from speclm.config import require_count, require_positive, require_size
from speclm.errors import OptionError, reason_of, shown

KINDS = ("eagle", "eagle3")
"""EAGLE-1 and 2 share one kind of heads, on the last hidden state; EAGLE-3 reads several."""

NUM_FEATURES = 3
"""Hidden states of the target that EAGLE-3 reads by default."""

MIN_TARGET_LAYERS = 7
"""Minimum layers of a target, so that EAGLE-3's default hidden states differ from each other."""

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
_SIZES = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "draft_vocab_size", "target_hidden_size", "num_layers"),
    *("num_features", "max_position_embeddings"),
)
_EAGLE3_ONLY = ("norm_before_residual", "fc_norm", "norm_before_fc", "norm_output")


def _unscaled_rope() -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": DEFAULT_ROPE_THETA}


@dataclass(frozen=True, slots=True)
class EagleConfig:
    """Sizes and switches that EAGLE heads are built from.

    Args:
        kind: ``"eagle"`` (EAGLE-1 and 2) or ``"eagle3"``.
        hidden_size: Width of the heads' own states.
        intermediate_size: Width inside the feed-forward part.
        num_attention_heads: Query heads.
        num_key_value_heads: Key and value heads; divides the query heads.
        head_dim: Width of each head.
        vocab_size: Width of the target's logits.
        draft_vocab_size: Width of the heads' logits.
        target_hidden_size: Width of the target's hidden states.
        num_layers: Decoder layers of the heads.
        num_features: Hidden states of the target that are read for each token, concatenated.
        feature_layers: Indices of these in ``hidden_states`` (0 is the embeddings); None for
            the usual ones, see `layers_to_read`. None for EAGLE-1, which reads the last one after
            the final norm.
        rms_norm_eps: Added to the mean square in every norm.
        hidden_act: Activation of the feed-forward part, by its name in Transformers.
        rope_parameters: Rotation of queries and keys, as Transformers 5 writes it.
        max_position_embeddings: Number of positions that the rotation was made for.
        sliding_window: Number of positions that a token sees, itself included; None for all.
        attention_bias: Whether queries, keys and values have a bias.
        attention_output_bias: Whether the output projection of attention has a bias.
        has_qk_norm: Whether queries and keys are normed before they are rotated.
        fc_bias: Whether the projection of the joined inputs has a bias.
        norm_before_residual: Whether the first layer's residual is the normed state.
        fc_norm: Whether each of the target's hidden states is normed.
        norm_before_fc: Whether they are normed together.
        norm_output: Whether the state fed back is the normed one.
        logit_scale: Factor of the logits.
        has_own_embeddings: Whether the heads have an embedding matrix; else the target's is used.
        has_own_lm_head: Whether they have an output matrix; else the target's is used.

    Raises:
        OptionError: If a value is out of range, or two contradict each other.
    """

    kind: str
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    target_hidden_size: int
    num_layers: int = 1
    num_features: int = 1
    feature_layers: tuple[int, ...] | None = None
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    rope_parameters: Mapping[str, Any] = field(default_factory=_unscaled_rope, hash=False)
    max_position_embeddings: int = 2048
    sliding_window: int | None = None
    attention_bias: bool = False
    attention_output_bias: bool = False
    has_qk_norm: bool = False
    fc_bias: bool = False
    norm_before_residual: bool = False
    fc_norm: bool = False
    norm_before_fc: bool = False
    norm_output: bool = False
    logit_scale: float = 1.0
    has_own_embeddings: bool = False
    has_own_lm_head: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise OptionError(f"kind is {self.kind!r}, expected one of {KINDS!r}; choose one")
        for name in _SIZES:
            require_size(name, getattr(self, name))
        for name in ("rms_norm_eps", "logit_scale"):
            require_positive(name, getattr(self, name))
        if self.sliding_window is not None:
            require_size("sliding_window", self.sliding_window)
        if self.hidden_act not in ACT2FN or self.hidden_act in _LEARNED:
            raise OptionError(
                f"hidden_act is {self.hidden_act!r}, expected an activation that Transformers "
                "knows and that has no weights, such as 'silu'; correct it"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise OptionError(
                f"num_attention_heads is {self.num_attention_heads}, expected a multiple of "
                f"num_key_value_heads, {self.num_key_value_heads}; correct one"
            )
        if self.head_dim % 2:
            raise OptionError(
                f"head_dim is {self.head_dim}, expected an even number, since pairs are rotated; "
                "correct it or num_attention_heads"
            )
        _require_rope(self)
        _require_features(self)
        _require_outputs(self)

    @property
    def has_draft_vocab(self) -> bool:
        """Whether the heads draft from only a part of the vocabulary."""
        return self.draft_vocab_size < self.vocab_size

    def layers_to_read(self, num_target_layers: int) -> tuple[int, ...]:
        """Return the hidden states of the target that EAGLE-3 reads, as HF indices.

        For n layers, the usual ones are 2, n // 2 and n - 3. Some libraries count layers instead
        and name the same states 1, n // 2 - 1 and n - 4, so these also mean the usual ones.

        Args:
            num_target_layers: Decoder layers of the target.

        Raises:
            OptionError: If the target has too few layers.
        """
        usual = usual_layers(num_target_layers)
        layers = self.feature_layers
        if layers is None or layers == tuple(layer - 1 for layer in usual):
            if num_target_layers < MIN_TARGET_LAYERS:
                raise OptionError(
                    f"the base has {num_target_layers} layers, expected at least "
                    f"{MIN_TARGET_LAYERS} for the usual feature_layers, of which two would be the "
                    "same; name others"
                )
            return usual
        # The output of the last layer is read after the norm only, as the feature of EAGLE-1.
        if max(layers) >= num_target_layers:
            raise OptionError(
                f"feature_layers is {layers!r}, expected at most {num_target_layers - 1}: what the "
                "layers of the base read; load the heads with the base they were trained on"
            )
        return layers

    @classmethod
    def from_model_config(
        cls,
        config: Any,
        *,
        kind: str,
        draft_vocab_size: int | None = None,
        feature_layers: tuple[int, ...] | None = None,
        num_layers: int = 1,
    ) -> Self:
        """Return the config of untrained heads for a base of any family.

        EAGLE-1 heads have neither biases nor an output matrix; EAGLE-3 heads have an output matrix.
        The rotation has the base's period without its scaling.

        Args:
            config: The base's Transformers config.
            kind: ``"eagle"`` or ``"eagle3"``.
            draft_vocab_size: Number of tokens that the heads draft from; None for all.
            feature_layers: Hidden states that EAGLE-3 reads; None for the usual ones.
            num_layers: Decoder layers of the heads.

        Raises:
            OptionError: If the base has too few layers, or a value is out of range.
        """
        text = config.get_text_config()
        hidden = int(text.hidden_size)
        heads = _first_number(text, "num_attention_heads") or max(1, hidden // 64)
        kv_heads = _first_number(text, "num_key_value_heads") or heads
        head_dim = _first_number(text, "head_dim") or hidden // heads
        wide = _first_number(text, "intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner")
        is_eagle3 = kind == "eagle3"
        made = cls(
            kind=kind,
            hidden_size=hidden,
            intermediate_size=wide or 4 * hidden,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads if heads % kv_heads == 0 else heads,
            head_dim=head_dim + head_dim % 2,
            vocab_size=int(text.vocab_size),
            draft_vocab_size=int(draft_vocab_size or text.vocab_size),
            target_hidden_size=hidden,
            num_layers=num_layers,
            num_features=len(feature_layers or range(NUM_FEATURES)) if is_eagle3 else 1,
            feature_layers=feature_layers,
            rms_norm_eps=float(getattr(text, "rms_norm_eps", None) or 1e-6),
            rope_parameters=_unscaled_rope() | {"rope_theta": _rope_theta(text)},
            max_position_embeddings=_first_number(text, "max_position_embeddings") or 2048,
            has_own_lm_head=is_eagle3,
        )
        if is_eagle3:
            made.layers_to_read(int(text.num_hidden_layers))
        return made


def usual_layers(num_target_layers: int) -> tuple[int, int, int]:
    """Return the hidden states that EAGLE-3 reads by default, as HF indices."""
    return 2, num_target_layers // 2, num_target_layers - 3


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


def _require_rope(config: EagleConfig) -> None:
    rope = config.rope_parameters
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


def _require_frequencies(config: EagleConfig) -> None:
    """Check that a rotation can be computed with any values it may have."""
    size = config.head_dim
    try:
        llama = LlamaConfig(
            hidden_size=size,
            head_dim=size,
            num_attention_heads=1,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters=dict(config.rope_parameters),
        )
        rotary = LlamaRotaryEmbedding(llama)
    except Exception as error:
        raise OptionError(
            f"rope_parameters {shown(dict(config.rope_parameters))} cannot be computed with "
            f"({reason_of(error)}); correct them"
        ) from error
    is_finite = math.isfinite(rotary.attention_scaling) and bool(rotary.inv_freq.isfinite().all())
    if not is_finite:
        raise OptionError(
            f"rope_parameters {shown(dict(config.rope_parameters))} give frequencies that are not "
            "finite; correct them"
        )


def _require_features(config: EagleConfig) -> None:
    layers = config.feature_layers
    if config.kind == "eagle":
        wrong = [name for name in _EAGLE3_ONLY if getattr(config, name)]
        if wrong or config.num_features != 1 or layers is not None:
            name = wrong[0] if wrong else "num_features above 1 or feature_layers"
            raise OptionError(f"{name} is set, expected that of eagle3 only; remove it")
        if config.target_hidden_size != config.hidden_size:
            raise OptionError(
                f"target_hidden_size is {config.target_hidden_size}, expected "
                f"{config.hidden_size} as hidden_size: heads of eagle continue the target's own "
                "states; use eagle3"
            )
        return
    if config.fc_norm and config.norm_before_fc:
        raise OptionError("fc_norm and norm_before_fc are both set, expected one; remove the other")
    if layers is None and config.num_features != NUM_FEATURES:
        raise OptionError(
            f"num_features is {config.num_features}, the usual feature_layers are {NUM_FEATURES}; "
            "name the feature_layers"
        )
    if layers is not None:
        for layer in layers:
            require_count("feature_layers", layer, low=0, high=10_000)
        if len(set(layers)) != config.num_features:
            raise OptionError(
                f"feature_layers is {shown(layers)}, expected {config.num_features} different "
                "ones; correct it"
            )


def _require_outputs(config: EagleConfig) -> None:
    if config.draft_vocab_size > config.vocab_size:
        raise OptionError(
            f"draft_vocab_size is {config.draft_vocab_size}, expected at most "
            f"{config.vocab_size}, the target's vocabulary; lower it"
        )
    if config.kind == "eagle" and config.has_draft_vocab:
        raise OptionError(
            f"draft_vocab_size is {config.draft_vocab_size}, expected {config.vocab_size}: heads "
            "of eagle have the target's vocabulary; leave it out, or use eagle3"
        )
    has_other_width = config.target_hidden_size != config.hidden_size
    if not config.has_own_lm_head and (config.has_draft_vocab or has_other_width):
        raise OptionError(
            "has_own_lm_head is off, expected on where the draft vocabulary or the width differ "
            "from the target's, whose output matrix cannot serve; switch it on"
        )
    if not config.has_own_embeddings and has_other_width:
        raise OptionError(
            f"has_own_embeddings is off, expected on with target_hidden_size "
            f"{config.target_hidden_size} next to hidden_size {config.hidden_size}: the target's "
            "embeddings do not fit; switch it on"
        )


def _first_number(config: Any, *names: str) -> int | None:
    """Return the first of some attributes that is a number, not a list by layer."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _rope_theta(config: Any) -> float:
    named = {name: getattr(config, name, None) for name in ("rope_parameters", "rope_theta")}
    return float(read_rope(named)["rope_theta"])
