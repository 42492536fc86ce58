"""How the target chooses a token: logits processors, then argmax over probabilities and noise."""

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
"""Processors whose result depends on the scores of their own row alone, by exact class: a
subclass may look at anything."""


def first_context_dependent(processor_list: list[processors.LogitsProcessor]) -> str | None:
    """Return the class name of the first processor that may read more than its row's scores."""
    names = (type(p).__name__ for p in processor_list if type(p) not in CONTEXT_FREE)
    return next(names, None)


class TokenChooser:
    """Turns logits into tokens as plain decoding does, for any number of rows at once."""

    def __init__(
        self, processor_list: list[processors.LogitsProcessor], *, is_greedy: bool
    ) -> None:
        """Use context-free processors in the order given."""
        self._processors = processor_list
        self.is_greedy = is_greedy

    def choose(
        self, logits: Float[Tensor, "rows vocab"], noise: Float[Tensor, "rows vocab"] | None
    ) -> Int[Tensor, " rows"]:
        """Choose a token for every row.

        Args:
            logits: The target's logits, in any floating dtype; processed in float32.
            noise: Exponential noise of each row's position; None when greedy.

        Returns:
            Token ids; -1 where the winning score is not a number. Does not sync.

        Source: the Gumbel-max trick in its exponential form, as in ``torch.multinomial``.
        """
        scores = self._process(logits.float())
        if noise is not None:
            scores = scores.softmax(-1) / noise
        tokens = scores.argmax(-1)
        winning = scores.gather(-1, tokens[:, None])[:, 0]  # argmax prefers a NaN to any number
        return tokens.masked_fill(winning.isnan(), -1)

    def law(self, logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
        """Return the probabilities that tokens are drawn from, in single precision or better."""
        return self._process(logits.to(torch.promote_types(logits.dtype, torch.float32))).softmax(
            -1
        )

    def _process(self, scores: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
        for processor in self._processors:
            scores = processor(None, scores)  # context-free: the text is never read
        return scores
