"""Shapes of models: the numbers that the cost of a forward depends on."""

import math
from dataclasses import dataclass, replace
from typing import Self

from transformers import LlamaForCausalLM, PreTrainedModel

from speclm.errors import OptionError, UnsupportedModelError

_STEP = 32  # widths of draft models are multiples of it


@dataclass(frozen=True, slots=True, kw_only=True)
class InflatedShape:
    """The numbers that the cost of a Llama depends on.

    Args:
        hidden_size: Width of the residual stream.
        intermediate_size: Units of each MLP.
        num_layers: Decoder layers.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; divides `num_heads`.
        head_dim: Width of a head; even.
        vocab_size: Width of the logits.
        is_tied: Whether one matrix is both embedding and output matrix.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    is_tied: bool = True

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if name != "is_tied" and getattr(self, name) < 1:
                raise OptionError(
                    f"{name} is {getattr(self, name)!r}, expected at least 1; take the shape from "
                    "a model's config"
                )
        if self.num_heads % self.num_kv_heads or self.head_dim % 2:
            raise OptionError(
                f"num_heads {self.num_heads}, num_kv_heads {self.num_kv_heads} and head_dim "
                f"{self.head_dim} do not fit, expected a multiple of num_kv_heads and an even "
                "head_dim; take the shape from a model's config"
            )

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        """Return the shape of a Llama.

        Raises:
            UnsupportedModelError: If the model is no Llama.
        """
        config = require_llama(model).config
        return cls(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
            head_dim=config.head_dim or config.hidden_size // config.num_attention_heads,
            vocab_size=config.vocab_size,
            is_tied=config.tie_word_embeddings,
        )

    @property
    def group_size(self) -> int:
        """Query heads that share a key and value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def num_weights_read(self) -> int:
        """Weights that a forward reads: all but biases and the rows of the embedding."""
        hidden = self.hidden_size
        attention = 2 * hidden * self.head_dim * (self.num_heads + self.num_kv_heads)
        layer = attention + 3 * hidden * self.intermediate_size + 2 * hidden
        return self.num_layers * layer + hidden + self.vocab_size * hidden


SHAPES: dict[str, InflatedShape] = {
    "0.5b": InflatedShape(  # Qwen2.5-0.5B
        hidden_size=896,
        intermediate_size=4864,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        vocab_size=151936,
    ),
    "1b": InflatedShape(  # Llama-3.2-1B
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        vocab_size=128256,
    ),
    "8b": InflatedShape(  # Llama-3.1-8B
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128256,
        is_tied=False,
    ),
}
"""Shapes of published models, by name."""


def draft_shape(
    draft: PreTrainedModel, base: PreTrainedModel, shape: InflatedShape
) -> InflatedShape:
    """Return the shape that gives a draft model the share of a larger base that it has of this one.

    Layers and `head_dim` grow as those of the base. The width is the largest at which a forward
    of the draft model reads no larger a part of what the base reads than now, and the MLP takes
    what is left. A draft model is never made smaller, which small shapes may ask for.

    Args:
        draft: The draft model.
        base: The base, as it is.
        shape: What the base is inflated to.
    """
    old, small = InflatedShape.of(draft), InflatedShape.of(base)
    goal = shape.num_weights_read * old.num_weights_read / small.num_weights_read
    head_dim = old.head_dim * max(1, shape.head_dim // small.head_dim)

    def widened(hidden: int) -> InflatedShape:
        heads = hidden * old.num_heads * old.head_dim / (old.hidden_size * head_dim)
        num_kv_heads = max(old.num_kv_heads, round(heads / old.group_size))
        return InflatedShape(
            hidden_size=hidden,
            intermediate_size=_rounded(hidden * old.intermediate_size / old.hidden_size),
            num_layers=max(
                old.num_layers, round(old.num_layers * shape.num_layers / small.num_layers)
            ),
            num_heads=num_kv_heads * old.group_size,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            vocab_size=shape.vocab_size,
            is_tied=old.is_tied,
        )

    found = replace(widened(old.hidden_size), intermediate_size=old.intermediate_size)
    for hidden in range(_rounded(old.hidden_size), shape.hidden_size + 1, _STEP):
        wider = widened(hidden)
        if wider.num_weights_read <= goal:
            found = wider
    left = (goal - found.num_weights_read) / (3 * found.num_layers * found.hidden_size)
    more = max(0, int(left) // _STEP * _STEP)
    return replace(found, intermediate_size=found.intermediate_size + more)


def require_llama(model: PreTrainedModel) -> LlamaForCausalLM:
    """Return the model, which has to be a Llama.

    Raises:
        UnsupportedModelError: If it is none.
    """
    if not isinstance(model, LlamaForCausalLM):
        raise UnsupportedModelError(
            f"model is a {type(model).__name__}, expected a LlamaForCausalLM; inflate a Llama"
        )
    return model


def _rounded(number: int | float) -> int:
    return math.ceil(number / _STEP) * _STEP
