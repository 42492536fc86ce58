"""Write the tables of README and documentation, and the picture, from records of measurements.

A table stands between ``<!-- results:NAME -->`` and ``<!-- /results -->`` and shows the records of
``benchmarks/results/NAME.jsonl``. Settings in the marker choose some of them, for example
``<!-- results:tau num_nodes=16 -->``; ``None`` stands for a setting that a record does not have.
All rows of a table come from one commit, that of its newest record. The picture shows the records
of ``speedup.jsonl``.

    python benchmarks/report/render.py          # rewrites tables and picture
    python benchmarks/report/render.py --check  # fails if one is out of date
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import markers, picture
from speclm.files.json_lines import parse_json_lines

PAGES = ("README.md", "docs/benchmarks.md")
RESULTS = "benchmarks/results"
PICTURE = "docs/images/speedup.svg"

Record = dict[str, Any]

PLAIN = ("base", "plain")
LABELS: Mapping[str, Mapping[str, str]] = {
    "method": {
        "base": "plain against plain",
        "plain": "plain against plain",
        "none": "no proposer",
        "useless": "drafts that are always wrong",
        "prompt_lookup": "Transformers prompt lookup",
        "assisted": "Transformers assisted generation, same draft model",
        "ngram": '`"ngram"`',
        "recycling": '`"recycling"`',
        "lookup": '`"lookup"`',
        "lookup call": '`"lookup"`, memory emptied at each call',
        "draft": "draft model",
        "medusa": "Medusa heads",
        "ngram+medusa": '`"ngram"` and Medusa heads',
        "eagle": "EAGLE-1 heads",
        "eagle3": "EAGLE-3 heads",
        "lookup+eagle3": '`"lookup"` and EAGLE-3 heads',
        "block": "block heads",
        "eagle3 auto": 'EAGLE-3 heads, `tree="auto"`',
        "ours": "ours",
        "page16": "ours, pages of 16",
        "page64": "ours, pages of 64",
        "deterministic": "ours, deterministic",
        "flex": "compiled FlexAttention",
        "sdpa": "Transformers, SDPA with a mask",
        "grouped_sdpa": "SDPA with a mask and grouped heads",
        "eager": "Transformers, eager",
    },
    "setting": {"greedy": "greedy", "t0.7": "T = 0.7, top-p 0.9", "t1.0": "T = 1"},
    "prompts": {
        "sql_dev": "text-to-SQL",
        "gsm8k_dev": "maths",
        "spec-bench": "Spec-Bench",
        "mt-bench": "MT-bench",
    },
    "category": {
        "mt_bench": "MT-bench",
        "translation": "translation",
        "summarization": "summarization",
        "qa": "question answering",
        "math_reasoning": "maths",
        "rag": "retrieval-augmented generation",
    },
    "drafter": {
        "draft": "draft model",
        "medusa": "Medusa heads",
        "eagle": "EAGLE-1 heads",
        "eagle3": "EAGLE-3 heads",
        "block": "block heads",
    },
    "device": {"cpu": "CPU", "cuda": "GPU"},
}
"""What a setting's values are called, in the order in which they are shown; others follow."""

ROWS: Mapping[str, tuple[str, ...]] = {
    "rules": ("shape", "method"),
    "tau": ("setting", "num_nodes", "drafter", "method"),
    "auto_trees": ("batch", "method"),
    "prompt_sets": ("category", "method"),
    "overhead": ("benchmark", "shape", "num_nodes", "setting"),
    "ledger": ("batch", "path", "setting", "method"),
    "kernels": ("batch", "groups", "prefix", "num_nodes", "method"),
}
"""Settings that make a row, by name of the records; `USUAL_ROWS` for all others."""
USUAL_ROWS = ("setting", "method")
TAU = (
    "tau = tokens per target forward (prefill excluded; vLLM's mean acceptance length counts the "
    "bonus token too)"
)
COLUMN = "prompts"
# They follow from others, or are given in the line above the table.
NO_CELL = ("num_prompts", "options", "max_new_tokens", "num_threads", "rule", "grown", "num_nodes")
NO_CELL += ("minimum", "counts")


