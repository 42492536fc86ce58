"""Choose the implementation that computes a kernel."""

import importlib.util
import logging
import os
from dataclasses import dataclass
from functools import cache

import torch

from speclm.errors import KernelError
from speclm.kernels.launch import HEAD_DIMS

VARIABLE = "SPECLM_KERNELS"
"""Environment variable that forces a backend if the caller names none."""

NAMES = ("triton", "sdpa", "reference")
"""Values of the variable; ``"sdpa"`` keeps models, and kernels, off Triton."""

BACKENDS = ("triton", "reference")
"""Backends of each kernel, the preferred one first."""

_TRITON_TYPES = (torch.float16, torch.bfloat16, torch.float32)
_log = logging.getLogger("speclm")


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen backend.

    Args:
        backend: One of `NAMES`.
        reason: Why it is this one, for reports.
    """

    backend: str
    reason: str


def choose(backend: str, obstacle: str | None) -> Choice:
    """Choose the backend that computes a call of a kernel.

    If the reference is chosen without having been requested, this is logged once per reason.

    Args:
        backend: A name, or ``"auto"`` for the environment's choice, or else the default.
        obstacle: Why the Triton kernel cannot compute the call; None if it can.

    Raises:
        KernelError: If the backend is unknown, or cannot compute the call.
    """
    if backend not in {"auto", *BACKENDS}:
        raise KernelError(
            f"backend is {backend!r}, expected one of {['auto', *BACKENDS]!r}; correct the name"
        )
    asked = _forced_backend() if backend == "auto" else backend
    if asked == "triton" and obstacle is not None:
        way_out = f"unset {VARIABLE}" if backend == "auto" else 'leave it out or pass "auto"'
        raise KernelError(f"backend 'triton' cannot be used: {obstacle}; {way_out}")
    if asked is not None:
        return Choice("reference" if asked == "sdpa" else asked, "asked for")
    if obstacle is None:
        return Choice("triton", "runs on this device")
    choice = Choice("reference", obstacle)
    _log_once(choice)
    return choice


def require_backend_name(backend: object) -> None:
    """Raise a `KernelError` for a backend that is not a string; `choose` checks the name."""
    if not isinstance(backend, str):
        raise KernelError(f"backend is {backend!r}, expected the name of one, or 'auto'")


def _forced_backend() -> str | None:
    """Return the name in the environment variable, or None for no choice."""
    asked = os.environ.get(VARIABLE, "auto")
    if asked == "auto":
        return None
    if asked not in NAMES:
        raise KernelError(
            f"{VARIABLE} is {asked!r}, expected one of {['auto', *NAMES]!r}; correct the name"
        )
    return asked


def triton_obstacle(device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Return why Triton kernels do not run on a device, or with a type; None if they do."""
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
    """Return why the Triton kernel does not take heads of a width; None if it does."""
    if head_dim in HEAD_DIMS:
        return None
    return f"the Triton kernel takes heads of {', '.join(map(str, HEAD_DIMS))}, not {head_dim}"


def preferred(device: torch.device) -> Choice:
    """Return the implementation of tree attention in models on a device, and why.

    On a GPU it is the Triton kernel. On a CPU it is PyTorch's attention, with a mask that is built
    once for all layers. The environment variable ``SPECLM_KERNELS`` overrides both.

    Raises:
        KernelError: If the variable names no backend.
    """
    asked = _forced_backend()
    if asked is not None:
        return Choice(asked, f"{VARIABLE} asks for it")
    if device.type == "cpu":
        return Choice("sdpa", "the model is on a CPU")
    obstacle = triton_obstacle(device)
    if obstacle is not None:
        return Choice("sdpa", obstacle)
    return Choice("triton", f"the model is on {torch.cuda.get_device_name(device)}")


def pays(device: torch.device) -> bool:
    """Return whether models on a device use speclm's kernels."""
    return preferred(device).backend != "sdpa"


def attention_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return why the preferred kernel cannot compute certain layers; None if it can."""
    if preferred(device).backend == "reference":
        return None
    return triton_obstacle(device, dtype) or head_obstacle(head_dim)


def is_recording(device: torch.device) -> bool:
    """Return whether a graph is being compiled or captured, during which no value can be read."""
    if torch.compiler.is_compiling():
        return True
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def is_interpreting() -> bool:
    """Return whether Triton's interpreter replaces a GPU."""
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
