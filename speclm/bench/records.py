"""Records of measurements, one JSON object per line, with machine, versions and commit."""

import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from speclm._version import __version__
from speclm.bench.decoders import Decoder, Task, plain_decoder
from speclm.bench.divergence import Divergence
from speclm.bench.pairs import Comparison, Latency, Pair, Spread, compare
from speclm.errors import DataError, MeasurementError, OptionError
from speclm.files.atomic import append_line
from speclm.files.json_lines import JsonLine, read_json_lines
from speclm.stats import SpeculationStats

_ROOT = Path(__file__).parents[2]
_CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine of a measurement.

    Args:
        cpu: Model name.
        num_cores: Cores that this process may use.
        num_threads: Threads of PyTorch.
        gpus: Names of the CUDA devices.
    """

    cpu: str
    num_cores: int
    num_threads: int
    gpus: list[str]


@dataclass(frozen=True, slots=True)
class Commit:
    """The state of the checkout.

    Args:
        sha: Commit; None outside a checkout.
        is_dirty: Whether files of the library differ from it.
    """

    sha: str | None
    is_dirty: bool


def describe_machine() -> Machine:
    """Return the machine that this process runs on."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    return Machine(
        cpu=_cpu_model(),
        num_cores=len(usable) if usable else os.cpu_count() or 1,
        num_threads=torch.get_num_threads(),
        gpus=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    )


def describe_versions() -> dict[str, str]:
    """Return the versions of Python, PyTorch, Transformers, speclm, and Triton if installed."""
    triton = _version_of("triton")
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": _version_of("transformers"),
        "speclm": __version__,
        **({} if triton == "unknown" else {"triton": triton}),
    }


def describe_commit() -> Commit:
    """Return the commit of the checkout that speclm was imported from."""
    sha = _git("rev-parse", "HEAD") if (_ROOT / ".git").exists() else None
    if sha is None:
        return Commit(sha=None, is_dirty=False)
    return Commit(sha=sha, is_dirty=bool(_git("status", "--porcelain", "--", "speclm")))


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One measurement, with everything needed to repeat it.

    Args:
        benchmark: What was measured.
        settings: What it was measured on and with.
        unit: Unit of median and quartiles.
        n: Number of samples, such as pairs.
        median: Median sample.
        lower_quartile: A quarter of the samples are below.
        upper_quartile: A quarter of the samples are above.
        promises_identity: Whether the outputs have to be those of regular generation.
        num_identical: Number of samples with the outputs of regular generation.
        divergences: Where outputs differ although identity was promised.
        tokens_per_second: Tokens per second of the method, all rows together.
        plain_tokens_per_second: The same for regular generation in the same pairs.
        tau: Tokens per row and target forward, prefill excluded.
        acceptance_by_depth: Acceptance rate by position in the draft: accepted over drafted.
        pause_summary: Rounds without a draft, and why; None without any.
        kept_by_depth: Share of all rounds that kept the draft token at each position.
        latency: Seconds of a call by the method.
        plain_latency: Seconds of a call by regular generation in the same pairs.
        milliseconds_per_round: Host time by phase; "other" is the rest of a call, prefill excluded.
        tau_by_nodes: Pairs of a number of nodes and the tau of trees of at most that size, as
            simulated; empty if they were not.
        fallbacks: Why calls were left to regular generation.
        machine: The machine.
        versions: Versions of the software.
        commit: Commit of the checkout.
        date: When the record was made, in UTC, ISO 8601.
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
    pause_summary: str | None = None
    kept_by_depth: list[float] = field(default_factory=list)
    latency: Latency | None = None
    plain_latency: Latency | None = None
    milliseconds_per_round: dict[str, float] = field(default_factory=dict)
    tau_by_nodes: list[tuple[int, float]] = field(default_factory=list)
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
    """Return the record of a comparison; the samples are the speed-ups of its pairs."""
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
        pause_summary=None if stats is None else stats.pause_summary,
        kept_by_depth=[] if stats is None else stats.kept_by_depth,
        latency=comparison.latency,
        plain_latency=comparison.plain_latency,
        milliseconds_per_round={} if stats is None else _times(comparison, stats),
        fallbacks=[] if stats is None else stats.fallbacks,
    )


