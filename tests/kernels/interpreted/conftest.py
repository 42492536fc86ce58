"""Tests of Triton kernels in Triton's interpreter, which stands in for a GPU.

Whether a kernel is interpreted is settled when its module is imported, so that these tests need a
process of their own: ``TRITON_INTERPRET=1 pytest tests/kernels/interpreted``. Without the variable
none is collected.
"""

import os
from collections.abc import Iterator

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
