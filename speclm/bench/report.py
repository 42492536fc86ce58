"""A report of measurements: JSON, a page of Markdown, one of HTML, and charts."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from speclm.bench.pairs import NUM_QUANTILES
from speclm.bench.records import Record, find_record, key_of, read_records
from speclm.bench.report_page import Section, html_page, markdown_page
from speclm.cards import CHARTS, REPORT_NAME
from speclm.errors import DataError, OptionError, reason_of
from speclm.files.atomic import write_file, written_together
from speclm.plots import Bars, Line, Panel, draw_bars, draw_panels

PAGE_NAME, HTML_NAME = "report.md", "report.html"

CATEGORY_CHART = "categories.png"
DISTRIBUTION_CHART = "latency_distribution.png"
NODES_CHART = "tau_by_nodes.png"
ROUND_CHART = "round.png"

_DISTINGUISHING = ("setting", "batch", "method")
_CATEGORY = "category"
_MAX_LETTERS = 30  # of the name of a category in a chart
_NEEDED = {"plain_latency", "tau", "kept_by_depth", "tokens_per_second", "num_identical"}
_PHASES = ("draft", "verify", "accept", "commit", "other")
_SPEED_TEXT = (
    "tau is the number of tokens per row and target forward, prefill excluded, as decoded. The "
    "speed-up is that of pairs, each a call by regular generation and by the method: median and "
    "quartiles. A call is identical if its tokens are those of regular generation. Of a question "
    "with several turns, each turn is a call."
)
_CATEGORY_TEXT = "The same by category. P50 is the median time of a call."
_LATENCY_TEXT = (
    "Time from the call to its last token, prefill included: mean, median and 90th percentile of "
    "the calls."
)
_ACCEPTANCE_TEXT = (
    "Share of all rounds that kept the draft token at each position. tau is one more than the sum "
    "of a row."
)
_NODES_TEXT = (
    "tau of the best draft tree of at most so many nodes, root excluded. It is simulated: some "
    "prompts are decoded once with large trees, and smaller trees are replayed on these rounds."
)
_ROUND_TEXT = (
    "Milliseconds of a round by phase: to draft, to verify (the target's forward), to accept, to "
    "commit the accepted tokens, and all else of a call but its prefill. It is the time of the "
    "host; an accelerator's time counts in the phase that waits for it."
)


def write_report(folder: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write `REPORT_NAME`, `PAGE_NAME`, `HTML_NAME` and charts into a folder; all appear together.

    Args:
        folder: Created if it does not exist. Files of the same names are replaced.
        records: At least one record of one model, as in a file of records; further records of
            categories of questions.

    Raises:
        OptionError: If there is no record, matplotlib is not installed, or the files cannot be
            written.
        DataError: If a record has no times of calls.
    """
    parts = [record for record in records if _CATEGORY in record["settings"]]
    whole = [record for record in records if _CATEGORY not in record["settings"]]
    if not whole:
        raise OptionError("there is no measurement to report; measure at least one setting")
    for record in records:
        latency = record.get("latency")
        complete = latency and latency.get("quantiles") and record.keys() >= _NEEDED
        if not complete:
            raise DataError(
                f"a record has no 'latency' with 'quantiles', or not all of {sorted(_NEEDED)!r}, "
                "expected those of this version of speclm; measure again into a new file"
            )
    charts = _charts(whole, parts)
    settings = whole[0]["settings"]
    title = f"{settings.get('heads', 'heads')} for {settings.get('base', 'a base')}"
    sections = _sections(whole, parts, set(charts))
    try:
        with written_together(folder, last=REPORT_NAME) as aside:
            for name, chart in charts.items():
                write_file(aside / name, chart)
            write_file(aside / PAGE_NAME, markdown_page(title, sections))
            write_file(aside / HTML_NAME, html_page(title, sections, charts))
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

    Records of categories of questions come with the one of all questions.

    Raises:
        DataError: If the file cannot be read, or a line is not a record.
    """
    wanted = [find_record(path, benchmark=benchmark, settings=each) for each in settings]
    found = [record for record in wanted if record is not None]
    parts: dict[tuple[int, str], dict[str, Any]] = {}  # an interrupted run leaves some twice
    for other in read_records(path):
        rest = {name: value for name, value in other["settings"].items() if name != _CATEGORY}
        for index, record in enumerate(found):
            if _CATEGORY in other["settings"] and key_of(record) == (
                key_of({**other, "settings": rest})
            ):
                parts[index, other["settings"][_CATEGORY]] = other
    return [*found, *parts.values()]


def _charts(
    records: Sequence[Mapping[str, Any]], parts: Sequence[Mapping[str, Any]]
) -> dict[str, bytes]:
    """Return PNG files by name; a chart without anything to show is left out."""
    found = {
        CHARTS["Speed-up"]: _speed_chart("Speed-up over regular generation", records),
        CHARTS["Latency"]: _latency_chart(records),
        CHARTS["Acceptance"]: draw_panels([_acceptance_panel(records)]),
        DISTRIBUTION_CHART: draw_panels([_distribution_panel(records)]),
    }
    if parts:
        found[CATEGORY_CHART] = _speed_chart("Speed-up by category", parts)
    if any(record.get("tau_by_nodes") for record in records):
        found[NODES_CHART] = draw_panels([_nodes_panel(records)])
    if timed := _timed(records):
        found[ROUND_CHART] = _round_chart(timed)
    return found


def _sections(
    records: Sequence[Mapping[str, Any]], parts: Sequence[Mapping[str, Any]], charts: set[str]
) -> list[Section]:
    pauses = [
        f"{_label(record)}: {record['pause_summary']}"
        for record in records
        if record.get("pause_summary")
    ]
    speed = Section(
        paragraphs=[_SPEED_TEXT, *(["Rounds without a draft count in tau."] if pauses else [])],
        header=(*_DISTINGUISHING, "tau", "tokens/s", "regular tokens/s", "speed-up", "identical"),
        rows=[_speed_row(record) for record in records],
        notes=pauses,
        charts=[("Speed-up", CHARTS["Speed-up"])],
    )
    latency = Section(
        "Latency of a call",
        [_LATENCY_TEXT],
        (*_DISTINGUISHING, "calls", *_ms("mean", "P50", "P90")),
        [(*_keys(record), record["n"], *_milliseconds(record)) for record in records],
        charts=[("Latency", CHARTS["Latency"]), ("Distribution of latency", DISTRIBUTION_CHART)],
    )
    found = [Section(header=("", ""), rows=_facts(records[0])), speed]
    if parts:
        found.append(_category_section(parts))
    found += [latency, _acceptance_section(records)]
    if NODES_CHART in charts:
        found.append(_nodes_section(records))
    if ROUND_CHART in charts:
        timed = _timed(records)
        rows = [(*_keys(record), *(f"{ms:.2f}" for ms in _phases(record))) for record in timed]
        header = (*_DISTINGUISHING, *_PHASES)
        chart = ("Where the time of a round goes", ROUND_CHART)
        found.append(Section("Time of a round", [_ROUND_TEXT], header, rows, charts=[chart]))
    return found


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


def _speed_row(record: Mapping[str, Any]) -> tuple[object, ...]:
    return (
        *_keys(record),
        _tau(record),
        f"{record['tokens_per_second']:.0f}",
        f"{record['plain_tokens_per_second']:.0f}",
        _spread(record),
        _identity(record),
    )


def _category_section(parts: Sequence[Mapping[str, Any]]) -> Section:
    rows = [
        (
            record["settings"][_CATEGORY],
            *_keys(record),
            record["n"],
            _tau(record),
            _spread(record),
            *_milliseconds(record, ("p50", "p90")),
            _identity(record),
        )
        for record in parts
    ]
    columns = ("calls", "tau", "speed-up", *_ms("P50", "P90"), "identical")
    header = (_CATEGORY, *_DISTINGUISHING, *columns)
    chart = ("Speed-up by category", CATEGORY_CHART)
    return Section("By category", [_CATEGORY_TEXT], header, rows, charts=[chart])


def _acceptance_section(records: Sequence[Mapping[str, Any]]) -> Section:
    deepest = max(len(record["kept_by_depth"]) for record in records)
    rows = [
        (*_keys(record), *(f"{share:.1%}" for share in record["kept_by_depth"]))
        for record in records
        if record["kept_by_depth"]
    ]
    return Section(
        "Acceptance by position",
        [_ACCEPTANCE_TEXT, *([] if rows else ["No draft token was accepted."])],
        (*_DISTINGUISHING, *range(1, deepest + 1)),
        [(*row, *("" for _ in range(deepest + 3 - len(row)))) for row in rows],
        charts=[("Acceptance", CHARTS["Acceptance"])],
    )


def _nodes_section(records: Sequence[Mapping[str, Any]]) -> Section:
    taus = [(record, dict(record.get("tau_by_nodes", ()))) for record in records]
    sizes = sorted(set(chain.from_iterable(found for _, found in taus)))
    rows = [
        (*_keys(record), *(f"{found[size]:.2f}" if size in found else "" for size in sizes))
        for record, found in taus
        if found
    ]
    chart = ("tau by number of nodes", NODES_CHART)
    header = (*_DISTINGUISHING, *sizes)
    return Section("tau by number of nodes", [_NODES_TEXT], header, rows, charts=[chart])


def _tau(record: Mapping[str, Any]) -> str:
    return "" if record["tau"] is None else f"{record['tau']:.2f}"


def _spread(record: Mapping[str, Any]) -> str:
    return (
        f"{record['median']:.2f} [{record['lower_quartile']:.2f}, {record['upper_quartile']:.2f}]"
    )


def _identity(record: Mapping[str, Any]) -> str:
    counts = f"{record['num_identical']} of {record['n']}"
    if not record["promises_identity"]:
        return f"{counts}, not promised"
    if record["num_identical"] == record["n"]:
        return counts
    gaps = [found["gap"] for found in record["divergences"]]
    return f"{counts}; the others differ at a gap of scores of at most {max(gaps, default=0):.2g}"


def _ms(*names: str) -> tuple[str, ...]:
    """Return headers of the method's times and of those of regular generation."""
    return tuple(f"{kind}{name}, ms" for kind in ("", "regular ") for name in names)


