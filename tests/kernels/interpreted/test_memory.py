"""What tree attention reads and writes: only what it is told to, wherever that lies."""

from dataclasses import replace

import pytest
import torch

from speclm.kernels._triton_attention import tree_attention_triton
from tests.grids import turns
from tests.kernels.interpreted.distant import (
    FAR_AXES,
    FAR_CASE,
    no_copies_onto_itself,
    put_far,
    vast_numbers,
)
from tests.kernels.interpreted.launching import attend, plan
from tests.kernels.tree_cases import (
    LAYOUTS,
    TreeCase,
    assert_right,
    grow,
    lay_out,
)

GUARD = 64  # numbers on either side of memory that is written

BUSY = TreeCase(
    (grow("padded", 17), grow("near_chain", 17)),
    (33, 15),
    nodes=11,
    starts=(1, 15),
    gaps=(0, 3),
    kv_heads=2,
    groups=3,
    head_dim=80,
    window=17,
    sinks=1.0,
)


@pytest.mark.parametrize(("layout", "integers"), turns(LAYOUTS, [torch.int32, torch.int64]))
def test_any_layout_is_read_where_it_lies(layout, integers):
    case = replace(BUSY, layout=layout, integers=integers)
    assert_right(case, attend(case, plan(2, block_rows=64)))


@pytest.mark.parametrize("poison", [-torch.inf, 3e38])
def test_slots_that_nobody_may_see_hold_anything(poison):
    inputs, how = lay_out(BUSY), plan(2, block_rows=64)
    expected = tree_attention_triton(inputs, how)
    for memory in (inputs.key, inputs.value):
        memory.nan_to_num_(nan=poison)
    for found, right in zip(tree_attention_triton(inputs, how), expected, strict=True):
        assert torch.equal(found, right)


def test_inputs_are_left_as_they_were():
    inputs = lay_out(BUSY)
    names = [name for name in inputs.__slots__ if torch.is_tensor(getattr(inputs, name))]
    before = {name: getattr(inputs, name).clone() for name in names}
    tree_attention_triton(inputs, plan(2, block_rows=64))
    for name in names:
        torch.testing.assert_close(
            getattr(inputs, name), before[name], rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize(("num_splits", "head_dim"), turns([1, 3], [16, 80]))
def test_nothing_is_written_beside_results_and_workspace(num_splits, head_dim, monkeypatch):
    guarded = []

    def new_empty(self, *shape, dtype=None):
        shape = torch.Size(shape[0] if len(shape) == 1 else shape)
        memory = torch.full((shape.numel() + 2 * GUARD,), torch.nan, dtype=dtype or self.dtype)
        guarded.append(memory)
        return memory[GUARD:-GUARD].view(shape)

    case = replace(BUSY, head_dim=head_dim)
    inputs = lay_out(case)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", new_empty_but_for_triton(new_empty))
        found = tree_attention_triton(inputs, plan(num_splits))
    assert_right(case, found)
    assert len(guarded) == (2 if num_splits == 1 else 4)
    for memory in guarded:
        assert memory[:GUARD].isnan().all()
        assert memory[-GUARD:].isnan().all()


def new_empty_but_for_triton(replacement):
    """Triton's interpreter makes empty tensors of no elements for itself, on a named device."""
    original = torch.Tensor.new_empty

    def new_empty(self, *shape, **options):
        if "device" in options:
            return original(self, *shape, **options)
        return replacement(self, *shape, **options)

    return new_empty


def test_splits_without_a_tile_write_no_part(monkeypatch):
    made = []
    original = torch.Tensor.new_empty

    def new_empty(self, *shape, **options):
        made.append(original(self, *shape, **options))
        return made[-1]

    case = replace(BUSY, parents=((0,),), nodes=None, lengths=(0, 16), starts=None, window=None)
    inputs = lay_out(case)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", new_empty_but_for_triton(new_empty))
        found = tree_attention_triton(inputs, plan(5))
    assert_right(case, found)
    (parts,) = (memory for memory in made if memory.ndim == 4 and memory.shape[1] == 5)
    is_written = (~parts.isnan()).all(dim=(2, 3)).view(2, case.kv_heads, 5)  # NaN to begin with
    assert is_written[0].sum(1).tolist() == [1, 1]
    assert is_written[1].sum(1).tolist() == [2, 2]


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    return vast_numbers(tmp_path_factory.mktemp("vast"))


@pytest.mark.parametrize(("name", "axis"), FAR_AXES)
def test_offsets_pass_the_range_of_int32(name, axis, numbers):
    inputs = put_far(lay_out(FAR_CASE), name, axis, numbers)
    with no_copies_onto_itself():
        found = tree_attention_triton(inputs, plan(2))
    assert_right(FAR_CASE, found)
