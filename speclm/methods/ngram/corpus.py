"""Drafts what followed the same tokens in earlier outputs, or in a corpus file.

Sources: He et al. 2023 (REST), who draft from a datastore by the longest match; Oliaro et al. 2024
(SuffixDecoding), who keep earlier outputs.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedConfig
from typing_extensions import override

from speclm.config import require_count
from speclm.drafting.interface import Prefill
from speclm.drafting.sources import CandidateSource, NoiseRow
from speclm.errors import OptionError
from speclm.methods.ngram.suffix_index import MAX_MATCH, MIN_MATCH, Match, SuffixIndex, Tokens

MAX_HISTORY = 1 << 24
"""Maximum tokens of outputs that can be kept."""

PROMPT_TAIL = 4
"""Tokens of the prompt that are indexed with an output: in a chat those of the template."""


class OutputHistory:
    """The most recent outputs, bounded, with an index that is renewed now and then.

    Not for several threads at a time.

    Args:
        max_tokens: Maximum tokens that are kept; 0 keeps none. The oldest outputs are dropped.

    Raises:
        OptionError: If the bound is out of range.
    """

    def __init__(self, *, max_tokens: int = 65_536) -> None:
        require_count("max_tokens", max_tokens, low=0, high=MAX_HISTORY)
        self.max_tokens = max_tokens
        self.clear()

    def clear(self) -> None:
        """Forget all outputs."""
        self._outputs: deque[Tokens] = deque()
        self._num_tokens = self._num_unindexed = 0
        self._index = SuffixIndex.build([])

    @property
    def num_tokens(self) -> int:
        """Tokens that are kept."""
        return self._num_tokens

    def append(self, tokens: Sequence[int]) -> None:
        """Keep an output; of one longer than the bound the end."""
        if not tokens or self.max_tokens == 0:
            return
        output = np.array(tokens[-self.max_tokens :], dtype=np.int32)
        self._outputs.append(output)
        self._num_tokens += output.size
        self._num_unindexed += output.size
        while self._num_tokens > self.max_tokens:
            self._num_tokens -= self._outputs.popleft().size

    def index(self) -> SuffixIndex:
        """Return an index over the outputs, but for the latest ones.

        It is built once those that it lacks exceed an eighth of it and 512 tokens, so that all
        builds together take a few microseconds for each token of output.
        """
        if self._num_unindexed > len(self._index) // 8 + min(512, self.max_tokens // 8):
            self._index = SuffixIndex.build(self._outputs)
            self._num_unindexed = 0
        return self._index


@dataclass(slots=True)
class _Row:
    """A row of a generation.

    Args:
        text: The end of the prompt, and the output.
        match: Longest match at the end of `text`, or of a shorter text if `longest` is not None.
        longest: Maximum tokens that the match of the whole text may have, while that is not known.
    """

    text: list[int]
    match: Match | None = None
    longest: int | None = MAX_MATCH
    num_prompt: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_prompt = len(self.text)


# Of matches of 2, of 3 and 4, of 5 to 8, and of more tokens. In each line: the only follower, one
# that all occurrences agree on, the most frequent of several, any other one. These are no more than
# values to start from: the rates are learned while decoding.
_LONGER_THAN = (2, 4, 8)
_START_RATES = (
    (0.35, 0.45, 0.35, 0.10),
    (0.45, 0.60, 0.45, 0.15),
    (0.60, 0.70, 0.50, 0.15),
    (0.75, 0.80, 0.55, 0.20),
)
_ONLY, _AGREED, _FIRST, _LATER = range(4)
_MAX_CANDIDATES = 3


class CorpusSource(CandidateSource):
    """Suggests what followed the longest match in a corpus, or in the outputs of earlier calls.

    The key of a candidate says how long the match is, and how far its occurrences agree.

    Args:
        corpus: The index to look in, if there is no history.
        history: Earlier outputs to look in. Outputs of a generation are appended to it when the
            next one begins, each with the last tokens of its prompt.

    Raises:
        OptionError: If both or none are given.
    """

    start_rates: Sequence[float] = tuple(rate for rates in _START_RATES for rate in rates)

    def __init__(
        self, corpus: SuffixIndex | None = None, *, history: OutputHistory | None = None
    ) -> None:
        if (corpus is None) == (history is None):
            raise OptionError(
                "found both or none of corpus and history, expected one; pass one, and make "
                "another source for the other"
            )
        self._corpus = corpus
        self._history = history
        self._index = corpus if corpus is not None else SuffixIndex.build([])
        self._rows: list[_Row] = []

    @override
    def begin(self, prompt: Prefill) -> None:
        if self._history is not None:
            for row in self._rows:
                if len(row.text) > row.num_prompt:
                    self._history.append(row.text[max(row.num_prompt - PROMPT_TAIL, 0) :])
            self._index = self._history.index()
        # Once per generation: the index lives on the host.
        width = prompt.tokens.shape[1]
        ends, firsts = prompt.tokens[:, 1 - MAX_MATCH :].tolist(), prompt.first_tokens.tolist()
        paddings = prompt.num_padding.tolist()
        self._rows = [
            _Row([*end[max(padding - width + len(end), 0) :], first])
            for end, padding, first in zip(ends, paddings, firsts, strict=True)
        ]

    @override
    def forget(self) -> None:
        if self._history is not None:
            self._rows = []  # their output is not in the history yet
            self._history.clear()
            self._index = self._history.index()

    @override
    def root(self, row: int) -> Any:
        if not len(self._index):
            return None
        known = self._rows[row]
        context = known.text[-MAX_MATCH:]
        if known.longest is not None:
            known.match = self._index.find_longest(context, longest=known.longest)
            known.longest = None
        return known.match, context

    @override
    def advance(self, state: Any, token: int) -> Any:
        match, context = state
        context = [*context[1 - MAX_MATCH :], token]
        longest = MIN_MATCH
        if match is not None:
            narrowed = self._index.narrow(match, token)
            if narrowed is not None:
                return narrowed, context
            longest = min(match[2], MAX_MATCH)
        return self._index.find_longest(context, longest=longest), context

    @override
    def candidates(self, state: Any, noise: NoiseRow | None) -> list[tuple[int, int]]:
        match = state[0]
        if match is None:
            return []
        found = self._index.followers(match)
        key = len(_START_RATES[0]) * bisect_left(_LONGER_THAN, match[2])
        if len(found) > 1:
            later = key + _LATER
            return [
                (token, later if rank else key + _FIRST)
                for rank, (token, _) in enumerate(found[:_MAX_CANDIDATES])
            ]
        return [(token, key + (_ONLY if count == 1 else _AGREED)) for token, count in found]

    @override
    def commit(self, row: int, emitted: list[int]) -> None:
        known = self._rows[row]
        known.text += emitted
        longest = known.longest
        if longest is None:
            longest = MIN_MATCH - 1 if known.match is None else known.match[2]
            for token in emitted:
                if known.match is None:
                    break
                known.match = self._index.narrow(known.match, token)
            if known.match is not None and known.match[2] <= MAX_MATCH:
                return
        # A longer match might end in the middle of a draft: what is sorted has an end.
        known.longest = min(longest + len(emitted), MAX_MATCH)


def vocabulary_fingerprint(config: PreTrainedConfig) -> str:
    """Return what says that models read the same tokens, as far as a config shows it.

    Models that were trained further from one base share it, as they share the tokenizer.
    """
    text = config.get_text_config()
    ends = [getattr(text, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")]
    return f"{text.model_type} {text.vocab_size} {ends}"
