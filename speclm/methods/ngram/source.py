"""The followers of every n-gram of the prompt and the output."""

from collections.abc import Iterable

from typing_extensions import override

from speclm.drafting.interface import Prefill
from speclm.drafting.sources import CandidateSource, NoiseRow, State

MAX_FOLLOWERS = 8
"""Most tokens that are remembered after one n-gram: among more of them none is likely."""

_LIMIT = 3  # candidates of one n-gram
_NUM_LENGTHS = 6
# Kinds of evidence: one occurrence; several that agree, two or more; the first of several followers
# with at least two thirds of the occurrences, with fewer; the second; any other.
_ONCE, _AGREED_TWICE, _AGREED, _MOSTLY, _FIRST, _SECOND, _LATER = range(7)
_NUM_KINDS = 7
_KIND_RATES = (0.55, 0.75, 0.85, 0.7, 0.45, 0.25, 0.12)
_LENGTH_FACTORS = (0.55, 0.8, 0.95, 1.05, 1.1, 1.15)


class NgramIndex:
    """The followers of every n-gram of one row.

    Args:
        tokens: Text so far, oldest token first.
        max_ngram: Longest n-gram that is looked up.
    """

    def __init__(self, tokens: Iterable[int], *, max_ngram: int) -> None:
        self._max_ngram = max_ngram
        self._followers: dict[tuple[int, ...], dict[int, int]] = {}  # counts, most recent last
        self.context: tuple[int, ...] = ()
        """The last tokens of the text, as many as an n-gram may have."""
        self.extend(tokens)

    def slide(self, context: tuple[int, ...], token: int) -> tuple[int, ...]:
        """Return the context one token later."""
        return (*context, token)[-self._max_ngram :]

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens to the text."""
        followers, context = self._followers, self.context
        for token in tokens:
            for start in range(len(context)):
                ngram = context[start:]
                counts = followers.get(ngram)
                if counts is None:
                    followers[ngram] = {token: 1}
                    continue
                counts[token] = counts.pop(token, 0) + 1
                if len(counts) > MAX_FOLLOWERS:
                    del counts[next(iter(counts))]
            context = self.slide(context, token)
        self.context = context

    def candidates(self, context: tuple[int, ...]) -> list[tuple[int, int]]:
        """Return tokens that may follow and their keys.

        They followed the longest known n-gram at the end of `context`; most frequent first, and
        of equals the most recent.
        """
        counts: dict[int, int] | None = None
        length = 0
        for start in range(len(context) - 1, -1, -1):
            longer = self._followers.get(context[start:])
            if longer is None:
                break  # what holds this n-gram is not known either
            counts, length = longer, length + 1
        if counts is None:
            return []
        base = (min(length, _NUM_LENGTHS) - 1) * _NUM_KINDS
        if len(counts) == 1:
            ((token, count),) = counts.items()
            kind = _ONCE if count == 1 else _AGREED_TWICE if count == 2 else _AGREED
            return [(token, base + kind)]
        latest_first = reversed(counts)
        ranked = sorted(latest_first, key=counts.__getitem__, reverse=True)[:_LIMIT]
        is_most = 3 * counts[ranked[0]] >= 2 * sum(counts.values())
        kinds = (_MOSTLY if is_most else _FIRST, _SECOND, _LATER)
        return [(token, base + kind) for token, kind in zip(ranked, kinds, strict=False)]


class NgramSource(CandidateSource):
    """Suggests what followed the longest n-gram that occurred before in the same row."""

    start_rates = tuple(
        min(rate * factor, 0.97) for factor in _LENGTH_FACTORS for rate in _KIND_RATES
    )

    def __init__(self, *, max_ngram: int) -> None:
        self._max_ngram = max_ngram
        self._rows: list[NgramIndex] = []

    @override
    def begin(self, prompt: Prefill) -> None:
        # Once per generation: the index lives on the host.
        rows, firsts = prompt.tokens.tolist(), prompt.first_tokens.tolist()
        paddings = prompt.num_padding.tolist()
        self._rows = [
            NgramIndex([*row[padding:], first], max_ngram=self._max_ngram)
            for row, padding, first in zip(rows, paddings, firsts, strict=True)
        ]

    @override
    def root(self, row: int) -> State:
        index = self._rows[row]
        return index, index.context

    @override
    def advance(self, state: State, token: int) -> State:
        index, context = state
        return index, index.slide(context, token)

    @override
    def candidates(self, state: State, noise: NoiseRow | None) -> list[tuple[int, int]]:
        index, context = state
        found: list[tuple[int, int]] = index.candidates(context)
        return found

    @override
    def commit(self, row: int, emitted: list[int]) -> None:
        self._rows[row].extend(emitted)
