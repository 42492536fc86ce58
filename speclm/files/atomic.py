"""Read JSON safely, and write files that appear whole or not at all."""

import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Any, BinaryIO

CACHE_VARIABLE = "SPECLM_CACHE"
"""Environment variable that names the cache folder; if it is empty, nothing is cached."""

MAX_LEVELS = 100
"""Maximum nesting of JSON: code that traverses it may recurse."""

MAX_JSON_BYTES = 20 * 2**20
"""Maximum bytes of a JSON file; the largest indices of weights have about 15 million."""

MAX_VALUES = 1_000_000
"""Maximum commas, colons and brackets of a JSON file, as each value takes up to 250 bytes."""


def cache_folder() -> Path | None:
    """Return the folder of everything that speclm caches; None if nothing is to be cached.

    It is ``$SPECLM_CACHE``, else ``$XDG_CACHE_HOME/speclm``, else ``~/.cache/speclm``.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen is not None:
        return Path(chosen).expanduser().absolute() if chosen.strip() else None
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if shared.is_absolute():  # its specification ignores relative paths
        return shared / "speclm"
    try:
        return Path.home() / ".cache" / "speclm"
    except RuntimeError:  # a user without a home
        return None


def load_json(text: str) -> Any:
    """Return the value of a JSON text.

    NaN and infinite numbers are accepted, as Python writes them; check numbers where they are used.

    Raises:
        ValueError: If it is not JSON, is nested deeper than `MAX_LEVELS`, or has numbers or
            characters that Python cannot handle. No other error is raised.
    """
    try:
        found = json.loads(text)
    except (RecursionError, MemoryError) as error:
        raise ValueError(f"it is too large or nested too deeply: {error}") from error
    require_shallow(found)
    if "\\ud" in text or "\\uD" in text:  # half a character cannot be written out again
        json.dumps(found, ensure_ascii=False).encode()
    return found


def read_json(path: Path) -> Any:
    """Return the value of a JSON file.

    Raises:
        OSError: If the file cannot be read, or is no regular file.
        ValueError: As in `load_json`, or if the file is not UTF-8 or too large.
    """
    require_regular(path)
    with path.open("rb") as file:
        content = file.read(MAX_JSON_BYTES + 1)
    num_values = sum(map(content.count, (b",", b":", b"[", b"{")))
    if len(content) > MAX_JSON_BYTES or num_values > MAX_VALUES:
        raise ValueError(
            f"it has {len(content)} bytes or more and {num_values} values, expected up to "
            f"{MAX_JSON_BYTES} and {MAX_VALUES}"
        )
    return load_json(content.decode("utf-8"))


def require_regular(path: Path) -> None:
    """Check that a path, or what it links to, is a regular file: reading others may never end.

    Raises:
        OSError: If it is a folder, pipe or device, or cannot be found.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("found a folder, pipe or device, expected a regular file")


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file that appears whole or not at all, even after a power failure.

    A new file gets ordinary permissions, a replaced one keeps its own. The target of a link is
    replaced.

    Raises:
        OSError: If it cannot be written, or its folder does not exist; an old file stays.
    """
    with written_whole(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write into, which appears as `write_file` says when the block ends.

    Raises:
        OSError: If it cannot be written, or its folder does not exist. An old file stays then, and
            also if the block raises.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise OSError(f"found a folder or a device, expected a file: {str(path)!r}")
    written = _free_name(path.parent)
    try:
        with written.open("xb") as file:  # its permissions are those of any new file
            yield file
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
        TypeError: If `record` has types that JSON lacks.
    """
    write_file(path, json.dumps(record, indent=1) + "\n")


def append_line(path: Path, line: str) -> None:
    """Append a line as `write_file` does: the file always holds all old lines.

    Two processes must not append to one file at the same time.

    Raises:
        OSError: If it cannot be written; the file is then unchanged.
    """
    before = path.read_bytes() if path.is_file() else b""
    if before and not before.endswith(b"\n"):
        before += b"\n"
    write_file(path, before + line.encode() + b"\n")


@contextmanager
def written_together(folder: Path, *, last: str) -> Iterator[Path]:
    """Yield a temporary folder, whose files move to `folder` when the block ends.

    A new folder appears with all of them. In an existing one they replace files of the same names
    one after the other; other files stay. Permissions are as in `write_file`.

    Args:
        folder: Destination; created if it does not exist.
        last: Name of the file that is replaced after all others.

    Raises:
        OSError: If a file cannot be written. Nothing is changed then, nor if the block raises.
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
            if file.stat().st_nlink > 1:
                continue  # a link to a file that belongs to somebody else, and is stored
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


@contextmanager
def folder_written_whole(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder` when the block ends, in place of an old one.

    Folders inside of it may be written too. Permissions stay as they are written.

    Raises:
        OSError: If it cannot be written. Nothing is changed then, nor if the block raises.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside, before = _free_name(folder.parent), _free_name(folder.parent)
    aside.mkdir()
    try:
        yield aside
        for path in sorted(aside.rglob("*")):
            if path.is_dir():
                _sync_folder(path)
            elif path.stat().st_nlink == 1:
                _sync(path)
        _sync_folder(aside)
        if folder.exists():
            folder.rename(before)
        try:
            aside.rename(folder)
        except OSError:
            if before.exists():
                before.rename(folder)
            raise
        _sync_folder(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(before, ignore_errors=True)


def require_shallow(found: Any) -> None:
    """Check that JSON can be read again and traversed.

    Raises:
        ValueError: If it is nested deeper than `MAX_LEVELS`.
    """
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