def _seconds(
    record: Mapping[str, Any], names: Sequence[str] = ("mean", "p50", "p90")
) -> list[float]:
    """Return figures of the method's calls, then those of regular generation's."""
    return [part[name] for part in (record["latency"], record["plain_latency"]) for name in names]


def _milliseconds(
    record: Mapping[str, Any], names: Sequence[str] = ("mean", "p50", "p90")
) -> list[str]:
    return [f"{1e3 * seconds:.0f}" for seconds in _seconds(record, names)]


def _timed(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [record for record in records if record.get("milliseconds_per_round")]


def _phases(record: Mapping[str, Any]) -> list[float]:
    return [record["milliseconds_per_round"].get(name, 0.0) for name in _PHASES]


def _acceptance_panel(records: Sequence[Mapping[str, Any]]) -> Panel:
    lines = [
        Line(_label(record), [(float(i), s) for i, s in enumerate(record["kept_by_depth"], 1)])
        for record in records
        if record["kept_by_depth"]
    ]
    return Panel("Share of rounds that kept the draft token", "position", lines)


def _distribution_panel(records: Sequence[Mapping[str, Any]]) -> Panel:
    lines = []
    for record in records:
        for name, prefix, is_dashed in (
            ("latency", "", False),
            ("plain_latency", "regular, ", True),
        ):
            points = [
                (seconds, index / NUM_QUANTILES)
                for index, seconds in enumerate(record[name]["quantiles"])
            ]
            lines.append(Line(prefix + _label(record), points, is_dashed))
    return Panel("Share of calls that took at most so long", "seconds", lines)


def _nodes_panel(records: Sequence[Mapping[str, Any]]) -> Panel:
    lines = [
        Line(_label(record), [(float(size), tau) for size, tau in record["tau_by_nodes"]])
        for record in records
        if record.get("tau_by_nodes")
    ]
    return Panel("tau of the best tree, simulated", "nodes, root excluded", lines)


def _speed_chart(title: str, records: Sequence[Mapping[str, Any]]) -> bytes:
    bars = Bars(
        "speed-up, with quartiles",
        [record["median"] for record in records],
        [(record["lower_quartile"], record["upper_quartile"]) for record in records],
    )
    return draw_bars(title, [_label(record) for record in records], [bars], line_at=1.0)


def _latency_chart(records: Sequence[Mapping[str, Any]]) -> bytes:
    names = ("mean", "P50", "P90", "regular mean", "regular P50", "regular P90")
    columns = zip(*(_seconds(record) for record in records), strict=True)
    bars = [Bars(name, column) for name, column in zip(names, columns, strict=True)]
    return draw_bars("Seconds of a call", [_label(record) for record in records], bars)


def _round_chart(records: Sequence[Mapping[str, Any]]) -> bytes:
    columns = zip(*(_phases(record) for record in records), strict=True)
    bars = [Bars(name, column) for name, column in zip(_PHASES, columns, strict=True)]
    labels = [_label(record) for record in records]
    return draw_bars("Milliseconds of a round", labels, bars, is_stacked=True)


def _label(record: Mapping[str, Any]) -> str:
    setting, batch, method = _keys(record)
    label = f"{setting}, batch {batch}"
    if _CATEGORY in record["settings"]:
        name = " ".join(record["settings"][_CATEGORY].split())
        short = name if len(name) <= _MAX_LETTERS else f"{name[: _MAX_LETTERS - 1]}…"
        label = f"{short}, {setting}"
    return label if method == "speclm" else f"{label}, {method}"
