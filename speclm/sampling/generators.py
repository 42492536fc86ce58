"""The state of the default random generators: whether it changed, and putting it back."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from speclm.sampling.noise import PositionNoise

_CPU = torch.device("cpu")


class GeneratorStates:
    """The default generators of some devices, as they were found.

    A device whose module cannot save the state of its generator is left out.
    """

    def __init__(self, *devices: torch.device) -> None:
        """Take note of the states of the generators of `devices`."""
        modules = {device: _module_of(device) for device in devices}
        self._modules = {device: module for device, module in modules.items() if module is not None}
        self._found = self._read()

    def changed(self) -> bool:
        """Return whether anything was drawn, or a seed set, since."""
        pairs = zip(self._read(), self._found, strict=True)
        return not all(torch.equal(now, before) for now, before in pairs)

    def restore(self) -> None:
        """Put the generators back to where they were found."""
        for (device, module), state in zip(self._modules.items(), self._found, strict=True):
            if module is torch:
                torch.set_rng_state(state)
            else:
                module.set_rng_state(state, device)

    def _read(self) -> list[Tensor]:
        return [
            torch.get_rng_state() if module is torch else module.get_rng_state(device)
            for device, module in self._modules.items()
        ]


@contextmanager
def undisturbed(device: torch.device, noise: PositionNoise | None) -> Iterator[None]:
    """Let drafting code run, and undo what it draws from the default generators.

    Args:
        device: That of the target's tokens.
        noise: What such code may draw noise of positions from, which does count.
    """
    drawn_from = None if noise is None else noise.device
    states = GeneratorStates(*({_CPU, device} - {drawn_from}))
    try:
        with nullcontext() if noise is None else noise.undisturbed():
            yield
    finally:
        if states.changed():
            states.restore()


def _module_of(device: torch.device) -> Any:
    """Return the module with the functions for a device's generator; None where there are none."""
    if device.type == "meta":
        return None
    module = torch if device.type == "cpu" else torch.get_device_module(device)
    has_state = hasattr(module, "get_rng_state") and hasattr(module, "set_rng_state")
    return module if has_state else None
