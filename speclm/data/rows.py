"""Read the rows of JSON files one by one: files larger than memory are fine."""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader, FileIO
from itertools import count, islice
from json import JSONDecodeError
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from typing_extensions import override

from speclm.errors import DataError, reason_of, shown

MAX_ROW_LENGTH = 1 << 24
"""Longest row: bytes of a line, characters of an array's element."""

_CHUNK_BYTES = 1 << 16  # small, because one character outside of Latin-1 makes a whole chunk slower
_BUFFER_BYTES = 1 << 16  # the start of a file that decides its form, too
_LONGEST_TOKEN = 16  # characters before the end of a chunk where an error may come from the cut
_SPACE = re.compile(r"[ \t\n\r]+")
_MARK = codecs.BOM_UTF8
_DECODER = json.JSONDecoder()
# What Python raises for nonsense, for nesting that is too deep and for numbers that are too long.
_UNREADABLE = (ValueError, RecursionError, MemoryError)


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a file.

    Args:
        value: The JSON value, of any type. Bytes that are not UTF-8 are lone surrogates in it.
        where: File and line, or file and row number in an array; for messages.
    """

    value: Any
    where: str

    @property
    def excerpt(self) -> str:
        """The start of the row, for messages."""
        return excerpt(self.value)


@dataclass(frozen=True, slots=True)
class BrokenLine:
    """A line without a JSON value.

    Args:
        excerpt: The start of the line.
        where: File and line.
        reason: ``"broken_json"`` or ``"too_long"``.
        detail: What is wrong.
    """

    excerpt: str
    where: str
    reason: str
    detail: str


def excerpt(value: Any) -> str:
    """Return the start of a value as JSON, for messages; of a text its start."""
    text = value if isinstance(value, str) else _short_json(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_rows(
    path: str | Path, *, progress: Callable[[int], object] = lambda _: None
) -> Iterator[Row | BrokenLine]:
    r"""Yield the elements of a JSON array, or the values of JSON lines, whichever a file holds.

    A file whose first character is ``[`` is an array. Blank lines are skipped, and so is a byte
    order mark. Memory holds one row and a chunk of the file.

    Args:
        path: The file.
        progress: Called with the number of bytes after each read.

    Raises:
        DataError: If the file cannot be read, has no row, is not text in UTF-8, or is a broken
            array; the message names the line.
    """
    name, num_rows = str(path), 0
    with BufferedReader(_Counted(name, progress), _BUFFER_BYTES) as file:
        head = file.peek()
        _require_text(head, name)
        if head.startswith(_MARK):
            file.read(len(_MARK))
        is_array = head.removeprefix(_MARK).lstrip().startswith(b"[")
        for row in _elements(file, name) if is_array else _lines(file, name):
            num_rows += 1
            yield row
    if not num_rows:
        raise DataError(
            f"{name} has no rows, expected an array of JSON objects or one object a line; name "
            "another file"
        )


class _Counted(FileIO):
    """A file that reports how much of it is read, and names itself when it cannot be."""

    def __init__(self, name: str, progress: Callable[[int], object]) -> None:
        self._called, self._progress = name, progress
        with _unreadable(name):
            super().__init__(name)

    @override
    def readinto(self, buffer: Any) -> int:
        with _unreadable(self._called):
            num_bytes = super().readinto(buffer) or 0
        self._progress(num_bytes)
        return num_bytes


@contextmanager
def _unreadable(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise DataError(
            f"{name} cannot be read ({error}); name a JSON file with an array of objects or one "
            "object a line"
        ) from error


def _require_text(head: bytes, name: str) -> None:
    if b"\0" in head:
        raise DataError(
            f"{name} is binary, compressed or not in UTF-8, it starts with {shown(head[:16])}, "
            "expected JSON text; decompress it, export it as JSON, or save it as UTF-8"
        )


def _lines(file: BinaryIO, name: str) -> Iterator[Row | BrokenLine]:
    for number in count(1):
        line = file.readline(MAX_ROW_LENGTH + 1)
        if not line:
            return
        where = f"{name}:{number}"
        text = line.decode("utf-8", "surrogateescape")
        if len(line) > MAX_ROW_LENGTH:
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_ROW_LENGTH)
            detail = f"the line has more than {MAX_ROW_LENGTH} bytes"
            yield BrokenLine(excerpt(text), where, "too_long", detail)
            continue
        if text.isspace():
            continue
        try:
            row: Row | BrokenLine = Row(_DECODER.decode(text), where)
        except JSONDecodeError as error:
            detail = f"{error.msg} at character {error.pos + 1}"
            row = BrokenLine(excerpt(text.strip()), where, "broken_json", detail)
        except _UNREADABLE as error:
            row = BrokenLine(excerpt(text.strip()), where, "broken_json", reason_of(error))
        yield row


class _Window:
    """The part of a file that is being parsed, as text."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.text, self.position = "", 0
        self._file, self._name = file, name
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._line = 1  # of the first character

    def peek(self) -> str:
        """Go to the next character that is no white space and return it; empty at the end."""
        while True:
            if found := _SPACE.match(self.text, self.position):
                self.position = found.end()
            if self.position < len(self.text) or not self.grow():
                return self.text[self.position : self.position + 1]

    def grow(self) -> bool:
        """Read on and drop what is done; return whether there was more.

        What is held doubles, so that a long row takes time in proportion to its length.
        """
        rest = self.text[self.position :]
        read = self._file.read(max(_CHUNK_BYTES, len(rest)))
        self._line += self.text.count("\n", 0, self.position)
        self.text, self.position = rest + self._decoder.decode(read, not read), 0
        return bool(read)

    def value(self) -> Any:
        """Return the JSON value at the position, and go to its end."""
        while True:
            value, problem = None, ""
            try:
                value, end = _DECODER.raw_decode(self.text, self.position)
                is_cut = end >= len(self.text) - _LONGEST_TOKEN  # a number may go on
            except JSONDecodeError as error:
                end, problem = error.pos, error.msg
                is_cut = end >= len(self.text) - _LONGEST_TOKEN or problem.startswith("Untermin")
            except _UNREADABLE as error:
                self.fail(self.position, reason_of(error))
            if is_cut and len(self.text) - self.position > MAX_ROW_LENGTH:
                self.fail(self.position, f"more than {MAX_ROW_LENGTH} characters, or no end")
            length = end - self.position
            if is_cut and self.grow():
                continue
            if problem:
                self.fail(self.position + length, problem)
            self.position += length
            return value

    def fail(self, position: int, problem: str) -> NoReturn:
        """Raise the error of a broken array, with the line of a position in the text."""
        line = self._line + self.text.count("\n", 0, position)
        found = self.text[position : position + 40]
        raise DataError(
            f"{self._name}, line {line}: expected an array of JSON objects, found "
            f"{f'{found!r} ({problem})' if found else f'the end of the file ({problem})'}; "
            "correct the file, or export it again"
        )


def _elements(file: BinaryIO, name: str) -> Iterator[Row]:
    window = _Window(file, name)
    window.peek()
    window.position += 1  # after the bracket
    is_end = window.peek() == "]"
    for number in count(1):
        if is_end:
            break
        window.peek()
        yield Row(window.value(), f"{name}, row {number}")
        is_end = window.peek() == "]"
        if not is_end and window.peek() != ",":
            window.fail(window.position, f"no comma after row {number}")
        window.position += not is_end
    window.position += 1
    if window.peek():
        window.fail(window.position, "text after the end of the array")


def _short_json(value: Any) -> str:
    """Return a value as JSON of which only the start is needed."""
    parts = islice(json.JSONEncoder(ensure_ascii=False).iterencode(value), 50)
    return "".join(part[:100] for part in parts)
