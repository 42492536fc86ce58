"""Our op on a CPU next to what Transformers computes with a mask, in pairs."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.kernels.methods import Attend, Shape, Workload
from speclm.bench import Record, Spread, append_record

PAIRS = 20
_TYPES = (torch.float32, torch.bfloat16)
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Of the output's norm: both round scores and shares, in other orders."""


def shapes(*, is_tiny: bool = False) -> Iterator[tuple[str, Shape]]:
    """Return what is measured, by name."""
    if is_tiny:
        yield "tiny", Shape(40, 5, 2, 4, 2, 16, torch.float32)
        return
    for groups in (4, 1):
        for dtype in _TYPES:
            for batch in (1, 4):
                for prefix in (1024, 4096):
                    for nodes in (8, 16, 32):
                        kind = str(dtype).removeprefix("torch.")
                        name = f"g{groups}-b{batch}-n{prefix // 1024}k-t{nodes}-{kind}"
                        yield name, Shape(prefix, nodes, batch, 32, 32 // groups, 128, dtype)


def measure_dispatch(
    out: Path,
    *,
    seconds: float,
    patterns: Sequence[str] | None = None,
    pairs: int = PAIRS,
    is_tiny: bool = False,
) -> int:
    """Measure all shapes that fit a pattern; return the exit status."""
    deadline = monotonic() + seconds
    status = 0
    for name, shape in shapes(is_tiny=is_tiny):
        if patterns and not any(fnmatch(name, pattern) for pattern in patterns):
            continue
        if monotonic() >= deadline:
            print(f"left out, no time: {name}")
            continue
        workload = Workload(shape, device="cpu")
        ours, theirs = workload.ours(check_values=True), workload.sdpa()
        complaint = workload.complaint(ours, theirs(0), bound=_TOLERANCE[shape.dtype])
        if complaint is not None:
            print(f"FAILED {name}: {complaint}")
            status = 1
            continue
        mine, others = _time_pairs(ours, theirs, workload.num_buffers, pairs)
        _report(out, name, shape, mine, others)
    measure_overhead(out)
    return status


@torch.no_grad()
def _time_pairs(
    ours: Attend, theirs: Attend, buffers: int, pairs: int
) -> tuple[list[float], list[float]]:
    """Return milliseconds of both, each pair in the other order than the one before."""
    seconds: dict[Attend, list[float]] = {ours: [], theirs: []}
    for index in range(pairs + 2):
        for attend in (ours, theirs) if index % 2 else (theirs, ours):
            start = perf_counter()
            attend(index % buffers)
            seconds[attend].append(perf_counter() - start)
    # The first ones warm up.
    return [1e3 * x for x in seconds[ours][2:]], [1e3 * x for x in seconds[theirs][2:]]


def _report(
    out: Path, name: str, shape: Shape, mine: Sequence[float], others: Sequence[float]
) -> None:
    ratio = Spread.of([b / a for a, b in zip(mine, others, strict=True)])
    in_ms, theirs = Spread.of(list(mine)), Spread.of(list(others))
    settings = {
        "device": "cpu",
        "dtype": str(shape.dtype).removeprefix("torch."),
        "q_heads": shape.q_heads,
        "head_dim": shape.head_dim,
        "batch": shape.batch,
        "groups": shape.q_heads // shape.kv_heads,
        "prefix": shape.prefix,
        "num_nodes": shape.nodes,
        "times": {"ours_ms": in_ms.median, "theirs_ms": theirs.median},
    }
    _append(out, "tree_attention_dispatch", ratio, len(mine), "times Transformers' SDPA", settings)
    quartiles = f"[{ratio.lower_quartile:.2f}, {ratio.upper_quartile:.2f}]"
    least = 1.5 if shape.kv_heads < shape.q_heads else 1.0
    print(
        f"{name:22s} {ratio.median:5.2f} {quartiles} times as fast, {in_ms.median:.2f} ms next to "
        f"{theirs.median:.2f} ms{'' if ratio.median >= least else f'  MISSED: {least}'}",
        flush=True,
    )


def measure_overhead(out: Path, *, repeats: int = 300) -> None:
    """Measure what a call takes where there is next to nothing to compute."""
    shape = Shape(64, 8, 1, 4, 2, 64, torch.float32)
    workload = Workload(shape, device="cpu")
    query, key, value = workload.query, *workload.cache(0)
    mask = workload.visible
    bare = partial(F.scaled_dot_product_attention, query, key, value, mask, enable_gqa=True)
    methods = {
        "bare SDPA": bare,
        "unchecked": partial(workload.ours(check_values=False), 0),
        "checked": partial(workload.ours(check_values=True), 0),
        "Transformers": partial(workload.sdpa(), 0),
    }
    times: dict[str, list[float]] = {method: [] for method in methods}
    with torch.no_grad():
        for _ in range(repeats):
            for method, call in methods.items():
                start = perf_counter()
                call()
                times[method].append(1e6 * (perf_counter() - start))
    for method, samples in times.items():
        spread = Spread.of(samples)
        settings = {"device": "cpu", "prefix": 64, "num_nodes": 8, "method": method}
        _append(out, "call_overhead", spread, repeats, "us", settings)
        print(f"call of {method}: {spread.median:.0f} us")


def _append(
    out: Path, benchmark: str, spread: Spread, n: int, unit: str, settings: dict[str, Any]
) -> None:
    record = Record(
        benchmark=benchmark,
        settings=settings,
        unit=unit,
        n=n,
        median=spread.median,
        lower_quartile=spread.lower_quartile,
        upper_quartile=spread.upper_quartile,
    )
    append_record(out, record)
