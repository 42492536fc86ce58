"""Stages that TorchInductor compiles."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from speclm.engines.engine import Engine, Outputs, Prepared, Stage

_MAX_SHAPES = 256  # PyTorch's default of 8 is for shapes that vary by mistake


class CompileEngine(Engine):
    """Compiles each stage, without graph breaks, for every shape of its inputs.

    Compiling takes seconds to minutes. PyTorch keeps results on disk, for later processes.
    """

    name: ClassVar[str] = "compile"
    reuses_storage: ClassVar[bool] = False

    @override
    def obstacle(self, device: torch.device) -> str | None:
        return None

    @override
    def prepare(
        self, stage: Stage, inputs: Sequence[Tensor], storage: Sequence[Tensor]
    ) -> Prepared:
        compiled = torch.compile(stage, fullgraph=True, dynamic=False)
        is_compiled = False

        def run(inputs: Sequence[Tensor], storage: Sequence[Tensor]) -> Outputs:
            nonlocal is_compiled
            if is_compiled:  # setting options takes longer than some stages
                return compiled(*inputs, *storage)
            with torch._dynamo.config.patch(
                recompile_limit=_MAX_SHAPES, accumulated_recompile_limit=16 * _MAX_SHAPES
            ):
                outputs = compiled(*inputs, *storage)
            is_compiled = True
            return outputs

        return run
