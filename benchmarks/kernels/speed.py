"""Measure the kernels on this machine's GPU next to FlexAttention, SDPA and eager attention.

Outputs are compared before anything is timed. On a CPU our dispatch is measured next to what
Transformers computes with a mask.

    PYTHONPATH=. python benchmarks/kernels/speed.py
    PYTHONPATH=. python benchmarks/kernels/speed.py --rows 't64-*' --seconds 60
    PYTHONPATH=. python benchmarks/kernels/speed.py --rows t64-n32k --launches
    PYTHONPATH=. python benchmarks/kernels/speed.py --device cpu
    PYTHONPATH=. python benchmarks/kernels/speed.py --tiny --out /tmp/kernels.jsonl  # a dry run
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from time import monotonic

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # kernels compile side by side before

import torch

from benchmarks.kernels.bench import Bench, attends, measure_machine, measure_row
from benchmarks.kernels.dispatch import measure_dispatch
from benchmarks.kernels.findings import Findings, run_side_by_side
from benchmarks.kernels.methods import Workload
from benchmarks.kernels.moves import measure_moves
from benchmarks.kernels.rows import BASELINES, OURS, Row, chosen, goals, rows, tiny_rows
from benchmarks.kernels.timing import time_calls

OUT = Path("benchmarks/results/kernels.jsonl")
SECONDS = 240.0
NUM_WARMERS = 6


def warm(found: Sequence[Row], share: str, device: str, *, methods: Sequence[str] | None) -> None:
    """Compile what a share of the rows needs, into the caches of Triton and Inductor."""
    index, number = map(int, share.split("/"))
    bench = Bench(device, OUT, Findings(monotonic()), methods=methods)
    for row in found[index::number]:
        workload = Workload(row.shape, device=device, is_timed=False)
        for method in row.methods:
            if method not in {*OURS, "flex"} or (methods is not None and method not in methods):
                continue
            for _, attend in attends(bench, workload, method):
                torch.compiler.reset()
                try:
                    attend(0)
                except Exception as error:  # noqa: BLE001 - the benchmark itself tells
                    print(f"{row.name} {method}: {type(error).__name__}")


def warm_commands(*, patterns: Sequence[str] | None = None) -> dict[str, list[str]]:
    """Return processes that compile what the benchmark needs, by name."""
    chosen_rows = ["--rows", *patterns] if patterns else []
    return {
        f"compile {index}/{NUM_WARMERS}": [
            *(sys.executable, __file__, "--warm", f"{index}/{NUM_WARMERS}", *chosen_rows)
        ]
        for index in range(NUM_WARMERS)
    }


def print_launches(found: Sequence[Row], device: str, *, methods: Sequence[str]) -> None:
    """Print the kernels that methods of rows launch, with their times."""
    bench = Bench(device, OUT, Findings(monotonic()))
    activity = torch.profiler.ProfilerActivity
    kinds = [activity.CPU] if device == "cpu" else [activity.CUDA]
    for row in found:
        workload = Workload(row.shape, device=device)
        for method in methods:
            _, attend = attends(bench, workload, method)[0]
            calls = [partial(attend, index) for index in range(workload.num_buffers)]
            time_calls(calls, device=device, samples=3)
            with torch.profiler.profile(activities=kinds) as profile:
                for call in calls * 5:
                    call()
                if device != "cpu":
                    torch.cuda.synchronize()
            print(f"{row.name} {method}, {5 * len(calls)} calls")
            order = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
            table = profile.key_averages().table(
                sort_by=order, row_limit=12, max_name_column_width=70
            )
            print(table)


def run(bench: Bench, found: Sequence[Row]) -> None:
    """Measure rows until there is no time left."""
    if monotonic() < bench.findings.deadline:
        measure_machine(bench)
    for row in found:
        measure_row(bench, row)
    if bench.methods is None:
        measure_moves(bench)
    results = [met for measured in bench.measured for _, met in goals(measured)]
    print(f"goals: {sum(results)} met, {len(results) - sum(results)} missed")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="dry run on the CPU, in seconds")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--rows", nargs="+", help="patterns of names, such as 't64-*'")
    parser.add_argument("--methods", nargs="+", choices=(*OURS, *BASELINES))
    parser.add_argument("--launches", action="store_true", help="print kernels, time nothing")
    parser.add_argument("--warm", metavar="I/N", help="compile a share of the rows, time nothing")
    parser.add_argument("--no-warm", action="store_true", help="compile as it goes")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    if options.tiny or options.device == "cpu":
        torch.set_num_threads(1)
    if options.device == "cpu" and not options.tiny:
        return measure_dispatch(options.out, seconds=options.seconds, patterns=options.rows)
    if not options.tiny and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is visible to this Python; --tiny makes a dry run")
    deadline = monotonic() + options.seconds
    device = "cpu" if options.tiny else "cuda"
    found = chosen(tiny_rows() if options.tiny else rows(), options.rows)
    if options.warm:
        warm(found, options.warm, device, methods=options.methods)
        return 0
    if options.launches:
        print_launches(found, device, methods=options.methods or ["ours"])
        return 0
    if not options.tiny and not options.no_warm:
        with tempfile.TemporaryDirectory() as folder:
            run_side_by_side(
                warm_commands(patterns=options.rows),
                deadline=monotonic() + options.seconds / 2,
                folder=Path(folder),
                environment={"OMP_NUM_THREADS": "1"},
            )
    findings = Findings(deadline)
    bench = Bench(device, options.out, findings, methods=options.methods)
    if options.tiny:
        bench.samples = 3
    run(bench, found)
    print(f"{len(findings.failures)} failures, {len(findings.left_out)} left out")
    return 1 if findings.failures else 0


if __name__ == "__main__":
    sys.exit(main())
