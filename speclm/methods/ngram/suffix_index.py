"""Finds all occurrences of some tokens in a text, from memory or from a file."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save

from speclm.config import MAX_DEPTH
from speclm.errors import (
    CheckpointError,
    OptionError,
    VocabularyMismatchError,
    shown,
)
from speclm.files.atomic import write_file
from speclm.files.weights import reading

SEPARATOR = -1
"""Stands after each document, and equals no token."""

MIN_MATCH = 2
"""Shortest match that is drafted from."""

MAX_MATCH = 16
"""Longest match that is looked for at the end of a text; in a draft it may get longer."""

MAX_TOKENS = 2**31 - 1
"""Maximum tokens of an index, separators included."""

MAX_VOCAB = 1 << 24
"""Tokens are less: memory is used for each up to the largest one."""

_SORTED = MAX_MATCH + MAX_DEPTH  # tokens by which suffixes are sorted: the longest match
_MAX_SAMPLES = 32  # followers that are looked at
_UNKNOWN: Any = object()
_MAX_PAIRS = 1 << 14  # looked up before; some 4 MB
_CHUNK = 1 << 20
_EXPECTED = (
    "a whole file of `speclm index`; it is missing, truncated or of something else, write it again"
)
_FORMAT = {"format": "speclm.suffix_index", "version": "1", "sorted_length": str(_SORTED)}

Tokens = NDArray[np.int32]

Match = tuple[int, int, int]
"""Suffixes ``[low, high)`` of an index in sorted order, and how many of their tokens match."""


class SuffixIndex:
    """An index over documents, which finds all occurrences of some tokens; it does not change.

    Args:
        text: Tokens of the documents, a `SEPARATOR` after each and as many as a match may have
            tokens at the end.
        order: Start of every suffix of `text` that starts with a token, sorted by the suffixes'
            first tokens, up to the longest match.
    """

    def __init__(self, text: Tokens, order: Tokens) -> None:
        self._arrays = text, order
        self._text, self._order = _view(text), _view(order)
        self._pairs: dict[tuple[int, int], Match | None] = {}
        self._starts = _view(np.cumsum(np.concatenate(([0], _count(text)))))

    @classmethod
    def build(cls, documents: Iterable[Sequence[int] | Tokens]) -> "SuffixIndex":
        """Index documents; takes some 80 ms for 100,000 tokens, and 1.2 s for a million.

        Args:
            documents: Tokens of each. No match extends over the end of one.

        Raises:
            OptionError: If a token is negative or too large, or there are too many.
        """
        parts: list[Tokens] = []
        for document in documents:
            tokens = np.asarray(document, dtype=np.int64)
            if tokens.size and not 0 <= tokens.min() <= tokens.max() < MAX_VOCAB:
                wrong = tokens.min() if tokens.min() < 0 else tokens.max()
                raise OptionError(
                    f"document {len(parts) // 2} has the token {int(wrong)}, expected token ids "
                    f"in [0, {MAX_VOCAB}); drop padding and masked tokens"
                )
            parts += [tokens.astype(np.int32), np.full(1, SEPARATOR, dtype=np.int32)]
        text = np.concatenate([*parts, np.full(_SORTED, SEPARATOR, dtype=np.int32)])
        if text.size > MAX_TOKENS:
            raise OptionError(
                f"the documents have {text.size} tokens, expected at most {MAX_TOKENS}; index "
                "fewer of them"
            )
        return cls(text, _sorted_suffixes(text))

    @classmethod
    def load(cls, path: Path, *, vocab_size: int, fingerprint: str) -> "SuffixIndex":
        """Return the index in a file, which stays there: memory is used for parts in use only.

        One pass over the file checks that every look-up stays within it. It does not check the
        order of the suffixes: a wrong one gives wrong drafts, which cost time and change no token.
        While it is in use the file may be replaced, as `save` does, but not be cut.

        Args:
            path: The file.
            vocab_size: Width of the target's logits.
            fingerprint: That of the target, from `vocabulary_fingerprint`.

        Raises:
            CheckpointError: If the file is missing, truncated or damaged, or no index.
            VocabularyMismatchError: If the index is one for another vocabulary.
        """
        with reading(path, _EXPECTED):
            # Of the frameworks, only this one leaves tensors in the file.
            with safe_open(path, framework="pt", device="cpu") as file:
                found = file.metadata() or {}
                keys = sorted(file.keys())
                tensors = [file.get_tensor(key) for key in keys]
            wrong = {name: found.get(name) for name in _FORMAT if found.get(name) != _FORMAT[name]}
            if wrong or keys != ["order", "text"]:
                raise CheckpointError(
                    f"{path}: found tensors {shown(keys)} and {shown(wrong)}, expected an index of "
                    f"{_FORMAT!r}; name a file that `speclm index` wrote with this version"
                )
            expected = {"vocab_size": str(vocab_size), "fingerprint": fingerprint}
            for name, value in expected.items():
                if found.get(name) != value:
                    raise VocabularyMismatchError(
                        f"{path}: the index is for {name} {shown(found.get(name))}, the base has "
                        f"{value!r}; write one for this base with `speclm index`"
                    )
            if any(tensor.dtype != torch.int32 or tensor.dim() != 1 for tensor in tensors):
                kinds = [f"{tensor.dtype} of shape {tuple(tensor.shape)}" for tensor in tensors]
                raise _damaged(path, f"the tensors are {kinds!r}")
            order, text = (tensor.numpy() for tensor in tensors)
            _check(path, text, order, vocab_size)
            return cls(text, order)

    def save(self, path: Path, *, vocab_size: int, fingerprint: str) -> None:
        """Write the index to a file that appears whole or not at all.

        Args:
            path: The file; 8 bytes a token.
            vocab_size: As in `load`.
            fingerprint: As in `load`.

        Raises:
            OptionError: If the vocabulary does not have all tokens.
            OSError: If it cannot be written.
        """
        text, order = self._arrays
        if int(text.max()) >= vocab_size:
            raise OptionError(
                f"the index has the token {int(text.max())}, expected less than vocab_size "
                f"{vocab_size}; tokenize with the tokenizer of the base"
            )
        described = {**_FORMAT, "vocab_size": str(vocab_size), "fingerprint": fingerprint}
        write_file(path, save({"text": text, "order": order}, metadata=described))

    def __len__(self) -> int:
        """Return the number of tokens, separators not counted."""
        return len(self._order)

    def __reduce__(self) -> tuple[Any, ...]:
        return SuffixIndex, self._arrays

    def __deepcopy__(self, memo: object) -> "SuffixIndex":
        return self

    def find(self, tokens: Sequence[int]) -> Match | None:
        """Return the suffixes that start with some tokens; None if there are none.

        Args:
            tokens: At least one; token ids.
        """
        match = self._find_one(tokens[0]) if len(tokens) == 1 else self._find_pair(*tokens[:2])
        for token in tokens[2:]:
            if match is None:
                break
            match = self.narrow(match, token)
        return match

    def _find_one(self, token: int) -> Match | None:
        if token >= len(self._starts) - 1 or self._starts[token] == self._starts[token + 1]:
            return None
        return self._starts[token], self._starts[token + 1], 1

    def _find_pair(self, first: int, second: int) -> Match | None:
        """Look a pair up, which takes longer than all that follows, and often is the same one."""
        pair = first, second
        known: Match | None = self._pairs.get(pair, _UNKNOWN)
        if known is not _UNKNOWN:
            return known
        match = self._find_one(first)
        if match is not None:
            match = self.narrow(match, second)
        if len(self._pairs) >= _MAX_PAIRS:
            self._pairs.clear()
        self._pairs[pair] = match
        return match

    def find_longest(self, context: Sequence[int], *, longest: int = MAX_MATCH) -> Match | None:
        """Return the suffixes that start with as many of the last tokens of a text as possible.

        Args:
            context: The text, or its end.
            longest: Maximum tokens of the match, at most `MAX_MATCH`.

        Returns:
            None if not even the last `MIN_MATCH` tokens occur.
        """
        length, longest = MIN_MATCH, min(longest, len(context))
        best = self.find(context[-length:]) if length <= longest else None
        if best is None:
            return None
        step = 1
        while length < longest:  # shorter ones occur wherever a longer one does
            tried = min(length + step, longest)
            found = self.find(context[-tried:])
            if found is None:
                longest, step = tried - 1, max((tried - length) // 2, 1)
            else:
                best, length, step = found, tried, 2 * step
        return best

    def narrow(self, match: Match, token: int) -> Match | None:
        """Return those suffixes of a match that go on with a token; None if there are none."""
        low, high, length = match
        text, order = self._text, self._order
        if length >= _SORTED:
            return None
        if high - low == 1:  # most matches of some length
            return (low, high, length + 1) if text[order[low] + length] == token else None

        def following(start: int) -> int:
            return text[start + length]

        low = bisect_left(order, token, low, high, key=following)
        if low == high or text[order[low] + length] != token:
            return None
        return low, bisect_right(order, token, low, high, key=following), length + 1

    def followers(self, match: Match) -> list[tuple[int, int]]:
        """Return the tokens that follow a match, most frequent first, each with its count.

        Where they differ, at most 32 suffixes are counted, evenly spaced.
        """
        low, high, length = match
        text, order, num = self._text, self._order, high - low
        first = text[order[low] + length]
        if first == text[order[high - 1] + length]:  # they are sorted
            return [] if first == SEPARATOR else [(first, num)]
        if num > _MAX_SAMPLES:
            starts = [order[low + i * num // _MAX_SAMPLES] for i in range(_MAX_SAMPLES)]
        else:
            starts = order[low:high].tolist()
        counts: dict[int, int] = {}
        for start in starts:
            token = text[start + length]
            counts[token] = counts.get(token, 0) + 1
        counts.pop(SEPARATOR, None)
        return sorted(counts.items(), key=itemgetter(1), reverse=True)


def _sorted_suffixes(text: Tokens) -> Tokens:
    """Return the starts of the suffixes that start with a token, sorted by `_SORTED` tokens.

    Ranks of the suffixes by some tokens give their ranks by several times as many: as many ranks
    as 63 bits hold, those of a suffix and of later ones, make a number to sort by.
    """
    ranks = text.astype(np.int64) + 1
    length = 1
    while True:
        bits = int(ranks.max()).bit_length()
        num = min(63 // max(bits, 1), -(-_SORTED // length))
        numbers = ranks.copy()
        for offset in range(length, num * length, length):
            numbers <<= bits
            numbers[:-offset] |= ranks[offset:]
        order = np.argsort(numbers)
        length *= num
        if length >= _SORTED:
            return order[text[order] >= 0].astype(np.int32)
        numbers = numbers[order]
        ranks[order] = np.cumsum(np.concatenate(([0], numbers[1:] != numbers[:-1])))


def _view(array: NDArray[Any]) -> "memoryview[int]":
    """Return a view that reads elements several times as fast as the array, and copies nothing."""
    return memoryview(cast("Any", array))


def _count(text: Tokens) -> NDArray[np.int64]:
    """Return how often each token occurs; the length is that of the largest one, and one more."""
    counts = np.zeros(int(text.max()) + 1, dtype=np.int64)
    for start in range(0, text.size, _CHUNK):  # it is converted, and may be larger than memory
        chunk = text[start : start + _CHUNK]
        counts += np.bincount(chunk[chunk >= 0], minlength=counts.size)
    return counts


def _check(path: Path, text: Tokens, order: Tokens, vocab_size: int) -> None:
    """Check that the arrays of a file hold nothing that a look-up could not use."""
    if text.size < _SORTED or (text[-_SORTED:] != SEPARATOR).any():
        raise _damaged(path, f"the last {_SORTED} of {text.size} tokens are no separators")
    if text.min() < SEPARATOR or text.max() >= vocab_size:
        raise _damaged(
            path, f"tokens are from {text.min()} to {text.max()} with a vocabulary of {vocab_size}"
        )
    chunks = (text[start : start + _CHUNK] for start in range(0, text.size, _CHUNK))
    num_tokens = sum(int(np.count_nonzero(chunk != SEPARATOR)) for chunk in chunks)
    if order.size != num_tokens:
        raise _damaged(path, f"{order.size} suffixes are sorted of {num_tokens}")
    if order.size and not 0 <= order.min() <= order.max() < text.size - _SORTED:
        raise _damaged(
            path, f"suffixes start from {order.min()} to {order.max()} in {text.size} tokens"
        )


def _damaged(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {found}, expected a whole index of int32 numbers; it is damaged, write it again "
        "with `speclm index`"
    )
