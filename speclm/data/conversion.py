"""Convert files of conversations, in whatever schema, to the lines that trainings read."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from speclm.data.ids import Content, Namer, given_id
from speclm.data.repairs import repair
from speclm.data.report import REASONS, ConversionReport, Tally
from speclm.data.rows import BrokenLine, Row, read_rows
from speclm.data.schemas import (
    SCHEMAS,
    Message,
    RowError,
    find_schema,
    known_schemas,
    tools_of,
)
from speclm.errors import DataError, OptionError, shown, suggest
from speclm.files.atomic import require_shallow, written_whole

_PROBED_ROWS = 100  # of a file, after which one of them must have had a known schema
_BATCH_ROWS, _BATCH_BYTES = 512, 1 << 22
_UNREAD = ("broken_json", "too_long", "not_an_object")
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
_ESCAPED = ((b"\\", b"\\\\"), (b'"', b'\\"'), (b"\n", b"\\n"), (b"\r", b"\\r"), (b"\t", b"\\t"))
_RARE = bytes(code for code in range(0x20) if chr(code) not in "\n\r\t")


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A row that is ready to be written but for its id."""

    content: Content
    tools: bytes
    row: Row
    repairs: list[str]


def convert(
    sources: str | Path | Iterable[str | Path],
    out: str | Path,
    *,
    schema: str | None = None,
    deduplicate: bool = False,
    strict: bool = False,
    overwrite: bool = False,
    progress: Callable[[int], object] = lambda _: None,
) -> ConversionReport:
    """Convert conversations to JSON lines, ``{"id": ..., "messages": [...]}``.

    Memory does not grow with the files, but for up to 40 bytes a row. A row that cannot be used is
    counted in the report and left out.

    Args:
        sources: Files, each a JSON array of objects or one object a line; converted in order.
        out: File to write; it appears when all rows are done.
        schema: Name of the schema of all rows; None finds that of each.
        deduplicate: Whether to drop a conversation that an earlier row has too.
        strict: Whether a row that has to be dropped, other than as a duplicate, is an error.
        overwrite: Whether `out` may exist.
        progress: Called with a number of bytes after each of them that is read.

    Returns:
        What became of the rows.

    Raises:
        DataError: If a source cannot be read, is empty, not in UTF-8, a broken array, or has no
            known schema; if no row can be kept, or, with `strict`, one cannot.
        OptionError: If an option is unknown, or `out` is a source, exists or cannot be written.

    Example:
        >>> report = convert("chats.json", "messages.jsonl")  # doctest: +SKIP
        >>> report.num_kept  # doctest: +SKIP
        94145
    """
    paths = [sources] if isinstance(sources, str | Path) else list(sources)
    out = Path(out)
    _check(paths, out, schema=schema, overwrite=overwrite)
    tally = Tally()
    namer = Namer(deduplicate=deduplicate)
    rows = _prepared(paths, schema, tally, strict=strict, progress=progress)
    try:
        with written_whole(out) as file:
            for batch in _batches(rows):
                _write(batch, namer, tally, file)
            report = tally.report()
            if not report.num_kept:
                raise DataError(_nothing_kept(report))
    except OSError as error:
        raise OptionError(
            f"the output {str(out)!r} cannot be written ({error}); name a file in a folder that "
            "you may write to"
        ) from error
    return report


def _check(paths: Sequence[str | Path], out: Path, *, schema: str | None, overwrite: bool) -> None:
    if not paths:
        raise OptionError("no file to convert is named, expected at least one; name it")
    if schema is not None and schema not in SCHEMAS:
        raise OptionError(
            f"schema is {shown(schema)}, expected one of {', '.join(SCHEMAS)}; "
            f"{suggest(schema, SCHEMAS)}"
        )
    if "\0" in str(out):
        raise OptionError(f"the output {str(out)!r} has a null byte, expected none; drop it")
    try:
        if any(Path(path).exists() and out.exists() and out.samefile(path) for path in paths):
            raise OptionError(f"the output {str(out)!r} is also a source; name another file")
        if out.exists() and not out.is_file():
            raise OptionError(
                f"the output {str(out)!r} is a folder or a device, expected a file; name one"
            )
        if out.exists() and not overwrite:
            raise OptionError(
                f"the output {str(out)!r} exists; name another file, or pass --overwrite "
                "(overwrite=True)"
            )
    except OSError as error:
        raise OptionError(
            f"the output {str(out)!r} or a source cannot be looked at ({error}); name another file"
        ) from error


