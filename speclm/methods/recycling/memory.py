"""What the target thought likely after each token and each pair of tokens.

Source: Luo et al. 2024, Token Recycling.
"""

import sys
from array import array
from pathlib import Path
from typing import Any, Self

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from speclm.config import require_count, require_size
from speclm.errors import OptionError
from speclm.methods.recycling.checkpoint import (
    LOWEST_LOG_PROB,
    MAX_CANDIDATES,
    StoredMemory,
    read_memory,
    write_memory,
)

MAX_PAIRS = 100_000
"""Maximum pairs of a memory if no number is given; they take about 18 MB."""

_LARGEST_BOUND = 2**31 - 1
_FIRST_ROWS = 1024
_EVICTED_SHARE = 16  # one entry in so many is evicted at once
_EVICTIONS_PER_COPY = 8
_BYTES_PER_ENTRY = sys.getsizeof(2**31) + sys.getsizeof(2**31)  # key and row of a dict, aligned


class CandidateMemory:
    """The most likely next tokens at the last visit to each token and each pair of tokens.

    What is known of single tokens is never forgotten, since there are only `vocab_size` of them.
    Of pairs the least recently used are evicted, one in 16 at once. It lies on the host, and one
    generation may use it at a time.

    Example:
        >>> memory = CandidateMemory(vocab_size=10, num_candidates=2)
        >>> memory.store([-1, 3], [3, 4], np.array([[4, 5], [6, 7]]), np.full((2, 2), -0.5))
        >>> memory.find(3, 4)
        (1, [6, 7], [-0.5, -0.5])
        >>> memory.find(9, 4)
        (0, [6, 7], [-0.5, -0.5])
    """

    def __init__(
        self, *, vocab_size: int, num_candidates: int = 8, max_pairs: int = MAX_PAIRS
    ) -> None:
        """Create an empty memory.

        Args:
            vocab_size: Width of the target's logits.
            num_candidates: Next tokens kept of each visit, at most `vocab_size` of them.
            max_pairs: Maximum pairs; 0 for single tokens only.

        Raises:
            OptionError: If a number is out of range.
        """
        require_size("vocab_size", vocab_size)
        require_count("num_candidates", num_candidates, low=1, high=MAX_CANDIDATES)
        require_count("max_pairs", max_pairs, low=0, high=_LARGEST_BOUND)
        self.vocab_size = vocab_size
        self.num_candidates = min(num_candidates, vocab_size)
        self.max_pairs = max_pairs
        self._num_answers = [0, 0, 0]  # by the single token, by the pair, none
        self._has_changed = False
        # Memory of zeros is not taken until it is written to.
        shape = (vocab_size, self.num_candidates)
        self._is_known = bytearray(vocab_size)  # quicker to look up than an array
        self._token_ids = np.zeros(shape, np.int32)
        self._token_log_probs = np.zeros(shape, np.float16)
        self._forget_pairs()

    @property
    def num_tokens(self) -> int:
        """Single tokens whose candidates are known."""
        return self._is_known.count(1)

    @property
    def num_pairs(self) -> int:
        """Pairs of tokens whose candidates are known."""
        return len(self._rows)

    @property
    def num_bytes(self) -> int:
        """Bytes of the host that it takes, counting single tokens as if all were known."""
        numbers = (
            *(self._token_ids, self._token_log_probs),
            *(self._keys, self._pair_ids, self._pair_log_probs),
        )
        others = (self._is_known, self._last_use, self._rows, self._free)
        entries = _BYTES_PER_ENTRY * (len(self._rows) + len(self._free))
        return sum(part.nbytes for part in numbers) + sum(map(sys.getsizeof, others)) + entries

    @property
    def num_lookups(self) -> int:
        """Calls of `find`."""
        return sum(self._num_answers)

    @property
    def num_hits(self) -> tuple[int, int]:
        """Look-ups that were answered by the single token, and by the pair."""
        return self._num_answers[0], self._num_answers[1]

    @property
    def has_changed(self) -> bool:
        """Whether it differs from what was created, saved, loaded or restored last."""
        return self._has_changed

    def find(self, previous: int, token: int) -> tuple[int, list[int], list[float]] | None:
        """Return what the target thought likely after a token, and mark the pair as used.

        Args:
            previous: Token before it; -1 if there is none.
            token: Last token of the text.

        Returns:
            1 if the pair was known or 0 if only the single token was, candidates best first, and
            their log-probabilities. None if neither was known.
        """
        row = self._rows.get(previous * self.vocab_size + token)  # a negative key is never known
        if row is not None:
            self._clock += 1
            self._last_use[row] = self._clock
            self._num_answers[1] += 1
            return 1, self._pair_ids[row].tolist(), self._pair_log_probs[row].tolist()
        if not self._is_known[token]:
            self._num_answers[2] += 1
            return None
        self._num_answers[0] += 1
        return 0, self._token_ids[token].tolist(), self._token_log_probs[token].tolist()

    def knows(self, previous: int, token: int) -> bool:
        """Return whether candidates of a pair are known; of a single token if previous is -1."""
        if previous < 0:
            return bool(self._is_known[token])
        return previous * self.vocab_size + token in self._rows

    def store(
        self,
        previous: list[int],
        tokens: list[int],
        ids: Int[np.ndarray, "nodes candidates"],
        log_probs: Float[np.ndarray, "nodes candidates"],
    ) -> None:
        """Remember the candidates of visited positions; of two equal ones the later counts.

        Args:
            previous: Token before each position's; -1 where there is none.
            tokens: Token at each position, in the vocabulary.
            ids: `num_candidates` likely next tokens of each, best first.
            log_probs: Theirs. They are rounded to float16; what is no log-probability becomes the
                nearest one, and NaN the lowest.

        Raises:
            OptionError: If the sizes do not agree.
        """
        expected = (len(tokens), self.num_candidates)
        if len(previous) != len(tokens) or ids.shape != expected or log_probs.shape != expected:
            raise OptionError(
                f"ids are {ids.shape} and log_probs {log_probs.shape} after {len(previous)} "
                f"previous tokens, expected {expected}; pass num_candidates of every position"
            )
        if not tokens:
            return
        rounded = np.fmax(np.minimum(log_probs, 0), LOWEST_LOG_PROB).astype(np.float16)
        where = np.array(tokens)
        self._known_tokens[where] = 1
        self._token_ids[where] = ids
        self._token_log_probs[where] = rounded
        self._has_changed = True
        if self.max_pairs == 0:
            return
        rows = self._visit(previous, tokens)
        if len(rows) < len(tokens):
            is_pair = np.array(previous) >= 0
            ids, rounded = ids[is_pair], rounded[is_pair]
        self._pair_ids[rows] = ids
        self._pair_log_probs[rows] = rounded

    def clear(self) -> None:
        """Forget all candidates; what was counted stays."""
        self._has_changed |= self.num_tokens > 0
        self._known_tokens[:] = 0
        self._forget_pairs()

    def merge(self, other: "CandidateMemory") -> None:
        """Add what another memory knows and this one does not.

        The other's pairs count as less recently used than all of this one's: if there is no room
        for all, the other's most recently used ones are added.

        Args:
            other: A memory of the same model, which stays as it is.

        Raises:
            OptionError: If its vocabulary or number of candidates differs.
        """
        sizes = (self.vocab_size, self.num_candidates)
        if (other.vocab_size, other.num_candidates) != sizes:
            raise OptionError(
                f"the other memory keeps {other.num_candidates} candidates in a vocabulary of "
                f"{other.vocab_size}, expected {sizes[1]} in one of {sizes[0]}; merge memories of "
                "one model that keep equally many"
            )
        tokens = np.flatnonzero(other._known_tokens > self._known_tokens)
        self._known_tokens[tokens] = 1
        self._token_ids[tokens] = other._token_ids[tokens]
        self._token_log_probs[tokens] = other._token_log_probs[tokens]
        new = [key for key in other._by_age().tolist() if key not in self._rows]
        new = new[max(len(new) - self.max_pairs + len(self._rows), 0) :]
        self._has_changed |= bool(len(tokens)) or bool(new)
        if not new:
            return
        oldest = min((self._last_use[row] for row in self._rows.values()), default=self._clock)
        theirs, rows = [other._rows[key] for key in new], [self._row_of(key) for key in new]
        np.asarray(self._last_use)[rows] = np.arange(oldest - len(new), oldest)
        self._pair_ids[rows] = other._pair_ids[theirs]
        self._pair_log_probs[rows] = other._pair_log_probs[theirs]

    def save(self, path: str | Path, *, fingerprint: str) -> None:
        """Write a safetensors file, which appears whole or not at all.

        Args:
            path: The file; its folder has to exist.
            fingerprint: Of the model, from `memory_fingerprint`.

        Raises:
            OptionError: If it cannot be written; an old file stays.
        """
        write_memory(Path(path), self.stored(), vocab_size=self.vocab_size, fingerprint=fingerprint)
        self._has_changed = False

    def stored(self) -> StoredMemory:
        """Return a copy of what it knows, as a file has it."""
        tokens, keys = np.flatnonzero(self._known_tokens), self._by_age()
        rows = [self._rows[key] for key in keys.tolist()]
        return StoredMemory(
            tokens=tokens.astype(np.int32),
            token_ids=self._token_ids[tokens],
            token_log_probs=self._token_log_probs[tokens],
            pairs=keys,
            pair_ids=self._pair_ids[rows],
            pair_log_probs=self._pair_log_probs[rows],
        )

    def restore(self, stored: StoredMemory) -> None:
        """Know what was stored from a memory of these sizes, and nothing else."""
        self.clear()
        self._known_tokens[stored.tokens] = 1
        self._token_ids[stored.tokens] = stored.token_ids
        self._token_log_probs[stored.tokens] = stored.token_log_probs
        rows = [self._row_of(key) for key in stored.pairs.tolist()]
        np.asarray(self._last_use)[rows] = np.arange(len(rows))
        self._clock = len(rows)
        self._pair_ids[rows] = stored.pair_ids
        self._pair_log_probs[rows] = stored.pair_log_probs
        self._has_changed = False

    @classmethod
    def load(
        cls, path: str | Path, *, vocab_size: int, fingerprint: str, max_pairs: int = MAX_PAIRS
    ) -> Self:
        """Read a memory that `save` has written, perhaps damaged or changed since.

        Args:
            path: The file.
            vocab_size: Width of the target's logits.
            fingerprint: Of the model, from `memory_fingerprint`.
            max_pairs: Maximum pairs; of more in the file, the most recently used are read.

        Raises:
            CheckpointError: If it is no memory, damaged, or another model's.
            OptionError: If a number is out of range.
        """
        require_size("vocab_size", vocab_size)
        require_count("max_pairs", max_pairs, low=0, high=_LARGEST_BOUND)
        stored = read_memory(
            Path(path), vocab_size=vocab_size, fingerprint=fingerprint, max_pairs=max_pairs
        )
        num_candidates = stored.token_ids.shape[1]
        memory = cls(vocab_size=vocab_size, num_candidates=num_candidates, max_pairs=max_pairs)
        memory.restore(stored)
        return memory

    def _forget_pairs(self) -> None:
        self._rows: dict[int, int] = {}  # by previous * vocab_size + token
        self._free: list[int] = []  # rows of evicted pairs
        self._clock = 0
        self._num_evictions = 0
        self._keys = np.zeros(0, np.int64)
        self._last_use: array[int] = array("q")
        self._pair_ids: NDArray[np.int32] = np.zeros((0, self.num_candidates), np.int32)
        self._pair_log_probs: NDArray[np.float16] = np.zeros((0, self.num_candidates), np.float16)

    @property
    def _known_tokens(self) -> NDArray[np.uint8]:
        return np.frombuffer(self._is_known, np.uint8)

    def _visit(self, previous: list[int], tokens: list[int]) -> NDArray[np.int64]:
        """Return the rows of the pairs, and mark them as used in that order.

        A row that an eviction gave to a later pair of these is in it twice.
        """
        find, vocab_size, rows = self._rows.get, self.vocab_size, list[int]()
        for before, token in zip(previous, tokens, strict=True):
            if before < 0:
                continue
            key = before * vocab_size + token
            row = find(key)
            if row is None:
                row = self._row_of(key)
                find = self._rows.get  # an eviction may have copied it
            self._clock += 1
            self._last_use[row] = self._clock
            rows.append(row)
        return np.array(rows, np.int64)

    def _row_of(self, key: int) -> int:
        """Return the row of a pair; a new pair gets one, for which others may be evicted."""
        found = self._rows.get(key)
        if found is not None:
            return found
        if not self._free and len(self._rows) == self.max_pairs:
            self._evict()
        row = self._free.pop() if self._free else len(self._rows)
        if row == len(self._keys):
            self._grow()
        self._rows[key] = row
        self._keys[row] = key
        return row

    def _grow(self) -> None:
        size = min(max(2 * len(self._keys), _FIRST_ROWS), self.max_pairs)
        self._keys = _extended(self._keys, size)
        self._last_use.extend([0] * (size - len(self._last_use)))
        self._pair_ids = _extended(self._pair_ids, size)
        self._pair_log_probs = _extended(self._pair_log_probs, size)

    def _evict(self) -> None:
        """Forget the least recently used pairs; every row is in use."""
        count = max(self.max_pairs // _EVICTED_SHARE, 1)
        oldest = np.argpartition(np.asarray(self._last_use), count - 1)[:count]
        for key in self._keys[oldest].tolist():
            del self._rows[key]
        self._free = oldest.tolist()
        self._num_evictions += 1
        if self._num_evictions % _EVICTIONS_PER_COPY == 0:
            self._rows = dict(self._rows)  # one that only sees deletions doubles its table

    def _by_age(self) -> NDArray[np.int64]:
        """Return the keys of all pairs, the least recently used first."""
        rows = np.fromiter(self._rows.values(), np.int64, len(self._rows))
        return self._keys[rows[np.argsort(np.asarray(self._last_use)[rows], kind="stable")]]


def _extended(numbers: NDArray[Any], size: int) -> NDArray[Any]:
    longer = np.zeros((size, *numbers.shape[1:]), numbers.dtype)
    longer[: len(numbers)] = numbers
    return longer
