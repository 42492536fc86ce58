"""Tensors whose numbers lie farther apart than int32 counts, and take up no memory between."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from speclm.kernels.inputs import TreeAttentionInputs
from tests.kernels.tree_cases import TreeCase

INT32_RANGE = 2**31
LAST_TILE = 32  # its first slot is out of range by itself

FAR_AXES = [(name, axis) for name in ("query", "key", "value") for axis in range(3)]
"""Tensor and axis: those along which a cache or a batch can be large."""

FAR_CASE = TreeCase(((0, 0, 1),), (LAST_TILE + 17, 3, 5), kv_heads=3, dtype=torch.float16, spare=0)
"""A case with three of everything, and with tiles of 16 keys that need no mask."""


def vast_numbers(folder: Path) -> Tensor:
    """More float16 numbers than int32 counts: a file with holes, held only where it is touched."""
    path = folder / "numbers"
    size = 2 * INT32_RANGE
    numbers = torch.from_file(str(path), shared=True, size=size, dtype=torch.float16)
    path.unlink()  # which leaves the memory as it is
    return numbers


def put_far(
    inputs: TreeAttentionInputs, name: str, axis: int, numbers: Tensor
) -> TreeAttentionInputs:
    """Spread a tensor over vast memory along one axis, with a stride that is an int32."""
    near = getattr(inputs, name)
    last = near.shape[axis] - 1
    reached = min(last, LAST_TILE)
    strides = list(near.contiguous().stride())
    strides[axis] = INT32_RANGE // reached + near[0].numel()
    assert strides[axis] < INT32_RANGE <= strides[axis] * reached
    far = numbers.as_strided((*near.shape[:axis], last + 1, *near.shape[axis + 1 :]), strides)
    far.copy_(near.narrow(axis, 0, last + 1))
    return replace(inputs, **{name: far})


@contextmanager
def no_copies_onto_itself() -> Iterator[None]:
    """Keep Triton's interpreter from copying a storage, all of it, to where it is already."""
    original = torch.UntypedStorage.copy_

    def copy_(self: torch.UntypedStorage, source: torch.UntypedStorage, *rest: object):
        return self if self.data_ptr() == source.data_ptr() else original(self, source, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.UntypedStorage, "copy_", copy_)
        yield
