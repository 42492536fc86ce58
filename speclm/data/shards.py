"""The files that keep what is finished, one for each process, and how they become one."""

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from speclm.data.dialogues import Finished
from speclm.data.row_plan import Shard
from speclm.errors import BusyError, DataError, OptionError, shown
from speclm.files.atomic import load_json, read_json, write_json, written_whole

MANIFEST = "manifest.json"

_MISSING = -1
_EFFECTS = {"batch_size": ", which decides sampled answers and shards,"}


@dataclass(slots=True)
class Totals:
    """What was done with some rows.

    Args:
        num_rows: Rows that are kept.
        num_tokens: Tokens generated, those of dropped rows included.
        dropped: Number of dropped rows by reason.
        examples: What is known of the first dropped row of each reason.
    """

    num_rows: int = 0
    num_tokens: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, finished: Finished) -> None:
        """Count a row."""
        self.num_tokens += finished.num_tokens
        if finished.dropped is None:
            self.num_rows += 1
        else:
            self.dropped[finished.dropped] += 1
            place = f"row {finished.position + 1}"
            example = f"{place}: {finished.detail}" if finished.detail else place
            self.examples.setdefault(finished.dropped, example)


def open_folder(out: Path, manifest: Mapping[str, Any], *, overwrite: bool) -> Path:
    """Return the folder that keeps finished rows until all are there; make it if it is missing.

    Args:
        out: File that is written in the end; the folder lies next to it.
        manifest: What the rows depend on, ready for JSON.
        overwrite: Whether to replace `out`, and finished rows that depend on something else.

    Raises:
        OptionError: If `out` exists, or there are finished rows that depend on something else,
            and `overwrite` is not set; or if the folder cannot be written.
        DataError: If the folder is not one of these, or its manifest is damaged.
    """
    folder = _folder_of(out)
    wanted = json.loads(json.dumps(manifest))
    try:
        found = _read_manifest(folder)
        if found is not None:
            differences = _differences(found, wanted)
            if differences and not overwrite:
                raise OptionError(
                    f"{str(folder)!r} holds rows of another run, which differs in "
                    f"{'; '.join(differences)}; use the same data and options to go on with it, or "
                    "another file, or pass --overwrite (overwrite=True) to discard its rows"
                )
            if differences:
                for path in folder.glob("shard-*.jsonl"):
                    path.unlink()
                write_json(folder / MANIFEST, wanted)
            return folder
        require_free(out, overwrite=overwrite)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / MANIFEST, wanted)
    except OSError as error:
        raise OptionError(
            f"{str(folder)!r} cannot be written ({error}); name a file in a folder that you may "
            "write to"
        ) from error
    return folder


def require_free(out: Path, *, overwrite: bool) -> None:
    """Check that a file may be written: that it does not exist, or a run for it has begun.

    Raises:
        OptionError: If it may not, and `overwrite` is not set.
    """
    if out.exists() and not overwrite and not (_folder_of(out) / MANIFEST).exists():
        raise OptionError(
            f"{str(out)!r} exists; name another file, or pass --overwrite (overwrite=True)"
        )


def _folder_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.shards")


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    if not folder.exists():
        return None
    # Another process may be writing the manifest at this moment, under a hidden name.
    if folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir()):
        return None
    try:
        found = read_json(folder / MANIFEST)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{str(folder)!r} has no readable {MANIFEST} ({error}), expected a folder of finished "
            "rows; delete it, or name another file"
        ) from error
    if not isinstance(found, dict):
        raise DataError(
            f"{str(folder / MANIFEST)!r} holds {shown(found)}, expected an object; delete the "
            "folder, or name another file"
        )
    return found


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return in words where two manifests differ."""
    parts = []
    for name in dict.fromkeys([*wanted, *found]):
        there, here = found.get(name), wanted.get(name)
        if isinstance(there, dict) and isinstance(here, dict):
            parts += [f"{name} {part}" for part in _differences(there, here)]
        elif there != here:
            effect = _EFFECTS.get(name, "")
            parts.append(f"{name}{effect} ({shown(there)} there, {shown(here)} here)")
    return parts


class ShardFile:
    """Finished rows of one shard, in a file to which they are appended.

    A row is written at once, so a process that is killed loses only rows in flight. A line that it
    wrote in part is cut off when the file is opened again.
    """

    def __init__(self, folder: Path, shard: Shard) -> None:
        """Open the file, or make it.

        Raises:
            BusyError: If another process writes it.
            DataError: If it is damaged.
            OptionError: If it cannot be opened.
        """
        path = shard_path(folder, shard)
        self.finished: set[int] = set()
        self.totals = Totals()
        try:
            self._file: BinaryIO = path.open("a+b")
        except OSError as error:
            raise OptionError(
                f"{str(path)!r} cannot be written ({error}); name a file in a folder that you may "
                "write to"
            ) from error
        try:
            _lock(self._file, path)
            end = 0
            for offset, size, finished in read_finished(self._file, path):
                self.finished.add(finished.position)
                self.totals.add(finished)
                end = offset + size
            self._file.truncate(end)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def append(self, rows: Iterable[Finished]) -> list[Finished]:
        """Write the rows that are not in the file yet; return these."""
        new = [row for row in rows if row.position not in self.finished]
        self._file.write(b"".join(map(_line, new)))
        self._file.flush()
        for row in new:
            self.finished.add(row.position)
            self.totals.add(row)
        return new


def shard_path(folder: Path, shard: Shard) -> Path:
    """Return the file of a shard."""
    return folder / f"shard-{shard.index:03}-of-{shard.count:03}.jsonl"


def _lock(file: BinaryIO, path: Path) -> None:
    """Keep other processes from writing a file until it is closed; not on Windows."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise BusyError(
            f"{str(path)!r} is written by another process ({error}); wait for it, or pass another "
            "--shard"
        ) from error


