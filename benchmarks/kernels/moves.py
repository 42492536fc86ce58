"""Times of keeping a path in all layers, and of making words from parents."""

from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any

import torch

from benchmarks.kernels.bench import Bench
from benchmarks.kernels.cases import random_parents, random_paths
from benchmarks.kernels.timing import time_calls
from speclm.kernels import keep_path_, tree_words

_LAYERS, _NODES, _PATH = 32, 64, 8


def measure_moves(bench: Bench) -> None:
    """Measure both, for one row and for eight."""
    for batch in (1, 8):
        if monotonic() >= bench.findings.deadline:
            bench.findings.leave_out(f"keep_path and tree_words, batch {batch}", "no time")
            continue
        _measure_keep(bench, batch)
        _measure_words(bench, batch)


def _measure_keep(bench: Bench, batch: int) -> None:
    sizes: dict[str, Any] = {"layers": _LAYERS, "kv_heads": 8, "head_dim": 128, "prefix": 4096}
    if bench.is_tiny:
        sizes = {"layers": 2, "kv_heads": 2, "head_dim": 16, "prefix": 256}
    shape = (2 * sizes["layers"], batch, sizes["kv_heads"], sizes["prefix"], sizes["head_dim"])
    storage = torch.randn(shape, dtype=torch.bfloat16, device=bench.device)
    generator = torch.Generator().manual_seed(0)
    paths = random_paths(batch, length=_PATH, nodes=_NODES, generator=generator)
    paths[:] = paths[paths[:, -1].argmax()]  # of full length in every row, if one is
    paths = paths.to(bench.device)
    places = [  # each call finds other slots, which are not in the device's cache
        torch.full((batch,), begin, dtype=torch.int32, device=bench.device)
        for begin in range(0, sizes["prefix"] - _NODES, _NODES)
    ]
    settings = {"dtype": "bfloat16", "batch": batch, "num_nodes": _NODES, **sizes}
    for method, backend in (("ours", "auto"), ("reference", "reference")):
        calls: list[Callable[[], object]] = [
            partial(
                keep_path_,
                storage,
                paths,
                prefix_lengths=place,
                check_values=False,
                backend=backend,
            )
            for place in places
        ]
        if method == "reference" and not bench.is_tiny:
            continue  # reads lengths of paths on the host, which no graph can hold
        _record(bench, "keep_path", calls, {**settings, "method": method})


def _measure_words(bench: Bench, batch: int) -> None:
    parents = random_parents(batch, _NODES, torch.Generator().manual_seed(0)).to(bench.device)
    calls = [partial(tree_words, parents, check_values=False)] * 20
    _record(bench, "tree_words", calls, {"batch": batch, "num_nodes": _NODES, "method": "ours"})


def _record(
    bench: Bench, name: str, calls: list[Callable[[], object]], settings: dict[str, Any]
) -> None:
    try:
        samples = time_calls(calls, device=bench.device, samples=bench.samples)
    except Exception as error:  # noqa: BLE001 - whatever a kernel ends with is a finding
        bench.findings.fail(f"{name}: {type(error).__name__}: {str(error)[:200]}")
        return
    spread = bench.record(name, samples, unit="us", settings=settings)
    quartiles = f"[{spread.lower_quartile:.1f}, {spread.upper_quartile:.1f}]"
    print(f"{name:14s} batch {settings['batch']} {spread.median:8.1f} us {quartiles}", flush=True)
