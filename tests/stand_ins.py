"""Engines for tests: one of graphs that needs no GPU, and some that check or fail."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from speclm.engines import Captured, Engine, GraphEngine
from tests.tracing import untraced

READING = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2"}


class Recording(TorchDispatchMode):
    """Keeps every tensor call with the tensors that it read and made."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, result))
        return result

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def replay(self) -> None:
        """Run the calls again, into the tensors that they made."""
        for func, args, kwargs, result in self._calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def record(compute: Callable[[], tuple[Tensor, ...]], device: torch.device) -> Captured:
    """Record a computation call by call; a replay sees only what a graph would see."""
    recording = Recording()
    with recording:
        outputs = compute()
    return Captured(recording.replay, outputs)


def replaying() -> GraphEngine:
    """Return an engine of graphs that needs no GPU."""
    return GraphEngine(record)


class FullGraph(Engine):
    """Traces stages as a compiler does, without breaks, and runs what was traced eagerly.

    Stages of other classes than `kind` run as they are.
    """

    name = "traced"
    reuses_storage = False

    def __init__(self, kind: Any = object) -> None:
        super().__init__()
        self.kind = kind

    def obstacle(self, device: torch.device) -> None:
        return None

    def prepare(self, stage: Any, inputs: Any, storage: Any) -> Any:
        if not isinstance(stage, self.kind):
            return lambda inputs, storage: stage(*inputs, *storage)
        torch._dynamo.reset()
        traced = torch.compile(stage, fullgraph=True, dynamic=False, backend="eager")

        def run(inputs: Any, storage: Any) -> Any:
            with untraced():  # coverage would be measured of the compiler
                return traced(*inputs, *storage)

        return run


@contextmanager
def unread() -> Iterator[None]:
    """Fail where the host reads a value."""

    class Unread(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func._schema.name.removeprefix("aten::")
            assert name not in READING, f"the host reads by {name}"
            return func(*args, **(kwargs or {}))

    with Unread():
        yield


class Unreading(Engine):
    """Fails where the host reads a value inside a stage, or inside those of one class."""

    name = "unreading"
    reuses_storage = False

    def __init__(self, kind: type = object) -> None:
        super().__init__()
        self.kind = kind

    def obstacle(self, device):
        return None

    def prepare(self, stage, inputs, storage):
        def run(inputs, storage):
            with unread() if isinstance(stage, self.kind) else nullcontext():
                return stage(*inputs, *storage)

        return run


class Failing(Engine):
    """Prepares nothing."""

    name = "failing"
    reuses_storage = False

    def obstacle(self, device):
        return None

    def prepare(self, stage, inputs, storage):
        raise torch.OutOfMemoryError("no memory")
