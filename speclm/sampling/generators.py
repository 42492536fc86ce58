"""The state of the default random generators: whether it changed, and putting it back."""

import torch
from torch import Tensor


class GeneratorStates:
    """The default generators of some devices, as they were found.

    A device with a `generator_obstacle` is left out.
    """

    def __init__(self, *devices: torch.device) -> None:
        """Take note of the states of the generators of `devices`."""
        self._found = {
            device: get_generator_state(device)
            for device in devices
            if generator_obstacle(device) is None
        }

    def changed(self) -> bool:
        """Return whether anything was drawn, or a seed set, since."""
        return not all(
            torch.equal(get_generator_state(device), state) for device, state in self._found.items()
        )

    def restore(self) -> None:
        """Put the generators back to where they were found."""
        for device, state in self._found.items():
            set_generator_state(state, device)


def generator_obstacle(device: torch.device) -> str | None:
    """Return why the default generator of a device cannot be put back; None where it can."""
    if device.type == "cpu":
        return None
    try:
        module = torch.get_device_module(device)
    except RuntimeError:
        module = None
    if hasattr(module, "get_rng_state") and hasattr(module, "set_rng_state"):
        return None
    return f"the state of the random generator of device {device.type!r} cannot be saved"


def get_generator_state(device: torch.device) -> Tensor:
    """Return the state of the default generator of a device without a `generator_obstacle`."""
    if device.type == "cpu":
        return torch.get_rng_state()
    state: Tensor = torch.get_device_module(device).get_rng_state(device)
    return state


def set_generator_state(state: Tensor, device: torch.device) -> None:
    """Set the state of the default generator of a device without a `generator_obstacle`."""
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)
