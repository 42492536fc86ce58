"""Config of block heads: read from a checkpoint or made for a base."""

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

KINDS = ("dspark", "dflash", "jetspec")
"""Kinds of new heads; saved ones may mix their parts."""

MARKOV_HEADS = ("vanilla", "gated", "rnn")
"""Kinds of the head that adds what the previous token says about the next."""

MAX_BLOCK_SIZE = 64
MAX_LAYERS = 64

_MAX_FEATURES = 5
_MIN_TARGET_LAYERS = 4
_SIZES = (
    *("hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim"),
    *("vocab_size", "draft_vocab_size", "max_position_embeddings"),
)


@dataclass(frozen=True, slots=True)
class BlockConfig:
    """Sizes and switches that block heads are built from.

    Args:
        hidden_size: Width of the heads' states and of each hidden state of the target.
        intermediate_size: Width inside the feed-forward part.
        num_layers: Decoder layers of the heads.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; divides the query heads.
        head_dim: Width of each head.
        vocab_size: Width of the target's logits.
        draft_vocab_size: Width of the heads' logits.
        block_size: Positions of one pass, the anchor's included.
        feature_layers: Hidden states of the target that are read, as indices of ``hidden_states``
            in Transformers: 0 is the embeddings, i + 1 the output of layer i.
        mask_token_id: Token whose embedding is the input at every position after the anchor.
        windows: For each layer the number of positions that it sees, itself included; None for
            all.
        is_causal: For each layer whether a position of the block sees only those before it.
        predicts_next: Whether a position drafts the token after it. Otherwise it drafts its own
            token, and the anchor's position drafts none.
        markov: Kind of the head that adds a term for the previous token, one of `MARKOV_HEADS`;
            None if the tokens of a block are drafted independently.
        markov_rank: Width of that head; 0 without one.
        has_confidence: Whether a head estimates how likely each draft token is accepted.
        rms_norm_eps: Added to the mean square in every norm.
        hidden_act: Activation of the feed-forward part, by its name in Transformers.
        rope_parameters: Rotation of queries and keys, as Transformers 5 writes it.
        max_position_embeddings: Number of positions that the rotation was made for.
        has_attention_bias: Whether the projections of attention have a bias.
        has_own_embeddings: Whether the heads have an embedding matrix; else the target's is used.
        has_own_lm_head: Whether they have an output matrix; else the target's is used.

    Raises:
        OptionError: If a value is out of range, or two contradict each other.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    block_size: int
    feature_layers: tuple[int, ...]
    mask_token_id: int
    windows: tuple[int | None, ...]
    is_causal: tuple[bool, ...]
    predicts_next: bool
    markov: str | None = None
    markov_rank: int = 0
    has_confidence: bool = False
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    rope_parameters: Mapping[str, Any] = field(default_factory=unscaled_rope, hash=False)
    max_position_embeddings: int = 2048
    has_attention_bias: bool = False
    has_own_embeddings: bool = False
    has_own_lm_head: bool = False

    def __post_init__(self) -> None:
        for name in _SIZES:
            require_size(name, getattr(self, name))
        require_count("num_layers", self.num_layers, low=1, high=MAX_LAYERS)
        require_count("block_size", self.block_size, low=2, high=MAX_BLOCK_SIZE)
        require_positive("rms_norm_eps", self.rms_norm_eps)
        require_activation(self.hidden_act)
        if self.num_heads % self.num_kv_heads:
            raise OptionError(
                f"num_heads is {self.num_heads}, expected a multiple of num_kv_heads, "
                f"{self.num_kv_heads}; correct one"
            )
        require_rope(self)
        _require_features(self)
        _require_layers(self)
        _require_tokens(self)
        _require_markov(self)

    @property
    def num_drafts(self) -> int:
        """Draft tokens of one pass."""
        return self.block_size if self.predicts_next else self.block_size - 1

    @property
    def has_draft_vocab(self) -> bool:
        """Whether the heads draft from only a part of the vocabulary."""
        return self.draft_vocab_size < self.vocab_size

    def layers_to_read(self, num_target_layers: int) -> tuple[int, ...]:
        """Return the hidden states of the target that are read, as indices of `TargetFeatures`.

        Args:
            num_target_layers: Decoder layers of the target.

        Raises:
            OptionError: If the target has too few layers.
        """
        if max(self.feature_layers) > num_target_layers:
            raise OptionError(
                f"feature_layers is {self.feature_layers!r}, expected at most {num_target_layers}, "
                "the layers of the base; load the heads with the base they were trained on"
            )
        # The output of the last layer is read after the final norm.
        return tuple(-1 if i == num_target_layers else i for i in self.feature_layers)

    @classmethod
    def from_model_config(
        cls,
        config: Any,
        *,
        kind: str,
        num_layers: int = 2,
        block_size: int = 8,
        draft_vocab_size: int | None = None,
        **changes: Any,
    ) -> Self:
        """Return the config of untrained heads for a base of any family.

        DSpark: a causal block whose positions draft the token after them, a Markov head, a
        confidence head. DFlash: a block that sees itself in both directions. JetSpec: a causal
        block; neither has further heads, and their positions draft their own tokens. The rotation
        has the base's period without its scaling.

        Args:
            config: The base's Transformers config.
            kind: One of `KINDS`.
            num_layers: Decoder layers of the heads.
            block_size: Positions of one pass.
            draft_vocab_size: Number of tokens that the heads draft from; None for all.
            **changes: Fields that differ from the usual ones.

        Raises:
            OptionError: If the base has too few layers, or a value is out of range.
        """
        if kind not in KINDS:
            raise OptionError(f"kind is {kind!r}, expected one of {KINDS!r}; choose one")
        require_count("num_layers", num_layers, low=1, high=MAX_LAYERS)
        text = config.get_text_config()
        hidden, vocab = int(text.hidden_size), int(text.vocab_size)
        heads = first_number(text, "num_attention_heads") or max(1, hidden // 64)
        kv_heads = first_number(text, "num_key_value_heads") or heads
        head_dim = first_number(text, "head_dim") or hidden // heads
        wide = first_number(text, "intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner")
        is_dspark = kind == "dspark"
        usual: dict[str, Any] = {
            "hidden_size": hidden,
            "intermediate_size": wide or 4 * hidden,
            "num_layers": num_layers,
            "num_heads": heads,
            "num_kv_heads": kv_heads if heads % kv_heads == 0 else heads,
            "head_dim": head_dim + head_dim % 2,
            "vocab_size": vocab,
            "draft_vocab_size": draft_vocab_size or vocab,
            "block_size": block_size,
            "mask_token_id": _mask_token_id(text, vocab),
            "windows": (None,) * num_layers,
            "is_causal": (kind != "dflash",) * num_layers,
            "predicts_next": is_dspark,
            "markov": "vanilla" if is_dspark else None,
            "markov_rank": min(256, hidden) if is_dspark else 0,
            "has_confidence": is_dspark,
            "rms_norm_eps": float(getattr(text, "rms_norm_eps", None) or 1e-6),
            "rope_parameters": unscaled_rope(rope_theta(text)),
            "max_position_embeddings": first_number(text, "max_position_embeddings") or 2048,
            "has_own_lm_head": draft_vocab_size is not None and draft_vocab_size < vocab,
        }
        if "feature_layers" not in changes:
            usual["feature_layers"] = usual_layers(int(text.num_hidden_layers))
        made = cls(**{**usual, **changes})
        made.layers_to_read(int(text.num_hidden_layers))
        return made


def usual_layers(num_target_layers: int) -> tuple[int, ...]:
    """Return the hidden states that new heads read: up to five, evenly from 2 to n - 2.

    Source: the released DFlash heads.

    Raises:
        OptionError: If the target has too few layers.
    """
    if num_target_layers < _MIN_TARGET_LAYERS:
        raise OptionError(
            f"the base has {num_target_layers} layers, expected at least {_MIN_TARGET_LAYERS} for "
            "the usual feature_layers; name others"
        )
    span = num_target_layers - 4
    steps = min(_MAX_FEATURES - 1, span)
    if not steps:
        return (2,)
    return tuple(2 + round(index * span / steps) for index in range(steps + 1))


def _mask_token_id(config: Any, vocab_size: int) -> int:
    """Return a token of the base that its texts do not contain, or seldom."""
    padding, ends = (getattr(config, name, None) for name in ("pad_token_id", "eos_token_id"))
    is_free = padding not in (ends if isinstance(ends, list | tuple) else (ends,))
    if isinstance(padding, int) and 0 <= padding < vocab_size and is_free:
        return padding
    return vocab_size - 1  # vocabularies are often padded


def _require_features(config: BlockConfig) -> None:
    layers = config.feature_layers
    if not layers or len(set(layers)) != len(layers):
        raise OptionError(
            f"feature_layers is {shown(layers)}, expected at least one and each once; correct it"
        )
    for layer in layers:
        require_count("feature_layers", layer, low=0, high=10_000)


def _require_layers(config: BlockConfig) -> None:
    for name in ("windows", "is_causal"):
        found = getattr(config, name)
        if len(found) != config.num_layers:
            raise OptionError(
                f"{name} is {shown(found)}, expected {config.num_layers}, one for each layer; "
                "correct it"
            )
    for window in config.windows:
        if window is not None:
            require_size("windows", window)


def _require_tokens(config: BlockConfig) -> None:
    if config.draft_vocab_size > config.vocab_size:
        raise OptionError(
            f"draft_vocab_size is {config.draft_vocab_size}, expected at most "
            f"{config.vocab_size}, the target's vocabulary; lower it"
        )
    if config.has_draft_vocab and not config.has_own_lm_head:
        raise OptionError(
            "has_own_lm_head is off, expected on where the draft vocabulary differs from the "
            "target's, whose output matrix cannot serve; switch it on"
        )
    require_count("mask_token_id", config.mask_token_id, low=0, high=config.vocab_size - 1)


def _require_markov(config: BlockConfig) -> None:
    if config.markov is None:
        if config.markov_rank:
            raise OptionError(
                f"markov_rank is {config.markov_rank} without a Markov head, expected 0; name the "
                f"kind of the head, one of {MARKOV_HEADS!r}, or leave it out"
            )
        return
    if config.markov not in MARKOV_HEADS:
        raise OptionError(
            f"markov is {shown(config.markov)}, expected one of {MARKOV_HEADS!r} or None; correct "
            "it"
        )
    require_size("markov_rank", config.markov_rank)
