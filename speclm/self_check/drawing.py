"""Finds the module whose forward draws random numbers."""

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from speclm.sampling.noise import GeneratorStates
from speclm.target import TargetView


def first_draw(target: TargetView, run: Callable[[TargetView], object]) -> str | None:
    """Return what draws first from a default random generator while `run` runs, in words.

    Args:
        target: A model.
        run: Runs forwards of it.

    Returns:
        A module of the model or the model itself; None if nothing is drawn in this thread.
    """
    found = _FirstDraw(target.device)
    with found, suppress(Exception):  # of foreign model code
        run(target)
    if found.draws:
        for name, module in target.model.named_modules():
            if module is found.module and name:
                return f"module {name!r}"
        return "the model"
    return None


class _FirstDraw(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Takes note of the module that is running when this thread first draws random numbers."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.draws = False
        self.module: nn.Module | None = None
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.draws or torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        # Attention has the tag, and draws only where it has dropout.
        before = GeneratorStates(torch.device("cpu"), self._device)
        result = func(*args, **(kwargs or {}))
        if before.changed():
            self.draws, self.module = True, _running_module()
        return result


def _running_module() -> nn.Module | None:
    """Return the innermost module that has a method on the stack."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            return module
    return None
