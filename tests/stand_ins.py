"""Stands in for CUDA graphs: runs the tensor calls that were recorded, on the same tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from speclm.engines import Captured, GraphEngine


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
