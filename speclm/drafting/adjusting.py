"""Applies to a draft's scores what the target's logits processors do to its own."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.generation import logits_process as processors

from speclm.drafting.interface import Prefill
from speclm.sampling.chooser import LENGTH_DEPENDENT, TokenChooser, first_text_dependent

_SINGLE_TOKENS = LENGTH_DEPENDENT | {processors.SuppressTokensLogitsProcessor}
_BIASES = {processors.SequenceBiasLogitsProcessor, processors.NoBadWordsLogitsProcessor}
_OCCURRENCES = {processors.RepetitionPenaltyLogitsProcessor}
_ORDER = {processors.NoRepeatNGramLogitsProcessor}
_KNOWN = _SINGLE_TOKENS | _BIASES | _OCCURRENCES | _ORDER
"""Processors without a state of their own, by exact class, which cost little next to a forward.
Warpers are left out: what temperature and truncation do is part of the ranking."""

Nodes = tuple[Int[Tensor, "batch nodes"], Int[Tensor, "batch nodes"]]
"""Token of each node, and the index of its parent among the nodes of the level above."""


class ScoreAdjuster:
    """Knows the text of every row, and what the known processors of the target make of it.

    What it returns decides only what is drafted. Processors of other classes are left out.
    """

    def __init__(self, vocab_size: int | None = None) -> None:
        """Take the width of the target's logits, for drafts whose vocabulary is smaller."""
        self._vocab_size = vocab_size
        self._processors: list[processors.LogitsProcessor] = []
        self._counter: TokenChooser | None = None  # where lengths are all that is read
        self._lengths: list[int] = []
        self._text: Int[Tensor, "batch length"] | None = None
        self._paths: Int[Tensor, "batch nodes depth"] | None = None

    @property
    def is_needed(self) -> bool:
        """Whether any scores would change."""
        return bool(self._processors)

    def begin(self, prompt: Prefill) -> None:
        """Start a generation."""
        found = [] if prompt.chooser is None else prompt.chooser.processors
        self._processors = [p for p in found if type(p) in _KNOWN]
        is_text_free = first_text_dependent(self._processors) is None
        self._counter = TokenChooser(self._processors, is_greedy=True) if is_text_free else None
        self._lengths = [prompt.tokens.shape[1] + 1] * len(prompt.first_tokens)
        self._text = None
        if not is_text_free:
            self._text = torch.cat([prompt.tokens, prompt.first_tokens[:, None]], dim=1)

    def extend(self, emitted: list[list[int]]) -> None:
        """Take note of the tokens that every row was given in a round."""
        self._lengths = [
            length + len(new) for length, new in zip(self._lengths, emitted, strict=True)
        ]
        if self._text is not None:
            # Where text is read, rows advance in lockstep; what ended rows hold is read by nobody.
            width = max(map(len, emitted))
            padded = [new + [0] * (width - len(new)) for new in emitted]
            self._text = torch.cat([self._text, self._text.new_tensor(padded)], dim=1)

    def adjust(
        self,
        logits: Float[Tensor, "batch nodes columns"],
        *,
        depth: int,
        nodes: Nodes | None,
        columns: Int[Tensor, " columns"] | None,
    ) -> Float[Tensor, "batch nodes columns"]:
        """Return scores as the target's processors would leave them.

        Args:
            logits: The draft's, after every node of one depth.
            depth: Depth of the nodes; levels come in order.
            nodes: The nodes; None for the root, and where the draft does not depend on the tokens
                between: only processors are then applied that need not know them.
            columns: Token of each column; None where they are the vocabulary.
        """
        if not self._processors:
            return logits
        scores = logits.float()
        if columns is not None:
            assert self._vocab_size is not None, "columns of a vocabulary whose size is unknown"
            full = scores.new_full((*scores.shape[:2], self._vocab_size), -torch.inf)
            scores = full.index_copy_(2, columns, scores)
        flat = scores.flatten(0, 1)
        if self._counter is not None:
            lengths = [length + depth for length in self._lengths for _ in range(scores.shape[1])]
            flat = self._counter.process(flat, lengths)
        else:
            text, is_known = self._text_at(depth, nodes, num_nodes=scores.shape[1])
            for processor in self._processors:
                if is_known or type(processor) not in _ORDER | _BIASES:
                    flat = processor(text, flat)
        adjusted = flat.view_as(scores)
        return adjusted if columns is None else adjusted[..., columns]

    def _text_at(
        self, depth: int, nodes: Nodes | None, *, num_nodes: int
    ) -> tuple[Int[Tensor, "rows length"], bool]:
        """Return the text up to each node, and whether that is known or its last token repeated."""
        assert self._text is not None
        batch = len(self._text)
        if depth == 0:
            self._paths = self._text.new_empty(batch, num_nodes, 0)
        elif nodes is not None and self._paths is not None:
            tokens, parents = nodes
            above = self._paths.gather(1, parents[:, :, None].expand(-1, -1, depth - 1))
            self._paths = torch.cat([above, tokens[:, :, None]], dim=2)
        else:
            self._paths = None
        paths = self._paths
        if paths is None:
            paths = self._text[:, -1:, None].expand(-1, num_nodes, depth)
        text = self._text[:, None].expand(-1, num_nodes, -1)
        joined = torch.cat([text, paths], dim=2).flatten(0, 1)
        return joined, self._paths is not None
