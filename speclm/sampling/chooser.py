"""How the target chooses a token: logits processors, then an argmax of probabilities over noise."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.generation import logits_process as processors

CONTEXT_FREE = frozenset(
    {
        processors.TemperatureLogitsWarper,
        processors.TopKLogitsWarper,
        processors.TopPLogitsWarper,
        processors.MinPLogitsWarper,
        processors.TopHLogitsWarper,
        processors.TypicalLogitsWarper,
        processors.EpsilonLogitsWarper,
        processors.EtaLogitsWarper,
        processors.LogitNormalization,
        processors.InfNanRemoveLogitsProcessor,
        processors.SuppressTokensLogitsProcessor,
    }
)
"""Processors whose result depends only on the scores of their own row. Matched by exact class,
because a subclass may read anything."""

LENGTH_DEPENDENT = frozenset(
    {
        processors.MinLengthLogitsProcessor,
        processors.MinNewTokensLengthLogitsProcessor,
        processors.ForcedBOSTokenLogitsProcessor,
        processors.ForcedEOSTokenLogitsProcessor,
        processors.SuppressTokensAtBeginLogitsProcessor,
        processors.ExponentialDecayLengthPenalty,
    }
)
"""Processors that read only the length of the text, by exact class."""

_TRUNCATIONS = {
    processors.TopKLogitsWarper: "top_k",
    processors.TopPLogitsWarper: "top_p",
    processors.MinPLogitsWarper: "min_p",
}

_BIASES = frozenset({processors.SequenceBiasLogitsProcessor, processors.NoBadWordsLogitsProcessor})


def first_text_dependent(
    processor_list: Iterable[processors.LogitsProcessor],
) -> processors.LogitsProcessor | None:
    """Return the first processor that may read more than its row's scores and length."""
    return next((p for p in processor_list if not _is_text_free(p)), None)


def pick(
    scores: Float[Tensor, "*rows vocab"], noise: Float[Tensor, "*rows vocab"] | None
) -> Int[Tensor, "*rows"]:
    """Return the token that regular generation takes from the processed scores of each row.

    Args:
        scores: Result of the logits processors, in any dtype.
        noise: Exponential noise of each row's position, in that dtype; None when greedy.

    Returns:
        Token ids; -1 if the chosen score or probability is NaN. Does not sync.

    Source: the Gumbel-max trick in its exponential form, as in ``torch.multinomial``.
    """
    # Both prefer a NaN to any number, and the first of equals.
    if noise is None:
        chosen, tokens = scores.max(-1)
    else:
        scores = scores.softmax(-1)
        tokens = (scores / noise).argmax(-1)  # 0 / 0, which half precision has, wins there too
        chosen = scores.gather(-1, tokens[..., None])[..., 0]
    return tokens.masked_fill(chosen.isnan(), -1)


def _is_text_free(processor: processors.LogitsProcessor) -> bool:
    kind = type(processor)
    if kind in _BIASES:  # a bias of single tokens is the same everywhere
        return all(len(ids) == 1 for ids in vars(processor)["sequence_bias"])
    return kind in CONTEXT_FREE or kind in LENGTH_DEPENDENT


@dataclass(frozen=True, slots=True)
class Truncation:
    """Limits that exclude rare tokens; None if unused.

    Args:
        top_k: Number of tokens that are kept.
        top_p: Smallest joint probability of the kept tokens.
        min_p: Smallest probability of a token, relative to the most likely one.
    """

    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None


class TokenChooser:
    """Turns logits into tokens as regular generation does, for any number of rows at once.

    Example:
        ```python
        chooser = TokenChooser([TemperatureLogitsWarper(0.7)], is_greedy=False)
        tokens = chooser.choose(logits, noise.at_depth(0))
        ```
    """

    def __init__(
        self, processor_list: Sequence[processors.LogitsProcessor], *, is_greedy: bool
    ) -> None:
        """Use text-free processors in the order given; see `first_text_dependent`."""
        self.processors = processor_list
        self.reads_lengths = any(type(p) in LENGTH_DEPENDENT for p in processor_list)
        self.is_greedy = is_greedy

    @property
    def takes_maxima(self) -> bool:
        """Whether each token is the one with the largest logit."""
        return self.is_greedy and not self.processors

    @property
    def key(self) -> Hashable:
        """Class and plain options of each processor, to distinguish settings."""
        return tuple(
            (
                type(processor).__qualname__,
                *(
                    (name, value)
                    for name, value in sorted(vars(processor).items())
                    if isinstance(value, int | float | str)
                ),
            )
            for processor in self.processors
        )

    @property
    def truncation(self) -> Truncation | None:
        """Limits set by known warpers; None if there are none."""
        found: dict[str, Any] = {}
        for processor in self.processors:
            name = _TRUNCATIONS.get(type(processor))
            if name is not None:
                found[name] = vars(processor)[name]
        return Truncation(**found) if found else None

    def choose(
        self,
        logits: Float[Tensor, "rows vocab"],
        noise: Float[Tensor, "rows vocab"] | None,
        *,
        lengths: Sequence[int] | None = None,
    ) -> Int[Tensor, " rows"]:
        """Choose a token for every row.

        Args:
            logits: The target's logits, in any floating dtype; processed in float32.
            noise: Exponential noise of each row's position; None when greedy.
            lengths: Tokens before the chosen one, prompt and padding included; needed if
                `reads_lengths`.

        Returns:
            Token ids; -1 if the winning score is NaN. Does not sync.
        """
        if self.takes_maxima:
            return pick(logits, None)  # the order is the same in float32
        return pick(self.process(logits.float(), lengths), noise)

    def distribution(self, logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
        """Return the probabilities that tokens are drawn from, in float32 or better."""
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return self.process(scores, None).softmax(-1)

    def process(
        self, scores: Float[Tensor, "rows vocab"], lengths: Sequence[int] | None
    ) -> Float[Tensor, "rows vocab"]:
        """Apply the processors to scores; see `choose` for `lengths`."""
        if not self.reads_lengths:
            return self._process_at(scores, 0)
        assert lengths is not None, "a processor reads the length of the text"
        if len(set(lengths)) == 1:
            return self._process_at(scores, lengths[0])
        processed = torch.empty_like(scores)
        for length in set(lengths):
            rows = [row for row, other in enumerate(lengths) if other == length]
            processed[rows] = self._process_at(scores[rows], length)
        return processed

    def _process_at(
        self, scores: Float[Tensor, "rows vocab"], length: int
    ) -> Float[Tensor, "rows vocab"]:
        if not self.processors:
            return scores
        text = torch.zeros(1, 1, dtype=torch.long, device=scores.device)
        text = text.expand(len(scores), length)  # only its shape is read
        for processor in self.processors:
            scores = processor(text, scores)
        return scores
