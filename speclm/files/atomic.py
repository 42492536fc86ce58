"""Reads JSON of whatever content, and writes files that are there whole or not at all."""

import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Any

MAX_LEVELS = 100
"""Deepest nesting of JSON that is read: what goes over it afterwards may recurse."""


def load_json(text: str) -> Any:
    """Return what a JSON text says.

    NaN and infinite numbers are taken, as Python writes them: check numbers where they are used.

    Raises:
        ValueError: If it is no JSON, is nested deeper than `MAX_LEVELS`, or has numbers or
            characters that Python cannot handle. Nothing else is raised, whatever the text is.
    """
    try:
        found = json.loads(text)
    except (RecursionError, MemoryError) as error:
        raise ValueError(f"it is too large or nested too deeply: {error}") from error
    _require_shallow(found)
    if "\\ud" in text or "\\uD" in text:  # half a character cannot be written out again
        json.dumps(found, ensure_ascii=False).encode()
    return found


def read_json(path: Path) -> Any:
    """Return what a JSON file says.

    Raises:
        OSError: If the file cannot be read.
        ValueError: As in `load_json`, or if the file is no UTF-8.
    """
    return load_json(path.read_text(encoding="utf-8"))


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file that readers see whole or not at all, even after a power failure.

    A new file gets ordinary permissions, one that is replaced keeps its own. What a link points
    to is replaced.

    Raises:
        OSError: If it cannot be written, or its folder does not exist; an old file stays.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise OSError(f"found a folder or a device, expected a file: {str(path)!r}")
    written = _free_name(path.parent)
    try:
        with written.open("xb") as file:  # its permissions are those of any new file
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        _copy_permissions(path, written)
        written.replace(path)
    finally:
        written.unlink(missing_ok=True)
    _sync_folder(path.parent)


def write_json(path: Path, record: Any) -> None:
    """Write JSON as `write_file` does.

    Raises:
        OSError: If it cannot be written.
        TypeError: If `record` is not made of what JSON has.
    """
    write_file(path, json.dumps(record, indent=1) + "\n")


def append_line(path: Path, line: str) -> None:
    """Append a line as `write_file` does: the file holds all old lines, with the new one or not.

    Two processes must not append to one file at the same time.

    Raises:
        OSError: If it cannot be written; the file is then as it was.
    """
    before = path.read_bytes() if path.is_file() else b""
    if before and not before.endswith(b"\n"):
        before += b"\n"
    write_file(path, before + line.encode() + b"\n")


@contextmanager
def written_together(folder: Path, *, last: str) -> Iterator[Path]:
    """Give a folder to write files into, which appear in `folder` when the block ends.

    A new folder appears with all of them. In one that exists they replace files of the same names
    one after the other; other files stay. Permissions are as in `write_file`.

    Args:
        folder: Where the files will be; made if it does not exist.
        last: Name of the file that is replaced after all others.

    Raises:
        OSError: If a file cannot be written. Nothing is changed then, nor when the block raises.
    """
    folder = folder.resolve()
    is_new = not folder.exists()
    parent = folder.parent if is_new else folder
    parent.mkdir(parents=True, exist_ok=True)
    aside = _free_name(parent)
    aside.mkdir()
    try:
        yield aside
        ordinary = stat.S_IMODE(aside.stat().st_mode) & 0o666
        files = sorted(aside.iterdir(), key=lambda path: (path.name == last, path.name))
        for file in files:
            file.chmod(ordinary)  # some libraries write files that only their owner reads
            _copy_permissions(folder / file.name, file)
            _sync(file)
        if is_new:
            _sync_folder(aside)
            aside.rename(folder)
        else:
            for file in files:
                file.replace(folder / file.name)
        _sync_folder(parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _require_shallow(found: Any) -> None:
    level = [found]
    for _ in range(MAX_LEVELS + 1):
        nested = [value for value in level if isinstance(value, dict | list)]
        if not nested:
            return
        parts = (value.values() if isinstance(value, dict) else value for value in nested)
        level = [value for part in parts for value in part]
    raise ValueError(f"it is nested deeper than {MAX_LEVELS} levels")


def _free_name(folder: Path) -> Path:
    return folder / f".writing-{token_hex(8)}"


def _copy_permissions(source: Path, target: Path) -> None:
    with suppress(FileNotFoundError):
        target.chmod(stat.S_IMODE(source.stat().st_mode))


def _sync(file: Path) -> None:
    with file.open("r+b") as opened:
        os.fsync(opened.fileno())


def _sync_folder(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):
        return  # Windows, where folders cannot be opened
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
