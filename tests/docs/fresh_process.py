"""Runs Python code and `speclm` commands in processes of their own, without their imports.

As a program, it imports the libraries once and then forks a process for each request: they take
five seconds to import, and most pages of the documentation one to run.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 300

# What runs imports the checkout that it belongs to, and computes on one thread.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

IMPORTED = (
    "speclm.cli",
    "speclm.bench",
    "speclm.demo",
    "speclm.training",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llama.tokenization_llama",
)

Step = tuple[str, int, str | list[str]]
"""Where it stands (a name, and the lines above it), and Python code or the words of a command."""


class Processes:
    """Forks processes that have imported speclm."""

    def __init__(self, parent: subprocess.Popen[str]) -> None:
        self._parent = parent

    def run(self, steps: list[Step], folder: Path) -> str | None:
        """Run steps in order in a new process, whose Python code shares one namespace.

        Args:
            steps: What to run.
            folder: Where to run it.

        Returns:
            None if all went well, otherwise what was printed.
        """
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        output = folder / ".output"
        self._parent.stdin.write(json.dumps([steps, str(folder), str(output)]) + "\n")
        self._parent.stdin.flush()
        status = self._parent.stdout.readline()
        assert status, "the process that forks has ended"
        printed = output.read_text(encoding="utf-8")
        output.unlink()
        return None if int(status) == 0 else printed + f"exit status {status}"


@contextmanager
def forked_processes() -> Iterator[Processes]:
    """Start the process that forks, and end it."""
    command = [sys.executable, __file__]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=ENVIRONMENT) as parent:
        yield Processes(parent)


def _serve() -> None:
    """Fork a process for each line of the input, and print its exit status."""
    for name in IMPORTED:
        import_module(name)
    gc.freeze()  # the collector would write to, and so copy, what processes share
    sys.path[0] = ""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _end_after(partial(_run, *json.loads(line)))
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def _run(steps: list[Step], folder: str, output: str) -> None:
    signal.alarm(TIMEOUT_SECONDS)
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = os.fdopen(0, encoding="utf-8")  # the other one has been read from
    printed = os.open(output, os.O_WRONLY | os.O_CREAT)
    for descriptor in (1, 2):
        os.dup2(printed, descriptor)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for name, line, source in steps:
        if isinstance(source, str):
            exec(compile("\n" * line + source, name, "exec"), namespace)
        elif _run_command(source):
            sys.exit(f"{name}:{line + 1}: {' '.join(source)} failed")


def _end_after(action: Callable[[], object]) -> NoReturn:
    """Run what is left of a process, and end it as Python does, without freeing its imports.

    That takes as long as most pages: two seconds.
    """
    status: object = None
    try:
        action()
    except SystemExit as ended:
        status = ended.code
    except BaseException:  # noqa: BLE001 - Python ends a process by any of them
        traceback.print_exc()
        status = 1
    if not isinstance(status, int | None):
        sys.stderr.write(f"{status}\n")
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


def _run_command(words: list[str]) -> int:
    """Run a command in a process of its own; return its exit status."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        sys.argv = words
        _end_after(partial(runpy.run_module, words[0], run_name="__main__", alter_sys=True))
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    _end_after(_serve)
