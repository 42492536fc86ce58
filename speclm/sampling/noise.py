"""The random draws of regular generation, in its order, and the state of default generators."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor


class PositionNoise:
    """The noise that decides each sampled position, as regular generation draws it.

    At every step, regular generation draws one ``[batch, vocab]`` matrix E of exponential noise
    from the default generator of the logits' device and takes ``argmax(probs / E)``: this is what
    ``torch.multinomial(probs, 1)`` does. Drawing the same matrices in the same order makes the
    token at a position a function of the target's probabilities, whatever the round or the draft.

    Rows may be at different steps, which `seek` sets. Matrices drawn ahead are kept for later
    rounds, and `finish` leaves the generator as regular generation does. The noise is float32, the
    dtype of scores that no logits processor changes, until `match` is given other scores.

    Example:
        ```python
        noise = PositionNoise(batch=1, vocab_size=vocab_size, device=logits.device)
        noise.seek([0], live=[True])
        token = (logits.softmax(-1) / noise.at_depth(0)).argmax(-1)
        noise.finish(1)  # as after torch.multinomial(logits.softmax(-1), 1)
        ```
    """

    def __init__(self, *, batch: int, vocab_size: int, device: torch.device) -> None:
        """Start before step 0.

        Args:
            batch: Rows of the batch, ended ones included.
            vocab_size: Width of the target's logits.
            device: Device whose default generator regular generation would use.
        """
        self._shape = (batch, vocab_size)
        self._dtype = torch.float32
        self._device = device
        self._matrices: dict[int, Float[Tensor, "batch vocab"]] = {}
        self._states: list[Tensor] = []  # generator state before each draw
        self._steps = [0] * batch
        self._undisturbed: Tensor | None = None  # generator state while other draws are undone

    @property
    def device(self) -> torch.device:
        """Device of the noise."""
        return self._device

    def seek(self, steps: list[int], *, live: list[bool]) -> None:
        """Set the step that each row decides next, and drop noise that no live row needs again."""
        self._steps = steps
        running = [step for step, is_live in zip(steps, live, strict=True) if is_live]
        oldest = min(running, default=0)
        for step in [step for step in self._matrices if step < oldest]:
            del self._matrices[step]

    def at_depth(self, depth: int) -> Float[Tensor, "batch vocab"]:
        """Return the noise that decides the token after a node of `depth`, for every row."""
        first = self._steps[0]
        if all(step == first for step in self._steps):
            return self._matrix(first + depth)
        rows = [self._row(step + depth, row) for row, step in enumerate(self._steps)]
        return torch.stack(rows)

    def row(self, row: int, depth: int) -> Float[Tensor, " vocab"]:
        """Return the noise that decides the token after a node of `depth` in one row."""
        return self._row(self._steps[row] + depth, row)

    def match(self, scores: Float[Tensor, "batch vocab"], step: int) -> None:
        """Draw the noise from `step` on in the dtype and width of `scores`.

        A logits processor may change both at every step. Noise that was drawn ahead in another
        dtype or width is drawn again. No live row may be before `step`.
        """
        if scores.dtype == self._dtype and scores.shape == self._shape:
            return
        self._dtype, self._shape = scores.dtype, (scores.shape[0], scores.shape[1])
        self._matrices.clear()
        self._rewind(step)

    @contextmanager
    def foreign_code(self, step: int) -> Iterator[None]:
        """Let code run that may draw from the generator, just before the draw of `step`.

        It finds the generator in the state of regular generation at that step. If it draws, noise
        that was drawn ahead from that step on is discarded.
        """
        if step >= len(self._states):  # nothing was drawn ahead
            yield
            return
        latest, here = get_generator_state(self._device), self._states[step]
        set_generator_state(here, self._device)
        try:
            yield
        finally:
            if torch.equal(get_generator_state(self._device), here):
                set_generator_state(latest, self._device)
            else:
                for drawn in range(step, len(self._states)):
                    self._matrices.pop(drawn, None)
                del self._states[step:]

    def has_drawn(self, step: int) -> bool:
        """Return whether the noise of a step is drawn."""
        return step < len(self._states)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Let code run whose own draws from the generator are undone."""
        self._undisturbed = get_generator_state(self._device)
        try:
            yield
        finally:
            if not torch.equal(get_generator_state(self._device), self._undisturbed):
                set_generator_state(self._undisturbed, self._device)
            self._undisturbed = None

    def finish(self, num_steps: int) -> None:
        """Set the generator to its state in regular generation after `num_steps` draws."""
        self._rewind(num_steps)
        self._matrices.clear()

    def _rewind(self, step: int) -> None:
        if step < len(self._states):
            set_generator_state(self._states[step], self._device)
            del self._states[step:]

    def _row(self, step: int, row: int) -> Float[Tensor, " vocab"]:
        # The noise of an ended row may have been dropped; nobody reads it.
        matrix = self._matrices.get(step)
        if matrix is None and step < len(self._states):
            return torch.ones(self._shape[1], dtype=self._dtype, device=self._device)
        return self._matrix(step)[row]

    def _matrix(self, step: int) -> Float[Tensor, "batch vocab"]:
        if len(self._states) > step:
            return self._matrices[step]
        if self._undisturbed is not None:
            set_generator_state(self._undisturbed, self._device)
        while len(self._states) <= step:
            self._states.append(get_generator_state(self._device))
            drawn = torch.empty(self._shape, dtype=self._dtype, device=self._device)
            self._matrices[len(self._states) - 1] = drawn.exponential_(1.0)
        if self._undisturbed is not None:
            self._undisturbed = get_generator_state(self._device)
        return self._matrices[step]


@contextmanager
def as_if_drawn(noise: PositionNoise | None, step: int) -> Iterator[None]:
    """Let code run within `PositionNoise.foreign_code`, if there is noise."""
    if noise is None:
        yield
        return
    with noise.foreign_code(step):
        yield


@contextmanager
def undisturbed(device: torch.device, noise: PositionNoise | None) -> Iterator[None]:
    """Let drafting code run, and undo its draws from the default generators.

    Args:
        device: Device of the target's tokens.
        noise: Noise of the positions, which such code may draw; these draws are kept.
    """
    drawn_from = None if noise is None else noise.device
    states = GeneratorStates(*({torch.device("cpu"), device} - {drawn_from}))
    try:
        with nullcontext() if noise is None else noise.undisturbed():
            yield
    finally:
        if states.changed():
            states.restore()


class GeneratorStates:
    """The states of the default generators of some devices.

    Devices with a `generator_obstacle` are skipped.
    """

    def __init__(self, *devices: torch.device) -> None:
        """Remember the states of the generators of `devices`."""
        self._found = {
            device: get_generator_state(device)
            for device in devices
            if generator_obstacle(device) is None
        }

    def changed(self) -> bool:
        """Return whether a generator has drawn or was seeded since."""
        return not all(
            torch.equal(get_generator_state(device), state) for device, state in self._found.items()
        )

    def restore(self) -> None:
        """Set the generators to the remembered states."""
        for device, state in self._found.items():
            set_generator_state(state, device)


def generator_obstacle(device: torch.device) -> str | None:
    """Return why the state of a device's default generator cannot be restored; None if it can."""
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
