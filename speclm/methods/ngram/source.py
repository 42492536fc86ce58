"""The followers of every n-gram of the prompt and the output."""

from collections.abc import Iterable

from typing_extensions import override

from speclm.drafting.interface import Prefill
from speclm.drafting.sources import CandidateSource, NoiseRow, State

MAX_NGRAM = 9
"""Longest n-gram that is looked up by default: longer matches are hardly likelier to go on."""

MAX_FOLLOWERS = 8
"""Maximum tokens that are remembered after one n-gram: among more of them none is likely."""

_MAX_CANDIDATES = 4

# Keys. Where one token followed every time: by the length of the match, whether the token last
# followed in the output, and whether it followed more than once. The rates are from 416 answers of
# the bundled base to training prompts (text-to-SQL and word problems).
_LENGTHS = (0, 0, 1, 2, 2, 2, 3, 3, 3, 4)  # bucket of each match length: 1, 2, 3-5, 6-8, 9 or more
_AGREED_RATES = (
    *(0.55, 0.80, 0.70, 0.83),  # once in the prompt, more often; the same in the output
    *(0.68, 0.94, 0.72, 0.90),
    *(0.60, 0.90, 0.80, 0.90),
    *(0.65, 0.90, 0.88, 0.92),
    *(0.75, 0.90, 0.90, 0.97),
)
_NUM_AGREED_KINDS = 4
# Where several tokens followed: by whether the match is longer than one token, the role of the
# token, whether it last followed in the output, and whether it followed more than once.
_FIRST, _LATEST, _OTHER = range(3)  # the first that followed; the last; neither
_NUM_ROLES = 3
_SPLIT_RATES = (
    *(0.25, 0.55, 0.25, 0.35),  # the first: in the prompt, more often; in the output, more often
    *(0.07, 0.27, 0.28, 0.48),  # the last
    *(0.12, 0.20, 0.10, 0.20),
    *(0.17, 0.50, 0.25, 0.45),
    *(0.23, 0.50, 0.45, 0.62),
    *(0.06, 0.20, 0.15, 0.20),
)


Match = tuple[dict[int, tuple[int, int]] | None, int]
"""Followers of an n-gram, and its length; None and 0 if there is none."""


class NgramIndex:
    """The followers of every n-gram of one row.

    Args:
        tokens: The prompt, oldest token first.
        max_ngram: Longest n-gram that is looked up.
    """

    def __init__(self, tokens: Iterable[int], *, max_ngram: int) -> None:
        self._max_ngram = max_ngram
        # By n-gram: for each follower, the first one first, how often and where last it followed.
        self._followers: dict[tuple[int, ...], dict[int, tuple[int, int]]] = {}
        self._length = 0
        self.context: tuple[int, ...] = ()
        """The last tokens of the text, as many as an n-gram may have."""
        self.extend(tokens)
        self._output_start = self._length

    def slide(self, context: tuple[int, ...], token: int) -> tuple[int, ...]:
        """Return the context one token later."""
        return (*context, token)[-self._max_ngram :]

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens to the text."""
        followers, context = self._followers, self.context
        for token in tokens:
            for start in range(len(context)):
                ngram = context[start:]
                found = followers.get(ngram)
                if found is None:
                    followers[ngram] = {token: (1, self._length)}
                    continue
                known = found.get(token)
                found[token] = (1 if known is None else known[0] + 1, self._length)
                if len(found) > MAX_FOLLOWERS:
                    del found[min(found, key=lambda other: found[other][1])]
            context = self.slide(context, token)
            self._length += 1
        self.context = context

    def match(self, context: tuple[int, ...], *, longest: int = 0) -> Match:
        """Return the longest known n-gram at the end of `context`.

        Args:
            context: Last tokens of a text.
            longest: Tokens that it has at most, which are tried first; 0 if that is not known.
        """
        followers = self._followers.get
        if longest:
            found = followers(context[-longest:])
            if found is not None:
                return found, min(longest, len(context))
        found, length = None, 0
        for start in range(len(context) - 1, -1, -1):
            longer = followers(context[start:])
            if longer is None:
                break  # what holds this n-gram is not known either
            found, length = longer, length + 1
        return found, length

    def candidates(self, match: Match) -> list[tuple[int, int]]:
        """Return tokens that followed an n-gram, and their keys.

        Of several, the last one in the output comes first, then those that followed more often.
        """
        found, length = match
        if found is None:
            return []
        output_start = self._output_start
        if len(found) == 1:
            ((token, (count, position)),) = found.items()
            kind = 2 * (position >= output_start) + (count > 1)
            bucket = _LENGTHS[min(length, len(_LENGTHS) - 1)]
            return [(token, bucket * _NUM_AGREED_KINDS + kind)]
        base = len(_AGREED_RATES) + (length > 1) * _NUM_ROLES * _NUM_AGREED_KINDS
        latest = max(position for _, position in found.values())
        keyed = []
        for index, (token, (count, position)) in enumerate(found.items()):
            role = _LATEST if position == latest else _FIRST if index == 0 else _OTHER
            kind = 2 * (position >= output_start) + (count > 1)
            keyed.append((token, base + role * _NUM_AGREED_KINDS + kind))
        keyed.sort(key=lambda pair: -_RATES[pair[1]])
        return keyed[:_MAX_CANDIDATES]


_RATES = _AGREED_RATES + _SPLIT_RATES


class NgramSource(CandidateSource):
    """Suggests what followed the longest n-gram that occurred before in the same row."""

    start_rates = _RATES

    def __init__(self, *, max_ngram: int = MAX_NGRAM) -> None:
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
        return index, index.context, index.match(index.context)

    @override
    def advance(self, state: State, token: int) -> State:
        index, context, (_, length) = state
        context = index.slide(context, token)
        # A longer match would have been one token shorter before.
        return index, context, index.match(context, longest=length + 1)

    @override
    def candidates(self, state: State, noise: NoiseRow | None) -> list[tuple[int, int]]:
        index, _, match = state
        found: list[tuple[int, int]] = index.candidates(match)
        return found

    @override
    def commit(self, row: int, emitted: list[int]) -> None:
        self._rows[row].extend(emitted)
