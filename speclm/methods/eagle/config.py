"""Config of EAGLE heads: read from a checkpoint or made for a base."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from speclm.config import require_count, require_positive, require_size
from speclm.drafting.decoder import (
    first_number,
    require_activation,
    require_rope,
    rope_theta,
    unscaled_rope,
)
from speclm.errors import OptionError, shown

KINDS = ("eagle", "eagle3")
"""EAGLE-1 and 2 share one kind of heads, on the last hidden state; EAGLE-3 reads several."""

NUM_FEATURES = 3
"""Hidden states of the target that EAGLE-3 reads by default."""

MIN_TARGET_LAYERS = 7
"""Minimum layers of a target, so that EAGLE-3's default hidden states differ from each other."""

_SIZES = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "draft_vocab_size", "target_hidden_size", "num_layers"),
    *("num_features", "max_position_embeddings"),
)
_EAGLE3_ONLY = ("norm_before_residual", "fc_norm", "norm_before_fc", "norm_output")


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
        draft_vocab_size: Width of the heads' logits; EAGLE-1 heads without an output matrix draft
            some of the tokens of the target's.
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
    rope_parameters: Mapping[str, Any] = field(default_factory=unscaled_rope, hash=False)
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
        require_activation(self.hidden_act)
        if self.num_attention_heads % self.num_key_value_heads:
            raise OptionError(
                f"num_attention_heads is {self.num_attention_heads}, expected a multiple of "
                f"num_key_value_heads, {self.num_key_value_heads}; correct one"
            )
        require_rope(self)
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
        heads = first_number(text, "num_attention_heads") or max(1, hidden // 64)
        kv_heads = first_number(text, "num_key_value_heads") or heads
        head_dim = first_number(text, "head_dim") or hidden // heads
        wide = first_number(text, "intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner")
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
            rope_parameters=unscaled_rope(rope_theta(text)),
            max_position_embeddings=first_number(text, "max_position_embeddings") or 2048,
            has_own_lm_head=is_eagle3,
        )
        if is_eagle3:
            made.layers_to_read(int(text.num_hidden_layers))
        return made


def usual_layers(num_target_layers: int) -> tuple[int, int, int]:
    """Return the hidden states that EAGLE-3 reads by default, as HF indices."""
    return 2, num_target_layers // 2, num_target_layers - 3


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
    has_other_width = config.target_hidden_size != config.hidden_size
    has_other_output = has_other_width or (config.has_draft_vocab and config.kind == "eagle3")
    if not config.has_own_lm_head and has_other_output:
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
