"""What tree attention reads and writes: only what it is told to, wherever that lies."""

from dataclasses import replace

import pytest
import torch

from speclm.kernels._triton_attention import tree_attention_triton
from tests.kernels.interpreted.launching import attend, plan
from tests.kernels.tree_cases import (
    LAYOUTS,
    PAGE_LENS,
    TreeCase,
    assert_right,
    draw_contents,
    grow,
    lay_out,
)

INT32_RANGE = 2**31
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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page_len", [0, *PAGE_LENS])
def test_any_layout_is_read_where_it_lies(layout, page_len):
    integers = torch.int64 if page_len == 16 else torch.int32
    case = replace(BUSY, layout=layout, page_len=page_len, integers=integers)
    assert_right(case, attend(case, plan(2, block_rows=64)))


@pytest.mark.parametrize("poison", [torch.inf, -torch.inf, 3e38])
def test_slots_that_nobody_may_see_hold_anything(poison):
    for page_len in (0, 16):
        inputs = lay_out(replace(BUSY, page_len=page_len))
        how = plan(2, block_rows=64)
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


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("head_dim", [16, 80])
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


def test_rows_share_pages_that_no_tree_is_written_to():
    case = TreeCase((grow("uniform", 5),), (35, 37), page_len=16, groups=2)
    contents = draw_contents(case)
    for prefix in (contents.prefix_key, contents.prefix_value):
        prefix[1, :, :32] = prefix[0, :, :32]
    inputs = lay_out(case, contents)
    own_pages = inputs.block_table[1, :2].long()
    inputs.key[own_pages] = inputs.value[own_pages] = torch.nan
    inputs.block_table[1, :2] = inputs.block_table[0, :2]
    assert_right(case, tree_attention_triton(inputs, plan(2)), contents)


@pytest.fixture(scope="module")
def vast(tmp_path_factory):
    """More numbers than int32 counts: a file with holes, which is held only where it is touched."""
    path = tmp_path_factory.mktemp("vast") / "numbers"
    size = INT32_RANGE + INT32_RANGE // 4
    numbers = torch.from_file(str(path), shared=True, size=size, dtype=torch.float16)
    path.unlink()  # which leaves the memory as it is
    return numbers


@pytest.fixture
def _no_copy_onto_itself(monkeypatch):
    """Keep the interpreter from copying storage back to where it is, all of it."""
    original = torch.UntypedStorage.copy_

    def copy_(self, source, *rest):
        return self if self.data_ptr() == source.data_ptr() else original(self, source, *rest)

    monkeypatch.setattr(torch.UntypedStorage, "copy_", copy_)


FAR_AXES = [
    *((0, name, axis) for name in ("query", "key", "value") for axis in range(3)),
    *((4, name, axis) for name in ("key", "value") for axis in (0, 2)),
]


@pytest.mark.usefixtures("_no_copy_onto_itself")
@pytest.mark.parametrize(("page_len", "name", "axis"), FAR_AXES)
def test_offsets_pass_the_range_of_int32(page_len, name, axis, vast):
    case = TreeCase(
        ((0, 0, 1),), (14, 3, 5), kv_heads=3, dtype=torch.float16, page_len=page_len, spare=0
    )
    contents = draw_contents(case)
    inputs = lay_out(case, contents)
    near = getattr(inputs, name)
    assert near.shape[axis] > 2
    assert not page_len or len(inputs.key) - 1 in inputs.block_table
    strides = list(near.contiguous().stride())
    # Each factor is an int32, the product with the last index is none; other strides stay small.
    strides[axis] = INT32_RANGE // (near.shape[axis] - 1) + near[0].numel()
    far = vast.as_strided(near.shape, strides).copy_(near)
    assert far.stride(axis) < INT32_RANGE <= far.stride(axis) * (near.shape[axis] - 1)
    found = tree_attention_triton(replace(inputs, **{name: far}), plan(2, block_rows=16))
    assert_right(case, found, contents)
