"""The one choice between work that Python guides value by value and work that stays on a device."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor

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


def upload(values: Sequence[Any], device: torch.device) -> Tensor:
    """Return integers of the host on a device, which the host does not wait for.

    Args:
        values: Numbers, or lists of equal length of them, at any depth.
        device: Where the tensor is put.
    """
    tensor = torch.from_numpy(np.array(values, dtype=np.int64))
    if device.type == "cpu":
        return tensor
    if device.type == "cuda":  # only from pinned memory does a copy run next to the host's work
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
