"""What the text-to-SQL case measures: latencies, their table next to the published ones, charts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from statistics import fmean, quantiles

from transformers import PreTrainedModel

from speclm.bench import Call, Comparison, Decoder, compare, plain_decoder
from speclm.bench.records import describe_commit
from speclm.cards import markdown_table
from speclm.errors import MeasurementError
from speclm.files.atomic import append_line, write_file, write_json, written_together
from speclm.files.json_lines import parse_json_lines
from speclm.plots import Bars, Line, Panel, draw_bars, draw_panels

REGULAR = "regular generation"
CHUNK = 50
"""Calls that are measured, and recorded, together."""

# Source: AWS Machine Learning Blog, "Achieve ~2x speed-up in LLM inference with Medusa-1 on Amazon
# SageMaker AI", February 2025: Zephyr 7B, 450 questions.
PUBLISHED = (
    ("published: Zephyr 7B", "950", "1280", "", "", "", ""),
    ("published: Zephyr 7B, Medusa heads", "530", "800", "1.79", "1.60", "", "100 %"),
)


PAGE = """\
# Text-to-SQL case

{facts}

Time from the call to its last token. tau is the number of tokens per target forward, prefill
excluded. A call is *identical* if its tokens are those of regular generation.

{table}

![Mean and 90th percentile](latency.png)

![Cumulative latency](cumulative.png)
"""


@dataclass(frozen=True, slots=True)
class Measured:
    """The calls of one way to generate.

    Args:
        name: Its name in tables and charts.
        seconds: Time of each call, prefill included.
        num_identical: Calls with the tokens of regular generation.
        num_rounds: Target forwards after the prefills.
        num_accepted: Draft tokens that they kept.
    """

    name: str
    seconds: Sequence[float]
    num_identical: int
    num_rounds: int
    num_accepted: int

    @property
    def mean(self) -> float:
        """Mean latency in seconds."""
        return fmean(self.seconds)

    @property
    def p90(self) -> float:
        """90th percentile of the latency in seconds, interpolated."""
        return quantiles(self.seconds, n=10, method="inclusive")[-1]


def measure(
    base: PreTrainedModel, calls: Sequence[Call], methods: Sequence[Decoder], *, path: Path
) -> list[Measured]:
    """Time calls by regular generation and by all methods, in turn.

    Args:
        base: The model.
        calls: What is generated.
        methods: The methods.
        path: File of what is measured. What it holds of the same commit is not measured again.

    Returns:
        Regular generation, and then the methods.

    Raises:
        MeasurementError: If an output differs from that of regular generation, and rounding does
            not explain it.
    """
    sha = describe_commit().sha
    lines = parse_json_lines(path) if path.exists() else []
    chunks = {line["first"]: line["measured"] for line in lines if line["commit"] == sha}
    print(f"\nmeasuring {REGULAR}, {', '.join(method.name for method in methods)}", flush=True)
    for first in range(0, len(calls), CHUNK):
        chunk = calls[first : first + CHUNK]
        if first not in chunks:
            found = counted(compare(plain_decoder(base), methods, chunk, base=base))
            chunks[first] = [asdict(each) for each in found]
            line = {"first": first, "commit": sha, "measured": chunks[first]}
            append_line(path, json.dumps(line))
        print(f"{first + len(chunk)} of {len(calls)} prompts", flush=True)
    by_method = zip(*(chunks[first] for first in sorted(chunks)), strict=True)
    return [joined([Measured(**part) for part in parts]) for parts in by_method]


def counted(comparisons: Sequence[Comparison]) -> list[Measured]:
    """Return what was measured in some calls, regular generation first.

    Raises:
        MeasurementError: If an output differs and rounding does not explain it.
    """
    found = []
    for each in comparisons:
        if not each.is_honest:
            raise MeasurementError(
                f"{each.method}: {each.num_identical} of {len(each.pairs)} outputs are those of "
                f"regular generation, expected all; report this as a bug"
            )
        assert each.stats is not None
        lengths = each.stats.total.accepted_lengths
        seconds = [pair.method.seconds for pair in each.pairs]
        found.append(Measured(each.method, seconds, each.num_identical, len(lengths), sum(lengths)))
    plain = [pair.plain.seconds for pair in comparisons[0].pairs]
    return [Measured(REGULAR, plain, len(plain), 0, 0), *found]


def joined(parts: Sequence[Measured]) -> Measured:
    """Return the calls of several chunks as those of one."""
    return Measured(
        parts[0].name,
        [seconds for part in parts for seconds in part.seconds],
        sum(part.num_identical for part in parts),
        sum(part.num_rounds for part in parts),
        sum(part.num_accepted for part in parts),
    )


def table(measured: Sequence[Measured]) -> str:
    """Return what was measured, next to the published figures; regular generation comes first."""
    regular, num_calls = measured[0], len(measured[0].seconds)
    rows: list[tuple[str, ...]] = [
        (
            each.name,
            f"{1e3 * each.mean:.0f}",
            f"{1e3 * each.p90:.0f}",
            *(
                ("", "", "", "")
                if each is regular
                else (
                    f"{regular.mean / each.mean:.2f}",
                    f"{regular.p90 / each.p90:.2f}",
                    f"{1 + each.num_accepted / max(each.num_rounds, 1):.2f}",
                    f"{each.num_identical} of {num_calls}",
                )
            ),
        )
        for each in measured
    ]
    header = ("", "mean, ms", "P90, ms", "mean, times faster", "P90, times faster")
    return markdown_table((*header, "tau", "identical"), [*rows, *PUBLISHED])


def latency_chart(measured: Sequence[Measured]) -> bytes:
    """Return bars of mean and 90th percentile as a PNG file."""
    names = [each.name.replace(", ", "\n").replace(" ", "\n", 1) for each in measured]
    bars = [
        Bars("mean", [1e3 * each.mean for each in measured]),
        Bars("P90", [1e3 * each.p90 for each in measured]),
    ]
    return draw_bars("Milliseconds of a call", names, bars)


def cumulative_chart(measured: Sequence[Measured]) -> bytes:
    """Return the share of prompts by latency, and the total latency by prompt, as a PNG file."""
    shares, totals = [], []
    for each in measured:
        ordered = enumerate(sorted(each.seconds), 1)
        share = [(1e3 * seconds, place / len(each.seconds)) for place, seconds in ordered]
        shares.append(Line(each.name, share))
        total = enumerate(accumulate(each.seconds), 1)
        totals.append(Line(each.name, [(float(place), seconds) for place, seconds in total]))
    return draw_panels(
        [
            Panel("Share of prompts answered", "milliseconds", shares),
            Panel("Seconds until answered", "prompts, one after the other", totals),
        ]
    )


def write_report(folder: Path, facts: Mapping[str, str], measured: Sequence[Measured]) -> None:
    """Write table and charts, which appear together.

    Args:
        folder: Made if it does not exist.
        facts: What was measured, and on what.
        measured: Regular generation, and then the others.
    """
    shown = markdown_table(("", ""), [*facts.items()])
    with written_together(folder, last="report.json") as aside:
        write_file(aside / "latency.png", latency_chart(measured))
        write_file(aside / "cumulative.png", cumulative_chart(measured))
        write_file(aside / "report.md", PAGE.format(facts=shown, table=table(measured)))
        write_json(aside / "report.json", {**facts, "measured": [*map(asdict, measured)]})
