"""Runs the stages of one part of a round by an engine, as long as it can."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from speclm.engines.engine import Engine, Outputs, Stage
from speclm.errors import EngineError

_MAX_STORAGE = 8  # different batch sizes and capacities
_TOLERANCE = 1e-2
"""Maximum difference between two computations of the same, relative to the largest output: both
round differently, and a wrong mask or position changes more in random models already."""

_log = logging.getLogger("speclm")


class StageRunner:
    """Runs stages by an engine and holds their storage; it stops with the first failure.

    Attributes:
        engine: The engine.
        obstacle: Why it runs no stage; None if it does.
    """

    def __init__(self, engine: Engine, *, obstacle: str | None = None) -> None:
        """Prepare nothing yet."""
        self.engine, self.obstacle = engine, obstacle
        self._stages: list[Stage] = []
        self._storage: dict[object, Tensor] = {}

    def run(
        self,
        stage: Stage,
        inputs: Sequence[Tensor],
        storage: Sequence[Tensor],
        *,
        is_repeatable: bool = True,
    ) -> Outputs | None:
        """Run a stage, see `Engine.run`.

        Returns:
            The outputs; None if the engine cannot run it, for which `obstacle` is the reason then.
        """
        if self.obstacle is not None:
            return None
        if all(known is not stage for known in self._stages):
            self._stages.append(stage)
        try:
            return self.engine.run(stage, inputs, storage, is_repeatable=is_repeatable)
        except EngineError as error:
            self.give_up(str(error))
            return None

    def give_up(self, reason: str) -> None:
        """Run no more stages; the reason is logged."""
        self.obstacle = reason
        _log.warning("engine %r is not used: %s", self.engine.name, reason)

    def allocate(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return zeros as storage of a cache, because all of it is read, with weight zero.

        If the engine needs the same storage in every call, that of an earlier one is taken again.
        """
        if not self.engine.reuses_storage:
            return like.new_zeros(shape)
        key = shape, like.shape[-1], like.dtype, like.device
        if key not in self._storage:
            if len(self._storage) == _MAX_STORAGE:
                self.close()
            with torch.inference_mode(mode=False):  # or it could not be written outside of one
                self._storage[key] = like.new_empty(shape)
        return self._storage[key].zero_()

    def forget(self, stage: Stage) -> None:
        """Drop what the engine has prepared for a stage."""
        self._stages = [known for known in self._stages if known is not stage]
        self.engine.forget(stage)

    def close(self) -> None:
        """Drop all storage, and what the engine has prepared for it."""
        self._storage.clear()
        for stage in self._stages:
            self.engine.forget(stage)


def agree(found: Tensor, expected: Tensor) -> bool:
    """Return whether outputs of a stage are equal to what they should be within rounding; syncs."""
    difference = (found.float() - expected.float()).abs().amax()
    return bool(difference <= _TOLERANCE * expected.float().abs().amax())  # false for NaN