@dataclass(frozen=True, slots=True)
class Unit:
    """How samples of a unit are shown.

    Args:
        samples: What is counted.
        legend: What the figures of a cell are.
        headers: Header of each column; braces stand for the set of prompts.
        figures: Returns one text for each column.
    """

    samples: str
    legend: str
    headers: tuple[str, ...]
    figures: Callable[[Record], tuple[str, ...]]


def spread(record: Record) -> str:
    low, high = record["lower_quartile"], record["upper_quartile"]
    return f"{record['median']:.2f} [{low:.2f}, {high:.2f}]"


def ratio_figures(record: Record) -> tuple[str, ...]:
    if record["tau"] is None:
        return spread(record), "-", "-"
    rates = " ".join(f"{100 * rate:.0f}" for rate in record["acceptance_by_depth"][:3])
    return spread(record), f"{record['tau']:.2f}", rates or "-"


def latency_figures(record: Record) -> tuple[str, ...]:
    times = (
        " / ".join(f"{1e3 * record[kind][name]:.0f}" for kind in ("latency", "plain_latency"))
        for name in ("p50", "p90")
    )
    return spread(record), f"{record['tau']:.2f}", *times


def kernel_figures(record: Record) -> tuple[str, ...]:
    low, median, high = (record[key] for key in ("lower_quartile", "median", "upper_quartile"))
    time = f"{median:.1f} [{low:.1f}, {high:.1f}]"
    work = record["settings"].get("work")
    if work is None:
        return time, "-", "-"
    return time, f"{work['bytes'] / median / 1e3:.0f}", f"{work['operations'] / median / 1e6:.0f}"


def dispatch_figures(record: Record) -> tuple[str, ...]:
    times = record["settings"]["times"]
    return spread(record), f"{times['ours_ms']:.2f}", f"{times['theirs_ms']:.2f}"


def count_figures(record: Record) -> tuple[str, ...]:
    counts = record["settings"]["counts"]
    low, median, high = (record[key] for key in ("lower_quartile", "median", "upper_quartile"))
    names = ("calls_in_draft_network", "levels", "host_reads", "calls_in_target")
    return f"{median:.0f} [{low:.0f}, {high:.0f}]", *(f"{counts[name]:.1f}" for name in names)


UNITS: Mapping[str, Unit] = {
    "tensor calls a round": Unit(
        samples="rounds",
        legend="Tensor calls of a round outside the target's forward, median with quartiles; those "
        "of the draft network, its runs, reads and uploads of the host, and calls in the target's "
        "forward, means",
        headers=("calls", "in the network", "runs", "host reads", "in the target"),
        figures=count_figures,
    ),
    "times regular generation": Unit(
        samples="pairs",
        legend=f"Speed-up over `base.generate`, median of pairs with quartiles; {TAU}; acceptance "
        "rate at positions 1, 2 and 3 of a draft, in percent",
        headers=("{}", "tau", "accepted"),
        figures=ratio_figures,
    ),
    "times regular generation, with times of calls": Unit(
        samples="pairs",
        legend=f"Speed-up over `base.generate`, median of pairs with quartiles; {TAU}; median and "
        "90th percentile of the milliseconds of a call, then those of `base.generate`",
        headers=("{}", "tau", "P50", "P90"),
        figures=latency_figures,
    ),
    "tokens per target forward": Unit(
        samples="calls",
        legend=f"{TAU}; over all calls, and median of calls with quartiles",
        headers=("{}: tau", "by call"),
        figures=lambda record: (f"{record['tau']:.2f}", spread(record)),
    ),
    "ms": Unit(
        samples="samples",
        legend="Milliseconds, median with quartiles",
        headers=("ms",),
        figures=lambda record: (spread(record),),
    ),
    "us": Unit(
        samples="samples",
        legend="Microseconds, median with quartiles; keys and values read; operations",
        headers=("us", "GB/s", "TFLOP/s"),
        figures=kernel_figures,
    ),
    "times Transformers' SDPA": Unit(
        samples="pairs",
        legend="Speed-up over Transformers' SDPA with a mask, median of pairs with quartiles; "
        "milliseconds of both",
        headers=("speed-up", "ours", "Transformers"),
        figures=dispatch_figures,
    ),
}