def _prepared(
    paths: Iterable[str | Path],
    schema: str | None,
    tally: Tally,
    *,
    strict: bool,
    progress: Callable[[int], object],
) -> Iterator[_Prepared]:
    """Yield the rows that can be written, and count the others."""
    for path in paths:
        has_schema, unknown, first_unknown = False, 0, ""
        for row in read_rows(path, progress=progress):
            tally.num_rows += 1
            try:
                yield _prepare(row, schema, tally)
                has_schema = True
            except RowError as error:
                if strict:
                    raise DataError(_refusal(row, error)) from error
                tally.count(error.reason, row, detail=error.detail)
                has_schema |= error.reason not in ("unknown_schema", *_UNREAD)
                if error.reason == "unknown_schema":
                    unknown += 1
                    first_unknown = first_unknown or f"{row.where}: {error.detail}"
                if unknown == _PROBED_ROWS and not has_schema:
                    break
        if unknown and not has_schema:
            raise DataError(
                f"{first_unknown}, expected those of a known schema: {known_schemas()}; rename the "
                "columns"
            )


def _prepare(row: Row | BrokenLine, schema: str | None, tally: Tally) -> _Prepared:
    """Turn a row into the text to write.

    Raises:
        RowError: If it cannot be used.
    """
    if isinstance(row, BrokenLine):
        raise RowError(row.reason, row.detail)
    value = row.value
    if not isinstance(value, dict):
        raise RowError("not_an_object", f"found {shown(value)}, expected an object")
    name = find_schema(value) if schema is None else schema
    if name is None:
        keys = f"the keys are {', '.join(map(shown, value)) or 'none'}"
        raise RowError("unknown_schema", keys + _wrapped(value))
    tally.schemas[name] = tally.schemas.get(name, 0) + 1
    try:
        messages, repairs = repair(SCHEMAS[name].messages(value))
    except RowError as error:
        if hint := _wrapped(value):
            raise RowError(error.reason, error.detail + hint) from error
        raise
    tools = tools_of(value)
    given = given_id(value)
    try:
        if tools or any("tool_calls" in message for message in messages):
            require_shallow({"messages": messages, "tools": tools})
        text = b"[%b]" % b", ".join(map(_message, messages))
        described = b"" if tools is None else b', "tools": ' + _encode(tools).encode()
        (given or "").encode()
    except UnicodeEncodeError as error:
        raise RowError("not_utf8", f"found {shown(error.object[error.start])}") from error
    except ValueError as error:  # nested too deeply, or a number that JSON lacks
        raise RowError("bad_tool_call", str(error)) from error
    return _Prepared(Content(text, given, tally.num_rows), described, row, repairs)


def _wrapped(value: dict[str, Any]) -> str:
    """Return, for messages, where in an object the rows seem to be: a list of rows under a key."""
    for key, rows in value.items():
        if isinstance(rows, list) and rows and isinstance(rows[0], dict) and find_schema(rows[0]):
            return (
                f" (the rows are the list under {shown(key)}: write its elements to a file of "
                f"their own, such as with: jq -c '.[{json.dumps(key)[:80]}][]' FILE)"
            )
    return ""


def _message(message: Message) -> bytes:
    """Return a message as JSON; usual ones take half the time that the json module takes."""
    content = message["content"]
    if len(message) > 2 or content is None:
        return _encode(message).encode()
    text: bytes = content.encode()
    if len(text.translate(None, _RARE)) < len(text):
        return _encode(message).encode()
    for character, escaped in _ESCAPED:
        text = text.replace(character, escaped)
    return b'{"role": "%b", "content": "%b"}' % (message["role"].encode(), text)


def _batches(rows: Iterable[_Prepared]) -> Iterator[list[_Prepared]]:
    batch: list[_Prepared] = []
    num_bytes = 0
    for row in rows:
        batch.append(row)
        num_bytes += len(row.content.text)
        if len(batch) >= _BATCH_ROWS or num_bytes >= _BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _write(batch: list[_Prepared], namer: Namer, tally: Tally, file: BinaryIO) -> None:
    names = namer.name([each.content for each in batch])
    for each, name in zip(batch, names, strict=True):
        if name is None:
            tally.count("duplicate", each.row)
            continue
        tally.num_kept += 1
        tally.num_repaired += bool(each.repairs)
        for reason in each.repairs:
            tally.count(reason, each.row, is_dropped=False)
        file.write(
            b'{"id": %b, "messages": %b%b}\n'
            % (_encode(name).encode(), each.content.text, each.tools)
        )


def _refusal(row: Row | BrokenLine, error: RowError) -> str:
    return (
        f"{row.where}: {REASONS[error.reason]} ({error.detail}), found {row.excerpt!r}; correct or "
        "drop the row, or convert without --strict (strict=False)"
    )


def _nothing_kept(report: ConversionReport) -> str:
    reasons = "; ".join(
        f"{each.count} because {each.meaning}, the first at {each.where}, {each.excerpt!r}"
        for each in report.outcomes[:3]
    )
    return (
        f"none of {report.num_rows} rows can be kept: {reasons}. Expected an array of objects or "
        f"one object a line, with the keys of {known_schemas()}; correct the rows, or name the "
        "schema"
    )
