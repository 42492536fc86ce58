"""Which implementation computes a kernel, and why."""

import importlib.util
import logging
import os
from dataclasses import dataclass
from functools import cache

import torch

from speclm.errors import KernelError
from speclm.kernels.launch import HEAD_DIMS

VARIABLE = "SPECLM_KERNELS"
"""Environment variable that forces a backend wherever a caller leaves it to us."""

NAMES = ("triton", "sdpa", "reference")
"""Backends that an op may have, the plainest one last; every op has that one."""

_TRITON_TYPES = (torch.float16, torch.bfloat16, torch.float32)
_log = logging.getLogger("speclm")


@dataclass(frozen=True, slots=True)
class Choice:
    """A backend.

    Args:
        backend: ``"triton"``, ``"sdpa"`` or ``"reference"``.
        reason: Why it is this one, for reports.
    """

    backend: str
    reason: str


def choose(backend: str, *, names: tuple[str, ...], obstacles: dict[str, str | None]) -> Choice:
    """Choose the first backend that has no obstacle, or the one that is asked for.

    A choice that is not the first one is logged, once for each reason.

    Args:
        backend: A name; ``"auto"`` leaves it to the environment, and then to us.
        names: Backends of the kernel, the preferred one first.
        obstacles: What speaks against a backend; None for those that can compute the call.

    Raises:
        KernelError: If the backend is unknown, or cannot compute the call.
    """
    if backend not in {"auto", *names}:
        raise KernelError(
            f"backend is {backend!r}, expected one of {['auto', *names]!r}; correct the name"
        )
    asked = forced_backend(names) if backend == "auto" else backend
    if asked is not None:
        obstacle = obstacles.get(asked)
        if obstacle is not None:
            way_out = f"unset {VARIABLE}" if backend == "auto" else 'leave it out or pass "auto"'
            raise KernelError(f"backend {asked!r} cannot be used: {obstacle}; {way_out}")
        return Choice(asked, "asked for")
    for name in names:
        if obstacles.get(name) is None:
            against = [text for other in names[: names.index(name)] if (text := obstacles[other])]
            choice = Choice(name, "; ".join(against) or "runs on this device")
            if against:
                _log_once(choice)
            return choice
    found = "; ".join(f"{name}: {text}" for name, text in obstacles.items())
    raise KernelError(f"no backend can compute the call: {found}; change what it asks for")


def require_backend_name(backend: object) -> None:
    """Check that what should name a backend is text; `choose` looks at the name.

    Raises:
        KernelError: If it is not.
    """
    if not isinstance(backend, str):
        raise KernelError(f"backend is {backend!r}, expected the name of one, or 'auto'")


def forced_backend(names: tuple[str, ...]) -> str | None:
    """Return the backend that the environment forces on an op, or None where it forces none.

    A backend that the op lacks and others have stands for the next plainer one: ``"sdpa"`` keeps
    ops without it off Triton, too.

    Args:
        names: Backends of the op.

    Raises:
        KernelError: If no op has a backend of that name.
    """
    asked = os.environ.get(VARIABLE, "auto")
    if asked == "auto":
        return None
    if asked not in NAMES:
        raise KernelError(
            f"{VARIABLE} is {asked!r}, expected one of {['auto', *NAMES]!r}; correct the name"
        )
    return next(name for name in NAMES[NAMES.index(asked) :] if name in names)


def triton_obstacle(device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Say why Triton kernels do not run on a device, or not with a type; None where they do."""
    if dtype is not None and dtype not in _TRITON_TYPES:
        return f"the Triton kernel takes float16, bfloat16 and float32, not {dtype}"
    if not _has_triton():
        return "Triton is not installed (pip install triton)"
    if device.type == "cpu":
        return None if is_interpreting() else "Triton has no CPU backend"
    if device.type != "cuda":
        return f"the Triton kernel is not tested on {device.type} devices"
    return _cuda_obstacle(device)


def head_obstacle(head_dim: int) -> str | None:
    """Say why the Triton kernel does not take heads of a width; None where it does."""
    if head_dim in HEAD_DIMS:
        return None
    return f"the Triton kernel takes heads of {', '.join(map(str, HEAD_DIMS))}, not {head_dim}"


def is_recording(device: torch.device) -> bool:
    """Whether a graph is compiled, or captured on the device, in which nothing can be read."""
    if torch.compiler.is_compiling():
        return True
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def is_interpreting() -> bool:
    """Whether Triton's interpreter stands in for a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _cuda_obstacle(device: torch.device) -> str | None:
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        return f"{name} is older than compute capability 8.0, which the Triton kernel needs"
    return None


@cache
def _log_once(choice: Choice) -> None:
    _log.info("kernels run on %s: %s", choice.backend, choice.reason)
