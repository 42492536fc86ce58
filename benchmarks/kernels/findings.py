"""What checks found, in this process and in those it starts."""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep

from speclm.files.json_lines import parse_json_lines

TAIL = 1500
"""Characters at the end of what was printed that are worth showing."""


@dataclass(slots=True)
class Findings:
    """What passed, what failed and what there was no time for.

    Args:
        deadline: On the monotonic clock; checks that would begin later are left out.
        path: File that is given a line a result, for a process that may be ended.
        passed: Names of checks.
        failures: Names and complaints.
        left_out: Names and reasons.
    """

    deadline: float
    path: Path | None = None
    passed: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def check(self, name: str, check: Callable[[], str | None]) -> None:
        """Run a check, which returns a complaint or None; what it raises is one, too."""
        if monotonic() >= self.deadline:
            self.leave_out(name, "no time")
            return
        try:
            complaint = check()
        except Exception as error:  # noqa: BLE001 - whatever a kernel ends with is a finding
            complaint = f"{type(error).__name__}: {str(error)[:TAIL]}"
        if complaint is None:
            self.succeed(name)
        else:
            self._note("failures", f"{name}: {complaint}")

    def succeed(self, name: str) -> None:
        """Note that a check passed."""
        self._note("passed", name)

    def leave_out(self, name: str, reason: str) -> None:
        """Note that something was not checked."""
        self._note("left_out", f"{name}: {reason}")

    def fail(self, text: str) -> None:
        """Note a failure."""
        self._note("failures", text)

    def _note(self, kind: str, text: str) -> None:
        getattr(self, kind).append(text)
        word = {"passed": "ok", "failures": "FAILED", "left_out": "left out"}[kind]
        print(f"{word} {text}", flush=True)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, "text": text}) + "\n")

    def read(self, path: Path) -> None:
        """Take over what a process noted in its file."""
        if not path.exists():
            return
        for row in parse_json_lines(path):
            kind, text = row["kind"], row["text"]
            getattr(self, kind).append(text)
            if kind == "failures":
                print(f"FAILED {text}", flush=True)


@dataclass(frozen=True, slots=True)
class Finished:
    """A process that has ended.

    Args:
        name: What it was started as.
        status: Exit status; None where it was ended because there was no time left.
        output: What it printed.
        seconds: How long it ran.
    """

    name: str
    status: int | None
    output: str
    seconds: float


def run_side_by_side(
    commands: Mapping[str, Sequence[str]],
    *,
    deadline: float,
    folder: Path,
    environment: Mapping[str, str] | None = None,
) -> list[Finished]:
    """Run commands at once and return how each ended; those that are not done by then are ended.

    Args:
        commands: Arguments of each process, by its name.
        deadline: On the monotonic clock.
        folder: Where what they print is written.
        environment: Variables next to those of this process.
    """
    variables = {**os.environ, **(environment or {})}
    running = {}
    start = monotonic()
    for name, command in commands.items():
        log = folder / f"{name.replace('/', '-').replace(' ', '-')}.log"
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                list(command),
                stdout=file,
                stderr=subprocess.STDOUT,
                env=variables,
                start_new_session=True,
            )
        running[name] = (process, log)
    finished = []
    while running:
        for name, (process, log) in list(running.items()):
            status = process.poll()
            is_late = status is None and monotonic() >= deadline
            if is_late:
                os.killpg(process.pid, signal.SIGKILL)  # with what it started
                process.wait()
            if status is not None or is_late:
                del running[name]
                output = log.read_text(encoding="utf-8", errors="replace")
                finished.append(Finished(name, status, output, monotonic() - start))
        sleep(0.05)
    return finished