def read_records(path: Path) -> list[Record]:
    """Return the records of a file, oldest first; none when it does not exist."""
    if not path.exists():
        return []
    return sorted(parse_json_lines(path), key=lambda record: record["date"])


def value_of(record: Record, key: str) -> Any:
    return record["benchmark"] if key == "benchmark" else record["settings"].get(key)


def label_of(key: str, value: Any) -> str:
    if value is None:
        return ""
    known = LABELS.get(key, {})
    return known.get(str(value), str(value))


def in_order(key: str, values: Iterable[Any]) -> list[Any]:
    """Return the distinct values of a setting, known ones first, numbers by size."""
    known = list(LABELS.get(key, {}))

    def place(value: Any) -> tuple[int, int]:
        rank = known.index(str(value)) if str(value) in known else len(known)
        return rank, value if isinstance(value, int) else 0

    return sorted(dict.fromkeys(values), key=place)


def heading_keys(records: Sequence[Record], rows: Sequence[str]) -> list[str]:
    """Return the settings that are equal throughout a table: all that make no row and no column.

    Lists and dictionaries are left out: they describe a method further.
    """
    found = {
        key: None
        for record in records
        for key, value in record["settings"].items()
        if isinstance(value, str | int | float) and key not in {*rows, COLUMN, *NO_CELL}
    }
    return list(found)


def render(records: Sequence[Record], name: str) -> str:
    """Return the tables of records, one for each combination of settings that are no row."""
    if not records:
        return "Not measured yet.\n"
    rows = ROWS.get(name, USUAL_ROWS)
    headings = heading_keys(records, rows)
    tables: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        key = (record["unit"], *(value_of(record, heading) for heading in headings))
        tables.setdefault(key, []).append(record)
    return "\n".join(
        render_table(of_newest_commit(table), headings, rows) for table in tables.values()
    )


def of_newest_commit(records: Sequence[Record]) -> list[Record]:
    """Return the records of the commit of the last record."""
    return [record for record in records if record["commit"] == records[-1]["commit"]]


def render_table(records: Sequence[Record], headings: Sequence[str], rows: Sequence[str]) -> str:
    """Return one table under a line that says what it was measured on; newer records win."""
    if records[0]["unit"] not in UNITS:
        raise ValueError(
            f"records have unit {records[0]['unit']!r}, expected one of {sorted(UNITS)!r}; say in "
            "UNITS how it is shown"
        )
    unit = UNITS[records[0]["unit"]]
    cells: dict[tuple[tuple[Any, ...], Any], Record] = {}
    for record in records:
        row = tuple(value_of(record, key) for key in rows)
        cells[row, value_of(record, COLUMN)] = record
    used = [key for key in rows if any(value_of(r, key) is not None for r in cells.values())]
    columns = in_order(COLUMN, (column for _, column in cells))
    headers = [key.replace("_", " ") for key in used] + [
        text.format(label_of(COLUMN, column)) for column in columns for text in unit.headers
    ]
    lines = [
        caption(list(cells.values()), headings, unit),
        "",
        "| " + " | ".join(headers) + " |",
        "| " + " | ".join("---" for _ in headers) + " |",
    ]
    for row in row_order([row for row, _ in cells], rows):
        names = [label_of(key, value) for key, value in zip(rows, row, strict=True) if key in used]
        figures = [
            text
            for column in columns
            for text in (
                unit.figures(cells[row, column])
                if (row, column) in cells
                else ("-",) * len(unit.headers)
            )
        ]
        lines.append("| " + " | ".join([*names, *figures]) + " |")
    return "\n".join(lines) + "\n"


def row_order(found: Sequence[tuple[Any, ...]], rows: Sequence[str]) -> list[tuple[Any, ...]]:
    """Return distinct rows, ordered by their settings from the first one on."""
    orders = [
        in_order(key, values) for key, values in zip(rows, zip(*found, strict=True), strict=True)
    ]
    return sorted(
        dict.fromkeys(found),
        key=lambda row: [order.index(value) for order, value in zip(orders, row, strict=True)],
    )


