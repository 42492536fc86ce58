"""What an engine is: it runs the stages of a round, whose shapes repeat."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, ClassVar

import torch
from torch import Tensor

from speclm.errors import EngineError

_MESSAGE = 300  # characters of another library's error
Outputs = tuple[Tensor, ...]
Stage = Callable[..., Outputs]
"""Computes tensors from tensors, given by position: inputs, then storage, which it may change in
place. It reads nothing on the host."""
_Key = tuple[Stage, tuple[object, ...], tuple[int, ...]]
"""A stage, shapes of inputs and of a part of the storage, and its addresses if they matter."""
Prepared = Callable[[Sequence[Tensor], Sequence[Tensor]], Outputs]
"""A stage for some shapes, as a function of inputs and storage."""


class Engine(ABC):
    """Runs stages faster, once it has prepared them for the shapes of their inputs."""

    name: ClassVar[str]
    reuses_storage: ClassVar[bool]
    """Whether a stage that was prepared only works on the same storage."""
    records_calls: ClassVar[bool] = False
    """Whether it records the tensor calls that a stage makes, whatever its code is."""

    def __init__(self) -> None:
        """Start with nothing prepared."""
        self.build_seconds = 0.0
        """Time that preparing took so far."""
        self._prepared: dict[_Key, Prepared] = {}

    @abstractmethod
    def obstacle(self, device: torch.device) -> str | None:
        """Return why no stage can run on a device; None if stages can."""

    @abstractmethod
    def prepare(
        self, stage: Stage, inputs: Sequence[Tensor], storage: Sequence[Tensor]
    ) -> Prepared:
        """Prepare a stage for inputs and storage like these; it may run with them."""

    def run(
        self,
        stage: Stage,
        inputs: Sequence[Tensor],
        storage: Sequence[Tensor],
        *,
        is_repeatable: bool = True,
    ) -> Outputs:
        """Run a stage, and prepare it first if it is new for these shapes.

        Args:
            stage: The stage.
            inputs: Its inputs.
            storage: What it reads and writes.
            is_repeatable: Whether running it again changes nothing. Otherwise the storage is put
                back after it was prepared, also if that fails; for this there must be memory.

        Returns:
            The outputs, which later runs do not change.

        Raises:
            EngineError: If the stage cannot be prepared or run. It may have changed the storage.
        """
        key = self._key(stage, inputs, storage)
        try:
            prepared = self._prepared.get(key)
            return (
                self._run_first(key, stage, inputs, storage, is_repeatable=is_repeatable)
                if prepared is None
                else prepared(inputs, storage)
            )
        except Exception as error:  # compilers raise errors of many kinds
            sizes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs)
            message = " ".join(str(error).split())[:_MESSAGE]
            raise EngineError(
                f"engine {self.name!r} cannot run a stage with inputs of {sizes}: "
                f"{type(error).__name__}, {message}; decode with engine='eager'"
            ) from error

    def forget(self, stage: Stage) -> None:
        """Drop what was prepared for a stage."""
        for key in [key for key in self._prepared if key[0] is stage]:
            del self._prepared[key]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_prepared": {}}  # a copy prepares for its own model

    def _run_first(
        self,
        key: _Key,
        stage: Stage,
        inputs: Sequence[Tensor],
        storage: Sequence[Tensor],
        *,
        is_repeatable: bool,
    ) -> Outputs:
        start = perf_counter()
        saved = [] if is_repeatable else [part.clone() for part in storage]
        try:
            prepared = self.prepare(stage, inputs, storage)
            _put_back(storage, saved)
            outputs = prepared(inputs, storage)
        except Exception:
            _put_back(storage, saved)  # the caller computes the same in another way
            raise
        finally:
            self.build_seconds += perf_counter() - start
        self._prepared[key] = prepared
        return outputs

    def _key(self, stage: Stage, inputs: Sequence[Tensor], storage: Sequence[Tensor]) -> _Key:
        # Every round asks, so only one part of the storage: the others follow from stage and part.
        shapes = [(tensor.shape, tensor.dtype, tensor.device) for tensor in (*inputs, *storage[:1])]
        addresses = map(Tensor.data_ptr, storage) if self.reuses_storage else ()
        return stage, tuple(shapes), tuple(addresses)


def _put_back(storage: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
    for part, before in zip(storage, saved, strict=False):  # nothing may have been saved
        part.copy_(before)
