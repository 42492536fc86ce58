"""What a measurement ran on: machine, versions and commit."""

import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from speclm._version import __version__

_ROOT = Path(__file__).parents[2]
_CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine.

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
        is_dirty: Whether tracked files of the library differ from it.
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
    """Return the versions of Python, PyTorch, Transformers, speclm, and Triton where it is."""
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
