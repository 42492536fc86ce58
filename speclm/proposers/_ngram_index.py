"""What followed each n-gram of a text, and how likely it is to follow again."""

from collections.abc import Iterable

MAX_FOLLOWERS = 8
"""Most tokens that are remembered after one n-gram: among more of them none is likely."""

# Fitted by simulation to 1600 answers of the bundled base to training prompts (text-to-SQL and
# word problems, greedy and at temperature 1). What followed an n-gram its only time followed
# again in 39 to 84 of 100 cases, with no clear trend in the length of the n-gram: start from the
# middle, and trust the row's own record after some sixteen observations.
_ONCE_CHANCE = 0.6
_ONCE_WEIGHT = 16.0
# Counts are discounted as in prediction by partial matching (Howard 1993): little where all
# occurrences agree, more where they do not.
_AGREED_DISCOUNT = 0.35
_SPLIT_DISCOUNT = 0.6


class NgramIndex:
    """The followers of every n-gram of one row.

    Args:
        tokens: Text so far, oldest token first.
        max_ngram: Longest n-gram that is looked up.
    """

    def __init__(self, tokens: Iterable[int], *, max_ngram: int) -> None:
        self._max_ngram = max_ngram
        self._followers: dict[tuple[int, ...], dict[int, int]] = {}  # counts, most recent last
        self._once_hits = _ONCE_CHANCE * _ONCE_WEIGHT
        self._once_seen = _ONCE_WEIGHT
        self._context: tuple[int, ...] = ()
        for token in tokens:  # how little a prompt repeats itself says nothing about its answer
            self._append(token)

    @property
    def context(self) -> tuple[int, ...]:
        """The last tokens of the text, as many as an n-gram may have."""
        return self._context

    def slide(self, context: tuple[int, ...], token: int) -> tuple[int, ...]:
        """Return the context one token later."""
        return (*context, token)[-self._max_ngram :]

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens to the text, and learn from them how far a single occurrence holds."""
        for token in tokens:
            is_hit = self._append(token)
            if is_hit is not None:
                self._once_hits += is_hit
                self._once_seen += 1

    def guess(self, context: tuple[int, ...], *, limit: int) -> list[tuple[int, float]]:
        """Return at most `limit` tokens that may follow, each with its chance.

        They followed the longest known n-gram at the end of `context`; most frequent first, and
        of equals the most recent.
        """
        counts: dict[int, int] = {}
        for length in range(1, len(context) + 1):
            longer = self._followers.get(context[-length:])
            if longer is None:
                break  # what holds this n-gram is not known either
            counts = longer
        if len(counts) == 1:
            ((token, count),) = counts.items()
            is_once = count == 1
            chance = self._once_hits / self._once_seen if is_once else 1 - _AGREED_DISCOUNT / count
            return [(token, chance)]
        total = sum(counts.values())
        latest_first = reversed(counts)
        ranked = sorted(latest_first, key=counts.__getitem__, reverse=True)
        return [(token, (counts[token] - _SPLIT_DISCOUNT) / total) for token in ranked[:limit]]

    def _append(self, token: int) -> bool | None:
        """Append one token; tell whether `guess` had it, if it had one occurrence to go by."""
        context = self._context
        is_hit: bool | None = None
        for length in range(1, len(context) + 1):
            ngram = context[-length:]
            counts = self._followers.get(ngram)
            if counts is None:
                self._followers[ngram] = {token: 1}
                continue
            # The longest known n-gram, which is the one that decides, comes here last.
            is_once = len(counts) == 1 and 1 in counts.values()
            is_hit = token in counts if is_once else None
            counts[token] = counts.pop(token, 0) + 1
            if len(counts) > MAX_FOLLOWERS:
                del counts[next(iter(counts))]
        self._context = self.slide(context, token)
        return is_hit