def caption(records: Sequence[Record], headings: Sequence[str], unit: Unit) -> str:
    """Return what a table shows, and what it was measured on."""
    first = records[0]["settings"]
    constants = [describe_setting(key, first[key]) for key in headings if key in first]
    title = f"**{', '.join(constants)}.** " if constants else ""
    counts = [record["n"] for record in records]
    low, high = min(counts), max(counts)
    number = f"{low}" if low == high else f"{low} to {high}"
    parts = [
        f"{title}{unit.legend}.",
        f"{number} {unit.samples} per row{' and prompt set' if COLUMN in first else ''};",
        f"{distinct(records, describe_machine)};",
        f"{distinct(records, describe_versions)};",
        f"commit {describe_commit(records[0])}.",
        *bytes_read(records),
        *identity(records),
    ]
    return markers.wrap(" ".join(parts))


def bytes_read(records: Sequence[Record]) -> list[str]:
    """Return how many bytes of weights a forward of each module reads, where records say so."""
    read: dict[str, int] = {}
    for record in records:
        read.update(record["settings"].get("bytes_read", {}))
    if not read:
        return []
    amounts = ", ".join(f"{name} {number / 1e9:.2f} GB" for name, number in read.items())
    return [f"Weights read by one forward: {amounts}."]


def identity(records: Sequence[Record]) -> list[str]:
    """Return how many outputs are identical to regular generation, of those that have to be."""
    ours = [
        record
        for record in records
        if record["promises_identity"]
        and record["num_identical"] is not None
        and record["settings"].get("method") not in PLAIN
    ]
    if not ours:
        return []
    same, total = (sum(record[key] for record in ours) for key in ("num_identical", "n"))
    rest = "" if same == total else "; the others differ from a near tie on"
    return [f"Outputs identical to `base.generate`: {same} of {total}{rest}."]


def distinct(records: Sequence[Record], describe: Callable[[Record], str]) -> str:
    return " and ".join(dict.fromkeys(describe(record) for record in records))


def describe_setting(key: str, value: Any) -> str:
    if isinstance(value, bool):
        name = key.removeprefix("is_").replace("_", " ")
        return name if value else f"not {name}"
    named = key in LABELS or isinstance(value, str)
    return label_of(key, value) if named else f"{key.replace('_', ' ')} {value}"


def describe_machine(record: Record) -> str:
    machine = record["machine"]
    counts = [
        f"{machine[key]} {word}" + ("s" if machine[key] != 1 else "")
        for key, word in (("num_cores", "core"), ("num_threads", "thread"))
    ]
    return ", ".join([*machine["gpus"], machine["cpu"], *counts])


def describe_versions(record: Record) -> str:
    return ", ".join(f"{name} {version}" for name, version in record["versions"].items())


def describe_commit(record: Record) -> str:
    commit = record["commit"]
    return f"{(commit['sha'] or 'unknown')[:7]}{' (modified)' if commit['is_dirty'] else ''}"


def rewrite(text: str, results: Path) -> str:
    """Return a page with the tables of all its markers rendered anew.

    Raises:
        ValueError: If a marker has no partner or no name.
    """

    def fill(name: str, wanted: Mapping[str, str]) -> str:
        records = [
            record
            for record in read_records(results / f"{name}.jsonl")
            if all(str(value_of(record, key)) == value for key, value in wanted.items())
        ]
        return render(records, name)

    return markers.rewrite(text, "results", fill)


def main(arguments: Sequence[str] | None = None) -> int:
    def draw(root: Path) -> str:
        records = of_newest_commit(read_records(root / RESULTS / "speedup.jsonl"))
        return picture.draw(records, label_of=label_of)

    return markers.write_pages(
        PAGES,
        lambda text, root: rewrite(text, root / RESULTS),
        files={PICTURE: draw},
        script="benchmarks/report/render.py",
        description=__doc__.splitlines()[0],
        arguments=arguments,
    )


if __name__ == "__main__":
    sys.exit(main())