def _line(finished: Finished) -> bytes:
    record: dict[str, Any] = {"position": finished.position, "tokens": finished.num_tokens}
    if finished.dropped is None:
        record["row"] = finished.row
    else:
        record |= {"dropped": finished.dropped, "detail": finished.detail}
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def read_finished(file: BinaryIO, path: Path) -> Iterator[tuple[int, int, Finished]]:
    """Yield offset, size and content of the lines of a shard; a last line without end is left out.

    Raises:
        DataError: If another line is damaged.
    """
    file.seek(0)
    offset = 0
    for number, content in enumerate(file, 1):
        if not content.endswith(b"\n"):
            return
        yield offset, len(content), _parse(content, f"{path}:{number}")
        offset += len(content)


def _parse(content: bytes, where: str) -> Finished:
    found: Any = None
    with suppress(ValueError):  # UnicodeDecodeError is one
        found = load_json(content.decode())
    match found:
        case {"position": int(position), "tokens": int(tokens), "row": {"messages": _} as row}:
            return Finished(position, row, tokens)
        case {
            "position": int(position),
            "tokens": int(tokens),
            "dropped": str(reason),
            "detail": str(detail),
        }:
            return Finished(position, None, tokens, reason, detail)
    raise DataError(
        f"{where}: expected a finished row, found {shown(content[:60])}; the file is damaged: "
        "delete it, and its rows are generated again"
    )


def merge_shards(folder: Path, out: Path, *, num_rows: int, count: int) -> Totals | None:
    """Write the kept rows of all shards into one file, in the order of the data.

    The file appears whole or not at all. It needs 16 bytes of memory a row.

    Args:
        folder: Folder of the shards.
        out: File to write.
        num_rows: Rows of the data.
        count: Number of shards.

    Returns:
        Totals of all shards; None if rows are missing, and nothing is written then.

    Raises:
        DataError: If a shard is damaged, or no row is kept.
        OptionError: If the file cannot be written.
    """
    offsets = array("q", [_MISSING]) * num_rows
    sources = array("i", [_MISSING]) * num_rows
    paths = [shard_path(folder, Shard(index, count)) for index in range(count)]
    totals, num_found = Totals(), 0
    with ExitStack() as stack:
        files: list[BinaryIO] = []
        for source, path in enumerate(paths):
            if not path.is_file():
                return None
            files.append(stack.enter_context(path.open("rb")))
            for offset, _, finished in read_finished(files[-1], path):
                position = finished.position
                if not 0 <= position < num_rows or offsets[position] != _MISSING:
                    raise DataError(
                        f"{path}: row {position} is there twice, or is none of {num_rows}; the "
                        "file is damaged: delete it, and its rows are generated again"
                    )
                offsets[position], sources[position] = offset, source
                num_found += 1
                totals.add(finished)
        if num_found < num_rows:
            return None
        if totals.num_rows == 0:
            reasons = ", ".join(
                f"{reason}: {number} ({totals.examples[reason]})"
                for reason, number in totals.dropped.most_common()
            )
            raise DataError(
                f"all {num_rows} rows are dropped, expected some to be kept: {reasons}; change the "
                "options or the data"
            )
        _write_merged(out, files, paths, offsets, sources)
    return totals


def _write_merged(
    out: Path,
    files: list[BinaryIO],
    paths: list[Path],
    offsets: "array[int]",
    sources: "array[int]",
) -> None:
    try:
        with written_whole(out) as merged:
            for offset, source in zip(offsets, sources, strict=True):
                files[source].seek(offset)
                row = _parse(files[source].readline(), str(paths[source])).row
                if row is not None:
                    merged.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    except OSError as error:
        raise OptionError(
            f"{str(out)!r} cannot be written ({error}); make room, and run the command again: the "
            "finished rows are kept"
        ) from error


def delete_folder(folder: Path, shard: Shard) -> None:
    """Delete the folder of a single shard after its rows were merged."""
    for path in (shard_path(folder, shard), folder / MANIFEST):
        path.unlink(missing_ok=True)
    with suppress(OSError):  # it holds something else
        folder.rmdir()
