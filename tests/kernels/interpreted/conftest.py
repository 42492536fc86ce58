"""Tests of Triton kernels in Triton's interpreter, which stands in for a GPU.

Whether a kernel is interpreted is settled when its module is imported, so that these tests need a
process of their own: ``TRITON_INTERPRET=1 pytest tests/kernels/interpreted``. Without the variable
none is collected.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True, scope="session")
def _nan_in_new_memory() -> Iterator[None]:
    """Fill outputs and workspaces with NaN, so that what is read must have been written."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *shape: object, **options: object) -> torch.Tensor:
        memory = new_empty(self, *shape, **options)
        return memory.fill_(float("nan")) if memory.is_floating_point() else memory

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", poisoned)
        yield


@pytest.fixture(autouse=True, scope="session")
def _one_patch_a_launch() -> Iterator[None]:
    """Patch Triton's language once in each launch.

    The interpreter does it again in every call that a kernel makes, which changes nothing and takes
    a quarter of the time.
    """
    from triton.runtime import interpreter  # which other runs do not need

    launch, patch_language = interpreter.GridExecutor.__call__, interpreter._patch_lang
    patched: set[int] = set()  # modules whose functions a launch has called

    def launched(executor: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        launch(executor, *args, **kwargs)

    def patch_once(function: Any) -> Any:
        module = id(function.__globals__)
        if module in patched:
            return None
        patched.add(module)
        return patch_language(function)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", launched)
        patch.setattr(interpreter, "_patch_lang", patch_once)
        yield
