"""Tensors whose numbers lie farther apart than int32 counts, and take up no memory between."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from speclm.kernels.inputs import TreeAttentionInputs
from tests.kernels.tree_cases import NO_PAGE, TreeCase

INT32_RANGE = 2**31
LAST_TILE = 32  # its first slot is out of range by itself

FAR_AXES = [
    *((0, name, axis) for name in ("query", "key", "value") for axis in range(3)),
    *((4, name, axis) for name in ("key", "value") for axis in (0, 2)),
]
"""Length of a page, tensor and axis: those along which a cache or a batch can be large."""


def far_case(page_len: int) -> TreeCase:
    """A case with three of everything, and with tiles of 16 keys that need no mask."""
    lengths = (LAST_TILE + 17, 3, 5)
    return TreeCase(
        ((0, 0, 1),), lengths, kv_heads=3, dtype=torch.float16, page_len=page_len, spare=0
    )


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
    if inputs.block_table is not None and axis == 0:
        reached = last = int(inputs.block_table[inputs.block_table < NO_PAGE].max())  # in use
    strides = list(near.contiguous().stride())
    strides[axis] = INT32_RANGE // reached + near[0].numel()
    assert strides[axis] < INT32_RANGE <= strides[axis] * reached
    far = numbers.as_strided((*near.shape[:axis], last + 1, *near.shape[axis + 1 :]), strides)
    far.copy_(near.narrow(axis, 0, last + 1))
    others = {}
    if inputs.block_table is not None and axis == 0:  # keys and values have as many pages
        others = {other: getattr(inputs, other)[: last + 1] for other in ("key", "value")}
    return replace(inputs, **others | {name: far})


@contextmanager
def no_copies_onto_itself() -> Iterator[None]:
    """Keep Triton's interpreter from copying a storage, all of it, to where it is already."""
    original = torch.UntypedStorage.copy_

    def copy_(self: torch.UntypedStorage, source: torch.UntypedStorage, *rest: object):
        return self if self.data_ptr() == source.data_ptr() else original(self, source, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.UntypedStorage, "copy_", copy_)
        yield
