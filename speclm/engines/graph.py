"""Stages recorded as graphs, which start all their kernels at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from speclm.engines.engine import Engine, Outputs, Prepared, Stage

_WARM_UPS = 2  # the first runs choose kernels and allocate workspaces


@dataclass(frozen=True, slots=True)
class Captured:
    """A recorded computation.

    Args:
        replay: Computes again, from the same tensors into the same outputs.
        outputs: The outputs.
    """

    replay: Callable[[], object]
    outputs: Outputs


Capture = Callable[[Callable[[], Outputs], torch.device], Captured]
"""Records a computation on a device."""


class CudaGraphs:
    """Records computations as CUDA graphs that share their memory.

    So only the outputs of the last replay are valid.
    """

    def __init__(self) -> None:
        """Start without memory."""
        self._pool: Any = None  # a handle

    def __call__(self, compute: Callable[[], Outputs], device: torch.device) -> Captured:
        """Run a computation a few times, then record it."""
        with torch.cuda.device(device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    compute()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile.
            mode = "thread_local"
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode=mode):
                outputs = compute()

        def replay() -> None:
            with torch.cuda.device(device):
                graph.replay()

        return Captured(replay, outputs)


class GraphEngine(Engine):
    """Records each stage as a graph, for every shape of its inputs and every storage."""

    name: ClassVar[str] = "graph"
    reuses_storage: ClassVar[bool] = True
    records_calls: ClassVar[bool] = True

    def __init__(self, capture: Capture | None = None) -> None:
        """Start with nothing recorded.

        Args:
            capture: Records a computation; by default as a CUDA graph.
        """
        super().__init__()
        self._capture: Capture = CudaGraphs() if capture is None else capture

    @override
    def obstacle(self, device: torch.device) -> str | None:
        if device.type != "cuda" and isinstance(self._capture, CudaGraphs):
            return f"graphs need a CUDA device, the model is on {device}"
        return None

    @override
    def prepare(
        self, stage: Stage, inputs: Sequence[Tensor], storage: Sequence[Tensor]
    ) -> Prepared:
        # Tensors made in inference mode could not be written to outside of it.
        with torch.inference_mode(mode=False), torch.no_grad():
            fixed = [tensor.clone() for tensor in inputs]
            captured = self._capture(lambda: stage(*fixed, *storage), fixed[0].device)

        def run(inputs: Sequence[Tensor], storage: Sequence[Tensor]) -> Outputs:  # noqa: ARG001
            for tensor, value in zip(fixed, inputs, strict=True):
                tensor.copy_(value)
            captured.replay()
            return tuple(output.clone() for output in captured.outputs)

        return run
