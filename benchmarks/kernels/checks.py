"""Check the kernels on this machine's GPU: features, equal bits, graphs, far offsets, races.

Parts run side by side, each in a process of its own, so that their compilations share the cores and
a fault in one does not end the others. Says what was left out.

    PYTHONPATH=. python benchmarks/kernels/checks.py
    PYTHONPATH=. python benchmarks/kernels/checks.py --parts memory --in-process
    PYTHONPATH=. python benchmarks/kernels/checks.py --tiny    # a dry run on the CPU
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything needed is bundled

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from benchmarks.kernels.checks_attention import (
    attention_cases,
    check_case,
    check_deterministic,
    deterministic_cases,
)
from benchmarks.kernels.checks_graphs import check_compiled, check_compiled_keep, graph_checks
from benchmarks.kernels.checks_memory import FAR, NEAR, check_races, offset_checks, watched_checks
from benchmarks.kernels.findings import TAIL, Findings, run_side_by_side
from speclm import SpecModel
from speclm.demo.bundle import assets
from speclm.kernels.backends import is_interpreting

SECONDS = 120.0
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
"""For processes of which there are as many as cores."""
NUM_SHARDS = 7
_SANITIZERS = ("memcheck", "racecheck")
_PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
_REFUSALS = ("Device not supported", "not supported on this", "Unable to initialize")
_ERROR_STATUS = 9


@dataclass(frozen=True, slots=True)
class Setup:
    """What checks run on.

    Args:
        device: Where the kernels run.
        backend: What computes them.
        is_tiny: Whether this is a dry run.
        shard: Which cases of attention are checked: of every `num_shards` this one.
        num_shards: Processes that they are divided among.
    """

    device: str
    backend: str
    is_tiny: bool
    shard: int = 0
    num_shards: int = 1


def check_attention(setup: Setup, findings: Findings) -> None:
    cases = attention_cases(is_tiny=setup.is_tiny)
    for index, case in enumerate(cases[setup.shard :: setup.num_shards]):
        seed = setup.shard + index * setup.num_shards
        findings.check(
            f"attention {seed} {case}",
            lambda case=case, seed=seed: check_case(
                case, device=setup.device, backend=setup.backend, seed=seed
            ),
        )


def check_equal_bits(setup: Setup, findings: Findings) -> None:
    for case in deterministic_cases(is_tiny=setup.is_tiny):
        findings.check(
            f"equal bits {case}",
            lambda case=case: check_deterministic(case, device=setup.device, backend=setup.backend),
        )


def check_graphs(setup: Setup, findings: Findings) -> None:
    given = {"device": setup.device, "backend": setup.backend, "is_tiny": setup.is_tiny}
    for name, check in graph_checks(**given):
        findings.check(name, check)
    findings.check("torch.compile of attention", lambda: check_compiled(**given))
    findings.check("torch.compile of keep_path_", lambda: check_compiled_keep(device=setup.device))


def check_memory(setup: Setup, findings: Findings) -> None:
    findings.check(
        "keep_path_ of overlapping slots",
        lambda: check_races(device=setup.device, repeats=6 if setup.is_tiny else 200),
    )
    sizes = NEAR if setup.is_tiny else FAR
    for name, check in offset_checks(device=setup.device, backend=setup.backend, sizes=sizes):
        findings.check(name, check)


def check_watched(setup: Setup, findings: Findings) -> None:
    """Run the small calls that a sanitizer watches."""
    for name, check in watched_checks(device=setup.device, backend=setup.backend):
        findings.check(name, check)


def check_report(setup: Setup, findings: Findings) -> None:
    """Print what a model says about its kernels."""

    def report() -> None:
        base = AutoModelForCausalLM.from_pretrained(assets()["base"])
        model = SpecModel(base.to(setup.device), None)
        model.print_report(write=lambda line: print(f"  {line}", flush=True))

    findings.check("report of a model", report)


def sanitize(tool: str, findings: Findings) -> None:
    """Run the small calls under compute-sanitizer."""
    name = f"compute-sanitizer {tool}"
    program = shutil.which(
        "compute-sanitizer", path=os.pathsep.join([os.environ["PATH"], *_PLACES])
    )
    if program is None:
        findings.leave_out(name, "it is not installed")
        return
    if not torch.cuda.is_available():
        findings.leave_out(name, "no CUDA device is visible")
        return
    command = [program, "--tool", tool, "--error-exitcode", str(_ERROR_STATUS), sys.executable]
    command += [__file__, "--parts", "watched", "--in-process"]
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor in a block of its own
    with tempfile.TemporaryDirectory() as folder:
        (finished,) = run_side_by_side(
            {tool: command},
            deadline=findings.deadline,
            folder=Path(folder),
            environment=variables,
        )
    if finished.status is None:
        findings.leave_out(name, "it did not end in time")
        return
    judge(name, finished.output, finished.status, findings)


def judge(name: str, output: str, status: int, findings: Findings) -> None:
    """Note what a sanitizer found; a device that it refuses is no failure."""
    if status == 0:
        findings.succeed(name)
        return
    lines = output.splitlines()
    refusals = [line for line in lines if any(text in line for text in _REFUSALS)]
    if refusals:
        findings.leave_out(name, refusals[0].strip("= "))
        return
    found = [line for line in lines if line.startswith(("=====", "FAILED"))] or lines[-25:]
    findings.fail(f"{name}: exit status {status}\n" + "\n".join(found[:25]))


PARTS: Mapping[str, Callable[[Setup, Findings], None]] = {
    "attention": check_attention,
    "bits": check_equal_bits,
    "graphs": check_graphs,
    "memory": check_memory,
    "report": check_report,
    "memcheck": lambda _, findings: sanitize("memcheck", findings),
    "racecheck": lambda _, findings: sanitize("racecheck", findings),
    "watched": check_watched,
}
ALL = tuple(name for name in PARTS if name != "watched")  # which is for the sanitizers


def run_in_process(parts: Sequence[str], setup: Setup, findings: Findings) -> None:
    for part in parts:
        PARTS[part](setup, findings)


def run_in_processes(
    parts: Sequence[str],
    findings: Findings,
    *,
    is_tiny: bool,
    also: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Run parts side by side, and other commands next to them, whose output is not looked at."""
    others = also or {}
    shards = [
        (part, f"{index}/{NUM_SHARDS}" if part == "attention" else "0/1")
        for part in parts
        for index in range(NUM_SHARDS if part == "attention" else 1)
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {f"{part} {shard}": folder / f"{part}-{shard[0]}.jsonl" for part, shard in shards}
        until = str(findings.deadline - 2)  # to end by itself
        commands = {
            f"{part} {shard}": [
                *(sys.executable, __file__, "--in-process", "--parts", part, "--shard", shard),
                *("--until", until, "--findings", str(files[f"{part} {shard}"])),
                *(["--tiny"] if is_tiny else []),
            ]
            for part, shard in shards
        }
        finished = run_side_by_side(
            {**commands, **others},
            deadline=findings.deadline,
            folder=folder,
            environment=ONE_THREAD,
        )
        for process in finished:
            if process.name in others:
                print(f"{process.name}: status {process.status}, {process.seconds:.0f} s")
                if process.status:
                    print(process.output[-TAIL:])
                continue
            before = len(findings.failures)
            findings.read(files[process.name])
            if process.status is None:
                findings.leave_out(f"rest of {process.name}", "no time")
            elif process.status != 0 and len(findings.failures) == before:
                findings.fail(
                    f"{process.name}: exit status {process.status}\n{process.output[-TAIL:]}"
                )
            if process.name.startswith("report"):
                print(process.output[-TAIL:], end="")


def make_setup(options: argparse.Namespace) -> Setup:
    shard, num_shards = map(int, options.shard.split("/"))
    if options.tiny:
        backend = options.backend or ("triton" if is_interpreting() else "reference")
        return Setup("cpu", backend, is_tiny=True, shard=shard, num_shards=num_shards)
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device is visible to this Python; --tiny makes a dry run")
    backend = options.backend or "triton"
    return Setup("cuda", backend, is_tiny=False, shard=shard, num_shards=num_shards)


def summarise(findings: Findings) -> None:
    for name in findings.left_out:
        print(f"left out {name}")
    for failure in findings.failures:
        print(f"FAILED {failure}")
    print(
        f"kernels: {len(findings.passed)} checks passed, {len(findings.failures)} failed, "
        f"{len(findings.left_out)} left out"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="dry run on the CPU, in seconds")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--until", type=float, help="time on the monotonic clock, instead")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(ALL))
    parser.add_argument("--backend", help="what computes; by default Triton")
    parser.add_argument("--in-process", action="store_true", help="one part after the other")
    parser.add_argument("--shard", default="0/1", help="which part of the cases of attention")
    parser.add_argument("--findings", type=Path, help="file for a line a result")
    options = parser.parse_args(arguments)
    until = options.until or monotonic() + options.seconds
    findings = Findings(until, options.findings)
    logging.disable_progress_bar()
    if options.tiny:
        torch.set_num_threads(1)
    setup = make_setup(options)
    if options.tiny or options.in_process:
        run_in_process(options.parts, setup, findings)
    else:
        run_in_processes(options.parts, findings, is_tiny=False)
    summarise(findings)
    return 1 if findings.failures else 0


if __name__ == "__main__":
    sys.exit(main())
