"""Records of measurements, one JSON object a line."""

import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from speclm.bench.divergence import Divergence
from speclm.bench.machine import (
    Commit,
    Machine,
    describe_commit,
    describe_machine,
    describe_versions,
)
from speclm.bench.pairs import Comparison, Spread
from speclm.errors import DataError, MeasurementError, OptionError
from speclm.files.atomic import append_line
from speclm.files.json_lines import JsonLine, read_json_lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One measurement, with everything needed to repeat and to doubt it.

    Args:
        benchmark: What was measured.
        settings: What it was measured on and with.
        unit: Of median and quartiles.
        n: Number of samples, such as pairs.
        median: Median sample.
        lower_quartile: A quarter of the samples are below.
        upper_quartile: A quarter of the samples are above.
        promises_identity: Whether the outputs have to be those of regular generation.
        num_identical: Samples whose outputs were those of regular generation.
        divergences: Where outputs differ though identity was promised.
        tokens_per_second: Of the method, all rows together.
        plain_tokens_per_second: Of regular generation in the same pairs.
        tau: Tokens per row and target forward, prefill excluded.
        acceptance_by_depth: Share of drafts that reached a depth and were kept there.
        milliseconds_per_round: Host time by phase.
        fallbacks: Why calls were decoded without speculation.
        machine: The machine.
        versions: Of the software.
        commit: Of the checkout.
        date: Time of day in UTC at which the record was made, ISO 8601.
    """

    benchmark: str
    settings: dict[str, Any]
    unit: str
    n: int
    median: float
    lower_quartile: float
    upper_quartile: float
    promises_identity: bool = True
    num_identical: int | None = None
    divergences: list[Divergence] = field(default_factory=list)
    tokens_per_second: float | None = None
    plain_tokens_per_second: float | None = None
    tau: float | None = None
    acceptance_by_depth: list[float] = field(default_factory=list)
    milliseconds_per_round: dict[str, float] = field(default_factory=dict)
    fallbacks: list[str] = field(default_factory=list)
    machine: Machine = field(default_factory=describe_machine)
    versions: dict[str, str] = field(default_factory=describe_versions)
    commit: Commit = field(default_factory=describe_commit)
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def unexplained(self) -> list[Divergence]:
        """Divergences that rounding does not account for."""
        return [found for found in self.divergences if not found.is_explained]


def decode_record(comparison: Comparison, *, benchmark: str, settings: dict[str, Any]) -> Record:
    """Return the record of a comparison; the samples are the ratios of its pairs."""
    ratio, stats = comparison.ratio, comparison.stats
    return Record(
        benchmark=benchmark,
        settings=settings,
        unit="times regular generation",
        n=len(comparison.pairs),
        median=ratio.median,
        lower_quartile=ratio.lower_quartile,
        upper_quartile=ratio.upper_quartile,
        promises_identity=comparison.promises_identity,
        num_identical=comparison.num_identical,
        divergences=comparison.divergences,
        tokens_per_second=comparison.tokens_per_second,
        plain_tokens_per_second=comparison.plain_tokens_per_second,
        tau=None if stats is None else stats.tau,
        acceptance_by_depth=[] if stats is None else stats.acceptance_by_depth,
        milliseconds_per_round={} if stats is None else stats.milliseconds_per_round,
        fallbacks=[] if stats is None else stats.fallbacks,
    )


def time_record(spread: Spread, *, n: int, benchmark: str, settings: dict[str, Any]) -> Record:
    """Return the record of `n` times in milliseconds."""
    return Record(
        benchmark=benchmark,
        settings=settings,
        unit="ms",
        n=n,
        median=spread.median,
        lower_quartile=spread.lower_quartile,
        upper_quartile=spread.upper_quartile,
    )


def append_record(path: Path, record: Record) -> None:
    """Append a record to a file; the file holds either all old lines or those and the new one.

    Two processes must not append to one file at the same time.

    Raises:
        MeasurementError: If outputs were promised to be those of regular generation, were not, and
            not every difference is listed and explained by rounding.
        OptionError: If `path` is no file.
    """
    _require_honest(record)
    if path.exists() and not path.is_file():
        raise OptionError(f"{path} is a folder or a device, expected a file of records; name one")
    path.parent.mkdir(parents=True, exist_ok=True)
    append_line(path, json.dumps(asdict(record), ensure_ascii=False))


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records in a file as plain dictionaries; none when it does not exist.

    Raises:
        DataError: If the file cannot be read, or a line is no record.
    """
    lines = read_json_lines(path) if path.exists() else []
    return [_parse(line) for line in lines]


def is_recorded(path: Path, *, benchmark: str, settings: dict[str, Any]) -> bool:
    """Return whether a measurement with these settings was made at this commit."""
    sha = describe_commit().sha
    wanted = json.loads(json.dumps(settings))
    return any(
        (record["benchmark"], record["settings"], record["commit"]["sha"])
        == (benchmark, wanted, sha)
        for record in read_records(path)
    )


def _parse(line: JsonLine) -> dict[str, Any]:
    found = line.parse()
    if not isinstance(found.get("commit"), dict) or not {"benchmark", "settings"} <= found.keys():
        raise DataError(
            f"{line.where}: expected a record of a measurement, found {line.excerpt}; name a file "
            "of records, or a new one"
        )
    return found


def _require_honest(record: Record) -> None:
    if not record.promises_identity or record.num_identical is None:
        return
    num_listed = len({found.call for found in record.divergences})
    num_differing = record.n - record.num_identical
    if record.unexplained or num_listed != num_differing:
        raise MeasurementError(
            f"{record.benchmark} {record.settings!r}: {num_differing} of {record.n} outputs differ "
            f"from regular generation, expected none unless listed and explained by rounding; "
            f"listed are {record.divergences!r}; nothing was recorded, report this as a bug"
        )
