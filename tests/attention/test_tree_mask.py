"""A mask that nothing looks into is never computed, and any other is what it stands for."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

from speclm.attention import TreeMask

DENSE = torch.tensor([[[[0.0, -1.0, -1.0], [0.0, 0.0, -1.0]]]])


class Counted:
    """A mask and how often it was computed."""

    def __init__(self, device: str = "cpu") -> None:
        self.calls = 0
        self.mask = TreeMask.of(
            self._compute,
            7,
            shape=tuple(DENSE.shape),
            dtype=DENSE.dtype,
            device=torch.device(device),
        )

    def _compute(self) -> Tensor:
        self.calls += 1
        return DENSE


def test_shape_type_and_device_are_known_without_the_numbers():
    counted = Counted()
    mask = counted.mask
    assert isinstance(mask, Tensor)
    assert (mask.shape, mask.ndim, mask.dtype) == (DENSE.shape, 4, torch.float32)
    assert mask.device == torch.device("cpu")
    assert mask.is_floating_point()
    assert not mask.requires_grad
    assert mask.to(torch.float32) is mask
    assert mask.to("cpu") is mask
    assert counted.calls == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda mask: mask + 1,
        lambda mask: mask[:, :, :1],
        lambda mask: mask[:, :, :, :2],
        lambda mask: mask.to(torch.bfloat16),
        lambda mask: mask.bool(),
        lambda mask: torch.where(mask < 0, mask, 5.0),
        lambda mask: torch.cat([mask, mask], dim=1),
        lambda mask: mask.expand(3, -1, -1, -1),
        lambda mask: mask.repeat_interleave(2, dim=1),
        Tensor.clone,
        lambda mask: mask.contiguous().view(2, 3),
        torch.ones_like,
    ],
)
def test_whatever_is_done_to_it_is_done_to_the_mask(change):
    changed = change(Counted().mask)
    assert not isinstance(changed, TreeMask)
    assert torch.equal(changed, change(DENSE.clone()))


def test_moves_to_another_device_do_not_compute_it():
    counted = Counted()
    moved = counted.mask.to("meta")
    assert isinstance(moved, TreeMask)
    assert moved.device.type == "meta"
    assert moved.window == 7
    assert counted.calls == 0
    assert moved.dense().device.type == "meta"


@pytest.mark.parametrize(
    "write",
    [
        lambda mask: mask.add_(1.0),
        lambda mask: mask.masked_fill_(mask < 0, -2.0),
        lambda mask: mask[..., 0].fill_(-5.0),
        lambda mask: mask.__setitem__((slice(None), 0, 0), -5.0),
    ],
)
def test_what_is_written_into_it_counts_from_then_on(write):
    own, expected = DENSE.clone(), DENSE.clone()
    mask = TreeMask.of(
        lambda: own, None, shape=tuple(own.shape), dtype=own.dtype, device=own.device
    )
    moved = mask.to("meta")
    assert not mask.is_touched
    write(mask)
    write(expected)
    assert mask.is_touched
    assert moved.is_touched
    assert torch.equal(mask.dense(), expected)


def test_copies_are_ordinary_tensors():
    for other in (copy.deepcopy, lambda mask: pickle.loads(pickle.dumps(mask))):
        found = other(Counted().mask)
        assert not isinstance(found, TreeMask)
        assert torch.equal(found, DENSE)


def test_copies_and_comparisons_are_those_of_the_mask():
    mask = Counted().mask
    assert torch.equal(copy.deepcopy(mask.dense()), DENSE)
    assert bool((mask == DENSE).all())
