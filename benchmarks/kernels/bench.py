"""One run of the benchmark of kernels: rows are compared, timed, recorded and described."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from benchmarks.kernels.findings import Findings
from benchmarks.kernels.methods import FLEX_OPTIONS, Attend, Shape, Workload
from benchmarks.kernels.rows import BASELINES, OURS, Measured, Row, goals
from benchmarks.kernels.timing import MIN_SAMPLES, copy_rates, product_rates, time_calls
from speclm.bench import Record, Spread, append_record

TOLERANCE = {"ours": 1e-2, "others": 3e-2}
"""Of the output's norm, in half precision: eager attention rounds its scores, too."""


@dataclass(slots=True)
class Bench:
    """A run of the benchmark.

    Args:
        device: Where everything runs.
        out: File that records are appended to.
        findings: What went wrong, and what there was no time for.
        samples: Of each figure.
        methods: What is measured; None for all.
        copy_rate: Of the machine, in gigabytes a second.
        measured: Rows that are done.
        flex_options: Best settings found, by nodes and width of heads.
    """

    device: str
    out: Path
    findings: Findings
    samples: int = MIN_SAMPLES
    methods: Sequence[str] | None = None
    copy_rate: float = 1.0
    measured: list[Measured] = field(default_factory=list)
    flex_options: dict[tuple[int, ...], Mapping[str, Any]] = field(default_factory=dict)

    @property
    def is_tiny(self) -> bool:
        """Whether this is a dry run."""
        return self.device == "cpu"

    def record(
        self, benchmark: str, samples: Sequence[float], *, unit: str, settings: dict[str, Any]
    ) -> Spread:
        """Append a record."""
        spread = Spread.of(list(samples))
        given = {"device": self.device, **settings}
        record = Record(
            benchmark=benchmark,
            settings=given,
            unit=unit,
            n=len(samples),
            median=spread.median,
            lower_quartile=spread.lower_quartile,
            upper_quartile=spread.upper_quartile,
        )
        append_record(self.out, record)
        return spread


def measure_machine(bench: Bench) -> None:
    """Measure what bounds every kernel."""
    copies = bench.record("copy_rate", copy_rates(bench.device), unit="GB/s", settings={})
    rates = product_rates(bench.device)
    products = bench.record("product_rate", rates, unit="TFLOP/s", settings={"dtype": "bfloat16"})
    bench.copy_rate = copies.median
    print(f"copies {copies.median:.0f} GB/s, products {products.median:.0f} TFLOP/s", flush=True)


def measure_row(bench: Bench, row: Row) -> None:
    """Compare, time and record the methods of a row."""
    if monotonic() >= bench.findings.deadline:
        bench.findings.leave_out(row.name, "no time")
        return
    workload = Workload(row.shape, device=bench.device)
    expected = workload.expected()
    medians: dict[str, float] = {}
    spreads: dict[str, Spread] = {}
    for method in row.methods:
        if bench.methods is not None and method not in bench.methods:
            continue
        name = f"{row.name} {method}"
        if monotonic() >= bench.findings.deadline:
            bench.findings.leave_out(name, "no time")
            continue
        try:
            found = time_method(bench, workload, method, expected)
        except Exception as error:  # noqa: BLE001 - a baseline may refuse a shape in any way
            text = f"{type(error).__name__}: {str(error)[:200]}"
            _note(bench, name, method, text)
            continue
        if found is None:
            continue
        samples, options = found
        settings = {**settings_of(row.shape), "method": method, "options": dict(options)}
        spreads[method] = bench.record("tree_attention", samples, unit="us", settings=settings)
        medians[method] = spreads[method].median
    if "ours" in medians:
        bench.measured.append(Measured(row, medians, bench.copy_rate))
        print(describe(bench.measured[-1], spreads["ours"]), flush=True)


def _note(bench: Bench, name: str, method: str, reason: str) -> None:
    """Note that a method has no figure: a failure of ours, or what a baseline does not do."""
    if method in OURS:
        bench.findings.fail(f"{name}: {reason}")
    else:
        bench.findings.leave_out(name, reason)


def time_method(
    bench: Bench, workload: Workload, method: str, expected: torch.Tensor
) -> tuple[list[float], Mapping[str, Any]] | None:
    """Return samples and settings of a method; None, and a note, if its output is wrong."""
    best: tuple[list[float], Mapping[str, Any]] | None = None
    complaint = None
    bound = TOLERANCE["ours" if method in OURS else "others"]
    for options, attend in attends(bench, workload, method):
        if method == "flex":
            torch.compiler.reset()  # which compiles a function only so often
        try:
            wrong = workload.complaint(attend, expected, bound=bound)
            if wrong is None:
                calls = [partial(attend, index) for index in range(workload.num_buffers)]
                samples = time_calls(calls, device=bench.device, samples=bench.samples)
                if best is None or Spread.of(samples).median < Spread.of(best[0]).median:
                    best = samples, options
        except Exception as error:  # a setting may not fit the device
            if method != "flex":
                raise
            wrong = f"{type(error).__name__}: {str(error)[:200]}"
        complaint = complaint or wrong
    if best is None:
        _note(bench, f"{workload.shape} {method}", method, str(complaint))
    elif method == "flex":
        bench.flex_options.setdefault(_kind(workload.shape), best[1])
    return best


def _kind(shape: Shape) -> tuple[int, ...]:
    return shape.nodes, shape.head_dim, shape.batch


def attends(
    bench: Bench, workload: Workload, method: str
) -> list[tuple[Mapping[str, Any], Attend]]:
    """Return what computes a method, with each of its settings."""
    if method == "flex":
        known = bench.flex_options.get(_kind(workload.shape))
        tried = FLEX_OPTIONS if known is None else (known,)
        if bench.is_tiny:
            return [({}, workload.flex({}, compiler="eager"))]
        return [(options, workload.flex(options)) for options in tried]
    makers: dict[str, Callable[[], Attend]] = {
        "ours": workload.ours,
        "deterministic": partial(workload.ours, deterministic=True),
        "sdpa": workload.sdpa,
        "grouped_sdpa": workload.grouped_sdpa,
        "eager": workload.eager,
    }
    return [({}, makers[method]())]


def settings_of(shape: Shape) -> dict[str, Any]:
    """Return the settings of a record."""
    return {
        "dtype": str(shape.dtype).removeprefix("torch."),
        "batch": shape.batch,
        "q_heads": shape.q_heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "prefix": shape.prefix,
        "num_nodes": shape.nodes,
        "work": {"bytes": shape.kv_bytes, "operations": shape.operations},
    }


def describe(measured: Measured, spread: Spread) -> str:
    """Return a row as text."""
    ratios = [
        f"{method} {measured.microseconds[method] / spread.median:.2f}x"
        for method in (*BASELINES, *OURS[1:])
        if method in measured.microseconds
    ]
    quartiles = f"[{spread.lower_quartile:.1f}, {spread.upper_quartile:.1f}]"
    figures = (
        f"{measured.row.name:14s} {spread.median:8.1f} us {quartiles} "
        f"{measured.bandwidth:5.0f} GB/s {100 * measured.share:3.0f} % "
        f"{measured.teraflops:4.0f} TFLOP/s  {' '.join(ratios)}"
    )
    lines = [figures]
    lines += [f"    {'met' if met else 'MISSED'}: {text}" for text, met in goals(measured)]
    return "\n".join(lines)
