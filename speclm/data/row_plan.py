"""Where the rows of a data file are, and which of them are answered together, by which process."""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from speclm.config import require_count
from speclm.data.dialogues import Message, NumberedRow, parse_row
from speclm.data.ids import HashSet
from speclm.errors import DataError, shown
from speclm.files.json_lines import JsonLine

MAX_SHARDS = 256
"""Maximum shards of one data set: their files are open together when they are merged."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_CHECKED_TOGETHER = 1024
_POOL_BATCHES = 64  # batches of similar lengths are cut from so many at a time


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of the work that one process does.

    Args:
        index: Number of the part, from 0.
        count: Number of parts.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        require_count("num_shards", self.count, low=1, high=MAX_SHARDS)
        require_count("shard", self.index, low=0, high=self.count - 1)


class RowPlan:
    """Where the rows of a data file are, and which of them are answered together.

    The file is read once from start to end. Offsets, lengths and a hash of each row's id stay in
    memory.
    """

    def __init__(self, path: Path) -> None:
        """Read and check a file.

        Args:
            path: JSON lines with ``messages``, and ``id`` if rows have one.

        Raises:
            DataError: If the file cannot be read or has no rows, a row is not a conversation, or
                two rows have the same id.
        """
        self.path = path
        self._offsets, self._lines = array("q"), array("q")
        self._turns, self._answers, self._lengths = array("i"), array("q"), array("q")
        digest, ids = hashlib.sha256(), _Ids()
        for row, (offset, number, line) in enumerate(_read_lines(path, digest.update)):
            parsed = parse_row(line, row)
            ids.add(parsed)
            answers = [
                _length(message)
                for message in parsed.content["messages"]
                if message["role"] == "assistant"
            ]
            self._offsets.append(offset)
            self._lines.append(number)
            self._turns.append(len(answers))
            self._answers.append(sum(answers))
            self._lengths.append(sum(map(_length, parsed.content["messages"])))
        ids.check()
        if not len(self):
            raise DataError(f'{path}: no rows, expected one {{"messages": [...]}} a line')
        self._digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._offsets)

    def identity(self) -> dict[str, Any]:
        """Return number of rows and hash of the file, ready for JSON."""
        return {"rows": len(self), "sha256": self._digest}

    def batches(self, batch_size: int, shard: Shard) -> Iterator[list[int]]:
        """Yield the batches of a shard: positions of rows that probably take equally long.

        These have as many answers, of similar lengths: new answers tend to be as long as the ones
        that they replace. A batch depends on the file and `batch_size` only, not on the number of
        shards. Of a few hundred rows long ones come first, so that a batch that does not fit in
        memory is found early.
        """
        pool_size, number = batch_size * _POOL_BATCHES, 0
        for start in range(0, len(self), pool_size):
            pool = sorted(
                range(start, min(start + pool_size, len(self))),
                key=lambda row: (
                    -self._turns[row],
                    -self._answers[row],
                    -self._lengths[row],
                    row,
                ),
            )
            for first in range(0, len(pool), batch_size):
                if number % shard.count == shard.index:
                    yield pool[first : first + batch_size]
                number += 1

    def read_rows(self, batches: Iterable[list[int]]) -> Iterator[list[NumberedRow]]:
        """Yield the rows of batches.

        Raises:
            DataError: If the file has changed and a row is no conversation any more.
        """
        with self.path.open("rb") as file:
            for positions in batches:
                rows = []
                for row in positions:
                    file.seek(self._offsets[row])
                    content = file.readline().rstrip(b"\r\n")
                    rows.append(parse_row(JsonLine(content, self._where(row)), row))
                yield rows

    def _where(self, row: int) -> str:
        return f"{self.path}:{self._lines[row]}"


class _Ids:
    """Checks that ids differ, many at a time; 8 bytes stay in memory for each."""

    def __init__(self) -> None:
        self._known, self._pending = HashSet(), list[tuple[str, str]]()

    def add(self, row: NumberedRow) -> None:
        self._pending.append((row.id, row.where))
        if len(self._pending) >= _CHECKED_TOGETHER:
            self.check()

    def check(self) -> None:
        if not self._pending:
            return
        hashes = [hashlib.sha256(name.encode()).digest()[:8] for name, _ in self._pending]
        are_new = self._known.add(np.frombuffer(b"".join(hashes), dtype="<u8"))
        for (name, where), is_new in zip(self._pending, are_new, strict=True):
            if not is_new:
                raise DataError(
                    f"{where}: found the id {shown(name)} of an earlier row, expected one of its "
                    "own; rename or drop it"
                )
        self._pending.clear()


def _length(message: Message) -> int:
    return len(message.get("content") or "")


def _read_lines(
    path: Path, update: Callable[[bytes], object]
) -> Iterator[tuple[int, int, JsonLine]]:
    """Yield offset, number and content of the lines that are not blank; hash all bytes."""
    offset = 0
    try:
        with path.open("rb") as file:
            for number, content in enumerate(file, 1):
                update(content)
                has_mark = number == 1 and content.startswith(_BYTE_ORDER_MARK)
                start = len(_BYTE_ORDER_MARK) if has_mark else 0
                line = content[start:].rstrip(b"\r\n")
                if line.strip():
                    yield offset + start, number, JsonLine(line, f"{path}:{number}")
                offset += len(content)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise DataError(f"{path} cannot be read ({error}); name a file of JSON lines") from error
