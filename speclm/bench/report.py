"""A report of measurements: JSON, a page of Markdown, and charts."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from speclm.bench.records import Record, find_record
from speclm.cards import CHARTS, REPORT_NAME, markdown_table
from speclm.errors import DataError, OptionError, reason_of
from speclm.files.atomic import write_file, written_together
from speclm.plots import Bars, Line, Panel, draw_bars, draw_panels

PAGE_NAME = "report.md"

_DISTINGUISHING = ("setting", "batch", "method")
_PAGE = """\
# {title}

{facts}

tau is the number of tokens per row and target forward, prefill excluded, as decoded. The speed-up
is that of pairs, each a call by regular generation and by the method: median and quartiles. A call
is *identical* if its tokens are those of regular generation.

{speed}
{pauses}
![Speed-up](speed.png)

## Latency of a call

Time from the call to its last token, prefill included: mean, and 90th percentile of the calls.

{latency}

![Latency](latency.png)

## Acceptance by position

Share of all rounds that kept the draft token at each position. tau is one more than the sum of a
row.

{acceptance}

![Acceptance](acceptance.png)
"""


def write_report(folder: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write `REPORT_NAME`, `PAGE_NAME` and `CHARTS` into a folder; all appear together.

    Args:
        folder: Created if it does not exist. Files of the same names are replaced.
        records: At least one record of one model, as in a file of records.

    Raises:
        OptionError: If there is no record, matplotlib is not installed, or the files cannot be
            written.
        DataError: If a record has no times of calls.
    """
    if not records:
        raise OptionError("there is no measurement to report; measure at least one setting")
    if any(record.get("latency") is None for record in records):
        raise DataError(
            "a record has no 'latency', expected those of this version of speclm; measure again "
            "into a new file"
        )
    charts = {
        "Speed-up": _speed_chart(records),
        "Latency": _latency_chart(records),
        "Acceptance": draw_panels([_acceptance_panel(records)]),
    }
    try:
        with written_together(folder, last=REPORT_NAME) as aside:
            for name, chart in charts.items():
                write_file(aside / CHARTS[name], chart)
            write_file(aside / PAGE_NAME, _page(records))
            content = {"kind": "speclm report", "records": list(records)}
            write_file(aside / REPORT_NAME, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise OptionError(
            f"the report cannot be written to {str(folder)!r} ({reason_of(error)}); name a folder "
            "that you may write to"
        ) from error


def as_dictionary(record: Record) -> dict[str, Any]:
    """Return a record as a file of records holds it."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(record)))
    return found


def recorded(
    path: Path, *, benchmark: str, settings: Iterable[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the records with some settings that a file holds for this commit.

    Raises:
        DataError: If the file cannot be read, or a line is not a record.
    """
    found = [find_record(path, benchmark=benchmark, settings=each) for each in settings]
    return [record for record in found if record is not None]


def _page(records: Sequence[Mapping[str, Any]]) -> str:
    settings = records[0]["settings"]
    return _PAGE.format(
        title=f"{settings.get('heads', 'heads')} for {settings.get('base', 'a base')}",
        facts=markdown_table(("", ""), _facts(records[0])),
        speed=_speed_table(records),
        pauses=_pauses(records),
        latency=_latency_table(records),
        acceptance=_acceptance_table(records),
    )


def _facts(record: Mapping[str, Any]) -> list[tuple[object, ...]]:
    """Return what all measurements of a report share."""
    machine, commit = record["machine"], record["commit"]
    settings = {
        name.replace("_", " "): value
        for name, value in record["settings"].items()
        if name not in _DISTINGUISHING
    }
    return [
        *settings.items(),
        ("processor", f"{machine['cpu']}, {machine['num_cores']} cores"),
        *([("GPU", ", ".join(machine["gpus"]))] if machine["gpus"] else []),
        ("versions", ", ".join(f"{name} {found}" for name, found in record["versions"].items())),
        *([("commit", commit["sha"])] if commit["sha"] else []),
        ("date", record["date"]),
    ]


def _keys(record: Mapping[str, Any]) -> tuple[object, ...]:
    return tuple(record["settings"].get(name, "") for name in _DISTINGUISHING)


def _speed_table(records: Sequence[Mapping[str, Any]]) -> str:
    columns = ("tau", "tokens/s", "regular tokens/s", "speed-up", "identical")
    rows = []
    for record in records:
        tau, quartiles = record["tau"], (record["lower_quartile"], record["upper_quartile"])
        rows.append(
            (
                *_keys(record),
                "" if tau is None else f"{tau:.2f}",
                f"{record['tokens_per_second']:.0f}",
                f"{record['plain_tokens_per_second']:.0f}",
                f"{record['median']:.2f} [{quartiles[0]:.2f}, {quartiles[1]:.2f}]",
                _identity(record),
            )
        )
    return markdown_table((*_DISTINGUISHING, *columns), rows)


def _pauses(records: Sequence[Mapping[str, Any]]) -> str:
    """Return a list of the measurements in which speculation was paused, which lowers tau."""
    lines = [
        f"- {_label(record)}: {record['pause_summary']}"
        for record in records
        if record.get("pause_summary")
    ]
    return "\n".join(["\nRounds without a draft count in tau:\n", *lines, ""]) if lines else ""


def _identity(record: Mapping[str, Any]) -> str:
    counts = f"{record['num_identical']} of {record['n']}"
    if not record["promises_identity"]:
        return f"{counts}, not promised"
    if record["num_identical"] == record["n"]:
        return counts
    gaps = [found["gap"] for found in record["divergences"]]
    return f"{counts}; the others differ at a gap of scores of at most {max(gaps, default=0):.2g}"


def _latency_table(records: Sequence[Mapping[str, Any]]) -> str:
    columns = ("calls", "mean, ms", "P90, ms", "regular mean, ms", "regular P90, ms")
    rows = [
        (*_keys(record), record["n"], *(f"{1e3 * seconds:.0f}" for seconds in _seconds(record)))
        for record in records
    ]
    return markdown_table((*_DISTINGUISHING, *columns), rows)


def _seconds(record: Mapping[str, Any]) -> list[float]:
    """Return mean and 90th percentile of the method's calls, and of regular generation's."""
    parts = (record["latency"], record["plain_latency"])
    return [part[name] for part in parts for name in ("mean", "p90")]


def _acceptance_table(records: Sequence[Mapping[str, Any]]) -> str:
    deepest = max(len(record["kept_by_depth"]) for record in records)
    rows = [
        (*_keys(record), *(f"{share:.1%}" for share in record["kept_by_depth"]))
        for record in records
        if record["kept_by_depth"]
    ]
    if not rows:
        return "No draft token was accepted."
    padded = [(*row, *("" for _ in range(deepest + 3 - len(row)))) for row in rows]
    return markdown_table((*_DISTINGUISHING, *range(1, deepest + 1)), padded)


def _acceptance_panel(records: Sequence[Mapping[str, Any]]) -> Panel:
    lines = [
        Line(_label(record), [(float(i), s) for i, s in enumerate(record["kept_by_depth"], 1)])
        for record in records
        if record["kept_by_depth"]
    ]
    return Panel("Share of rounds that kept the draft token", "position", lines)


def _speed_chart(records: Sequence[Mapping[str, Any]]) -> bytes:
    bars = Bars(
        "speed-up, with quartiles",
        [record["median"] for record in records],
        [(record["lower_quartile"], record["upper_quartile"]) for record in records],
    )
    title = "Speed-up over regular generation"
    return draw_bars(title, [_label(record) for record in records], [bars], line_at=1.0)


def _latency_chart(records: Sequence[Mapping[str, Any]]) -> bytes:
    names = ("mean", "P90", "regular mean", "regular P90")
    columns = zip(*(_seconds(record) for record in records), strict=True)
    bars = [Bars(name, column) for name, column in zip(names, columns, strict=True)]
    return draw_bars("Seconds of a call", [_label(record) for record in records], bars)


def _label(record: Mapping[str, Any]) -> str:
    setting, batch, method = _keys(record)
    label = f"{setting}, batch {batch}"
    return label if method == "speclm" else f"{label}, {method}"
