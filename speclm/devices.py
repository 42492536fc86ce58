"""The one choice between work that Python guides value by value and work that stays on a device."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_stays_on_device: ContextVar[bool] = ContextVar("stays_on_device", default=False)


def is_host(device: torch.device) -> bool:
    """Return whether Python reads a device's values at no cost.

    On a CPU it does, and computes only what the values read so far make necessary. Elsewhere
    reading waits for the device, and more is computed instead.
    """
    return device.type == "cpu" and not _stays_on_device.get()


@contextmanager
def device_path() -> Iterator[None]:
    """Run on a CPU what an accelerator would run, for counting and tests."""
    token = _stays_on_device.set(True)
    try:
        yield
    finally:
        _stays_on_device.reset(token)
