"""Ids of rows that are the same on every run and machine, and rows that were seen before."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

_COLUMNS = ("id", "conversation_id", "prompt_id", "question_id")


@dataclass(frozen=True, slots=True)
class Content:
    """A row to name.

    Args:
        text: Its conversation in the bytes that are written.
        given: Its id in the source; None if it has none.
        number: Its number over all sources, from 1.
    """

    text: bytes
    given: str | None
    number: int


def given_id(row: dict[str, Any]) -> str | None:
    """Return the id that a row brings along: a string or a whole number."""
    for column in _COLUMNS:
        value = row.get(column)
        if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
            return str(value)
    return None


class Namer:
    """Names rows.

    A row keeps the id of its source, unless an earlier row has the same one. Otherwise the id is a
    hash of the conversation, and of a repeated conversation a hash that includes the row's number.

    Args:
        deduplicate: Whether repeated conversations get no name.
    """

    def __init__(self, *, deduplicate: bool) -> None:
        self._deduplicate = deduplicate
        self._given, self._contents = HashSet(), HashSet()

    def name(self, rows: Sequence[Content]) -> list[str | None]:
        """Return an id for each row, and None for one that repeats an earlier one.

        Args:
            rows: The next rows; a few hundred at once are efficient.
        """
        hashes = [_hash(row.text) for row in rows]
        is_new = self._contents.add(_keys(hashes))
        dropped = [self._deduplicate and not new for new in is_new]
        with_id = [i for i, row in enumerate(rows) if row.given is not None and not dropped[i]]
        given = _keys([_hash(str(rows[i].given).encode("utf-8", "replace")) for i in with_id])
        keeps = {i for i, new in zip(with_id, self._given.add(given), strict=True) if new}
        names: list[str | None] = []
        for i, row in enumerate(rows):
            if dropped[i]:
                names.append(None)
            elif i in keeps:
                names.append(row.given)
            elif is_new[i]:
                names.append(hashes[i].hex())
            else:
                names.append(_hash(hashes[i] + str(row.number).encode()).hex())
        return names


class HashSet:
    """A set of 64-bit hashes that takes 8 bytes for each.

    It is a few sorted arrays, each at least twice as long as the next.
    """

    def __init__(self) -> None:
        self._runs: list[NDArray[np.uint64]] = []

    def add(self, hashes: NDArray[np.uint64]) -> list[bool]:
        """Add hashes, and return which were neither there nor earlier among `hashes`."""
        values, first = np.unique(hashes, return_index=True)
        is_known = np.zeros(len(values), dtype=bool)
        for run in self._runs:
            at = np.searchsorted(run, values)
            is_known |= run[np.minimum(at, len(run) - 1)] == values
        is_new = np.zeros(len(hashes), dtype=bool)
        is_new[first[~is_known]] = True
        if not is_known.all():
            self._runs.append(values[~is_known])
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            newest = self._runs.pop()
            self._runs[-1] = np.concatenate([self._runs[-1], newest])
            self._runs[-1].sort(kind="stable")  # quick for two sorted parts
        found: list[bool] = is_new.tolist()
        return found


def _hash(content: bytes) -> bytes:
    return blake2b(content, digest_size=16).digest()


def _keys(hashes: list[bytes]) -> NDArray[np.uint64]:
    """Return the first half of each hash as a number."""
    halves: NDArray[np.uint64] = np.frombuffer(b"".join(hashes), dtype="<u8")[::2]
    return halves