def _times(comparison: Comparison, stats: SpeculationStats) -> dict[str, float]:
    """Return the milliseconds of a round by phase, and those outside of all phases."""
    taken = sum(pair.method.seconds for pair in comparison.pairs)
    other = taken - sum(stats.seconds.values()) - stats.engine_seconds
    return {**stats.milliseconds_per_round, "other": 1e3 * max(other, 0.0) / max(stats.rounds, 1)}


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
    """Append a record to a file; an interrupted call leaves the file as it was.

    Two processes must not append to one file at the same time.

    Raises:
        MeasurementError: If outputs were promised to be those of regular generation, were not, and
            not every difference is listed and explained by rounding.
        OptionError: If `path` is not a file.
    """
    _require_honest(record)
    if path.exists() and not path.is_file():
        raise OptionError(f"{path} is a folder or a device, expected a file of records; name one")
    path.parent.mkdir(parents=True, exist_ok=True)
    append_line(path, json.dumps(asdict(record), ensure_ascii=False))


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file as dictionaries; none when the file does not exist.

    Raises:
        DataError: If the file cannot be read, or a line is not a record.
    """
    lines = read_json_lines(path) if path.exists() else []
    return [_parse(line) for line in lines]


def find_record(path: Path, *, benchmark: str, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return the measurement with these settings by this version and commit, if any."""
    wanted = {
        "benchmark": benchmark,
        "settings": json.loads(json.dumps(settings)),
        "commit": {"sha": describe_commit().sha},
        "versions": {"speclm": __version__},
    }
    same = (record for record in read_records(path) if key_of(record) == key_of(wanted))
    return next(same, None)


def key_of(record: Mapping[str, Any]) -> tuple[object, ...]:
    """Return what a measurement is recognized by: what was measured, version and commit."""
    version_of_speclm = record["versions"]["speclm"]
    return record["benchmark"], record["settings"], record["commit"]["sha"], version_of_speclm


def is_recorded(path: Path, *, benchmark: str, settings: dict[str, Any]) -> bool:
    """Return whether a measurement with these settings was made at this commit."""
    return find_record(path, benchmark=benchmark, settings=settings) is not None


@dataclass(frozen=True, slots=True)
class Cell:
    """One entry of a grid, measured for every method.

    Args:
        calls: What is generated.
        settings: What distinguishes this cell from others; the method's name is added, and the
            category in records of one category of questions.
    """

    calls: Sequence[Task]
    settings: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Measured:
    """A method measured in a cell.

    Args:
        cell: The cell.
        comparison: The measurement.
        record: The record of all its pairs.
        groups: Records of each group of questions; empty if there are fewer than two.
    """

    cell: Cell
    comparison: Comparison
    record: Record
    groups: list[Record] = field(default_factory=list)


def measure_grid(
    cells: Sequence[Cell],
    methods: Sequence[Decoder],
    *,
    base: PreTrainedModel,
    benchmark: str,
    path: Path | None = None,
    on_pair: Callable[[Pair], object] | None = None,
    simulate: Callable[[Cell, Decoder], Mapping[int, float]] | None = None,
) -> Iterator[Measured]:
    """Measure every method in every cell; record and yield each as soon as it is measured.

    Skips methods that cannot generate a cell's batch, and what `path` already holds for the same
    commit and settings.

    Args:
        cells: What is measured on.
        methods: What is measured.
        base: The model of all methods.
        benchmark: Name of the benchmark in the records.
        path: Where records are appended; None to keep none.
        on_pair: Called with every pair.
        simulate: Returns `Record.tau_by_nodes`; called after a method was measured.

    Raises:
        MeasurementError: If outputs differ that must not; nothing is recorded for that method.
    """
    plain = plain_decoder(base)
    for cell in cells:
        batch = max((task.num_rows for task in cell.calls), default=1)
        for method in methods:
            settings = {**cell.settings, "method": method.name}
            if not method.can_run(batch):
                continue
            if path is not None and is_recorded(path, benchmark=benchmark, settings=settings):
                continue
            (comparison,) = compare(plain, [method], cell.calls, base=base, on_pair=on_pair)
            record = decode_record(comparison, benchmark=benchmark, settings=settings)
            if simulate is not None:
                simulated = sorted(simulate(cell, method).items())
                record = replace(record, tau_by_nodes=simulated)
            groups = group_records(comparison, benchmark=benchmark, settings=settings)
            if path is not None:
                for found in (*groups, record):  # the record of all pairs last: it ends a cell
                    append_record(path, found)
            yield Measured(cell, comparison, record, groups)


def group_records(
    comparison: Comparison, *, benchmark: str, settings: dict[str, Any]
) -> list[Record]:
    """Return a record of each group of questions, with its name as ``settings["category"]``."""
    return [
        decode_record(part, benchmark=benchmark, settings={**settings, "category": name})
        for name, part in comparison.by_group().items()
    ]


def _parse(line: JsonLine) -> dict[str, Any]:
    match found := line.parse():
        case {
            "benchmark": str(),
            "settings": dict(),
            "commit": {"sha": _},
            "versions": {"speclm": _},
        }:
            return found
    raise DataError(
        f"{line.where}: expected a record of a measurement, found {line.excerpt}; name a file of "
        "records, or a new one"
    )


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


def _git(*arguments: str) -> str | None:
    command = ["git", *arguments]
    try:
        result = subprocess.run(command, cwd=_ROOT, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _cpu_model() -> str:
    if _CPU_INFO.is_file():
        for line in _CPU_INFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
