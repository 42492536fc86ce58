from dataclasses import replace

import pytest
import torch

from speclm.errors import KernelError
from speclm.kernels.inputs import MAX_SLOTS, MAX_SPLITS, require_shapes, require_values
from tests.kernels.tree_cases import NO_PAGE, PAGE_LENS, TreeCase, grow, lay_out

CASE = TreeCase(
    (grow("uniform", 6), grow("chain", 6)),
    (9, 4),
    starts=(2, 0),
    gaps=(0, 1),
    kv_heads=2,
    groups=3,
    sinks=1.0,
)
META = torch.device("meta")


def require(inputs):
    require_shapes(inputs)
    require_values(inputs)


def changed(name, change, case=CASE):
    inputs = lay_out(case)
    return replace(inputs, **{name: change(getattr(inputs, name))})


def every_other(tensor):
    return tensor.repeat_interleave(2, -1)[..., ::2]


@pytest.mark.parametrize("page_len", [0, *PAGE_LENS])
@pytest.mark.parametrize("groups", [1, 3, 7])
@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_odd_groups_and_rows_without_a_prefix_are_taken(groups, page_len, integers):
    sizes = {"groups": groups, "page_len": page_len, "integers": integers}
    require(lay_out(TreeCase((grow("padded", 7),), (0, 5), nodes=3, **sizes)))


def test_sizes_follow_from_the_tensors():
    inputs = lay_out(replace(CASE, page_len=4, nodes=5))
    assert (inputs.batch, inputs.q_heads, inputs.kv_heads, inputs.groups) == (2, 6, 2, 3)
    assert (inputs.num_nodes, inputs.num_slots, inputs.num_rows) == (5, 6, 15)
    assert (inputs.head_dim, inputs.page_len, inputs.kv_len) == (16, 4, 20)
    assert lay_out(CASE).page_len == 0
    assert lay_out(CASE).kv_len == 9 + 6 + CASE.spare


def test_as_many_slots_as_there_may_be_are_taken_and_one_more_is_refused():
    require(lay_out(TreeCase((grow("chain", MAX_SLOTS),), (1,), nodes=2)))
    with pytest.raises(KernelError, match=r"257 tree slots.*256.*draft fewer"):
        require(lay_out(TreeCase((grow("chain", MAX_SLOTS + 1),), (1,), nodes=2)))


def test_broken_call_is_a_value_error():
    with pytest.raises(ValueError, match="key is on cpu, query on meta"):
        require(changed("query", lambda query: query.to(META)))


BAD_SHAPES = {
    "query of 3 axes": ("query", lambda t: t[0], "query has shape .* expected 4 axes"),
    "key of 5 axes": ("key", lambda t: t[None], "key has shape .* expected 4 axes"),
    "whole numbers": ("value", lambda t: t.nan_to_num().long(), "value is torch.int64"),
    "two types": ("key", lambda t: t.half(), "key is torch.float16, query torch.float32"),
    "query strides": ("query", lambda t: t.mT.contiguous().mT, "query has strides .* expected 1"),
    "key strides": ("key", every_other, "key has strides .* expected 1 in the last axis"),
    "value strides": ("value", every_other, "value has strides .* expected 1 in the last axis"),
    "length strides": ("prefix_lengths", every_other, "prefix_lengths has strides"),
    "start strides": ("prefix_starts", every_other, "prefix_starts has strides"),
    "begin strides": ("tree_starts", every_other, "tree_starts has strides"),
    "depth strides": ("depths", every_other, "depths has strides"),
    "sink strides": ("sinks", every_other, "sinks has strides"),
    "fewer values": ("value", lambda t: t[:, :, 1:], "expected keys and values alike"),
    "other head_dim": ("query", lambda t: t[..., :8], "one head_dim"),
    "head mismatch": ("query", lambda t: t[:, :5], "5 heads, key 2; expected a multiple"),
    "no key heads": ("query", lambda t: t[:1], "key has 2 rows, query 1.* block_table"),
    "float lengths": ("prefix_lengths", lambda t: t.float(), "prefix_lengths is torch.float32"),
    "length per node": ("prefix_lengths", lambda t: t[:, None], r"prefix_lengths .* \(2, 1\)"),
    "too few starts": ("prefix_starts", lambda t: t[:1], r"prefix_starts .* \(1,\).* 2 rows"),
    "int16 begins": ("tree_starts", lambda t: t.short(), "tree_starts is torch.int16"),
    "depths of 3 rows": ("depths", lambda t: t[[0, 1, 1]], r"depths .* \(3, 6\).* 1 or 2 rows"),
    "float depths": ("depths", lambda t: t.float(), "depths is torch.float32"),
    "fewer depths": ("depths", lambda t: t[:, 1:], "6 nodes attend to 5 tree slots"),
    "no nodes": ("query", lambda t: t[:, :, :0], "0 nodes attend"),
    "words of 2 axes": ("ancestor_words", lambda t: t[0], r"ancestor_words .* \(6, 1\)"),
    "more words": ("ancestor_words", lambda t: t.repeat(1, 1, 2), "6 nodes by 1 words"),
    "words of other nodes": ("ancestor_words", lambda t: t[:, 1:], "6 nodes by 1 words"),
    "words of 3 rows": ("ancestor_words", lambda t: t[[0, 1, 1]], "of 1 or 2 rows"),
    "int32 words": ("ancestor_words", lambda t: t.int(), "ancestor_words is torch.int32"),
    "expanded words": (
        "ancestor_words",
        lambda t: t[:1].expand(2, -1, -1),
        "expected contiguous int64",
    ),
    "sink per key head": ("sinks", lambda t: t[:2], r"sinks is .* of shape \(2,\).* 6 query heads"),
    "table without a key": ("block_table", lambda _: torch.zeros(1, 9).int(), "pages of 2 rows"),
    "flat table": ("block_table", lambda _: torch.zeros(2).int(), r"block_table .* \(2,\)"),
    "float table": ("block_table", lambda _: torch.zeros(2, 9), "block_table is torch.float32"),
}


@pytest.mark.parametrize("name", BAD_SHAPES)
def test_shape_type_or_stride_that_does_not_fit_is_refused(name):
    field, change, words = BAD_SHAPES[name]
    inputs = changed(field, change)
    with pytest.raises(KernelError, match=words):
        require_shapes(inputs)


def test_heads_of_a_key_without_heads_are_refused():
    inputs = lay_out(CASE)
    inputs = replace(inputs, key=inputs.key[:, :0], value=inputs.value[:, :0])
    with pytest.raises(KernelError, match="expected heads, and a width"):
        require_shapes(inputs)


@pytest.mark.parametrize(
    "name",
    [
        "key",
        "value",
        "prefix_lengths",
        "ancestor_words",
        "depths",
        "prefix_starts",
        "tree_starts",
        "block_table",
        "sinks",
    ],
)
def test_tensor_on_another_device_is_refused(name):
    inputs = changed(name, lambda tensor: tensor.to(META), replace(CASE, page_len=4))
    with pytest.raises(KernelError, match=f"{name} is on meta, query on cpu; move it there"):
        require_shapes(inputs)


def test_table_with_strides_is_refused():
    inputs = changed("block_table", every_other, replace(CASE, page_len=4))
    with pytest.raises(KernelError, match="block_table has strides"):
        require_shapes(inputs)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        *(("scale", number) for number in (0.0, -1.0, float("inf"), float("nan"))),
        *(("window", number) for number in (0, -3)),
        *(("softcap", number) for number in (0.0, -5.0, float("inf"), float("nan"))),
        *(("num_splits", number) for number in (0, -1, MAX_SPLITS + 1)),
    ],
)
def test_number_out_of_range_is_refused(name, number):
    inputs = replace(lay_out(CASE), **{name: number})
    with pytest.raises(KernelError, match=f"{name} is {number!r}, expected"):
        require_shapes(inputs)


def at(place, number):
    """Change one number of a tensor."""

    def change(tensor):
        tensor = tensor.clone()
        tensor[place] = number
        return tensor

    return change


BAD_VALUES = {
    "prefix beyond the cache": ("prefix_lengths", at(0, 99), "row 0 .* 2 to 99"),
    "negative length": ("prefix_lengths", at(1, -1), "row 1 has its prefix in slots 0 to -1"),
    "padding behind the prefix": ("prefix_starts", at(0, 10), "slots 10 to 9"),
    "negative padding": ("prefix_starts", at(1, -1), "row 1 .* slots -1 to 4"),
    "tree inside the prefix": ("tree_starts", at(0, 8), "its tree from 8"),
    "tree beyond the cache": ("tree_starts", at(1, 15), "row 1 needs slots up to 21.* has 20"),
    "later node": ("ancestor_words", at((1, 2, 0), 0b1111), "node 2 of row 1 .* later slot 3"),
    "slot there is not": ("ancestor_words", at((0, 5, 0), -1), "node 5 of row 0 .* slot 6"),
    "blind node": ("ancestor_words", at((0, 3, 0), 0b0111), "node 3 of row 0 does not see itself"),
    "negative depth": ("depths", at((0, 4), -1), "depths holds a negative number"),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_value_that_does_not_fit_is_refused(name):
    field, change, words = BAD_VALUES[name]
    inputs = changed(field, change)
    require_shapes(inputs)
    with pytest.raises(KernelError, match=words):
        require_values(inputs)


def test_nodes_are_held_against_their_slots_where_fewer_attend():
    inputs = changed("ancestor_words", at((0, 0, 0), 0b1000), replace(CASE, nodes=3))
    require_values(inputs)  # the first node that attends is slot 3
    inputs = changed("ancestor_words", at((0, 0, 0), 0b10000), replace(CASE, nodes=3))
    with pytest.raises(KernelError, match="node 0 of row 0 names the later slot 4"):
        require_values(inputs)


def test_lengths_are_held_against_the_cache_without_starts_too():
    inputs = lay_out(replace(CASE, starts=None, gaps=None))
    require(inputs)
    with pytest.raises(KernelError, match=r"row 0 needs slots up to 105.*append the tree"):
        require(replace(inputs, prefix_lengths=torch.tensor([99, 4])))


PAGED = replace(CASE, page_len=4)  # row 0 uses 15 slots and writes from 9, row 1 uses 11, from 5


def test_pages_behind_the_last_slot_are_not_looked_at():
    inputs = lay_out(PAGED)
    assert (inputs.block_table == NO_PAGE).any()
    require(inputs)


@pytest.mark.parametrize("page", [-1, NO_PAGE])
@pytest.mark.parametrize("block", [0, 3])
def test_missing_page_is_refused(page, block):
    inputs = changed("block_table", at((0, block), page), PAGED)
    with pytest.raises(KernelError, match=rf"block_table\[0, {block}\] is page {page}"):
        require(inputs)


def test_table_that_ends_before_the_tree_is_refused():
    inputs = changed("block_table", lambda table: table[:, :3], PAGED)
    with pytest.raises(KernelError, match="row 0 needs slots up to 15, the cache has 12"):
        require(inputs)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((0, 2), (0, 3)),  # both written by one row
        ((0, 0), (0, 3)),  # written over the row's own prefix
        ((0, 3), (1, 2)),  # written by two rows
        ((0, 0), (1, 1)),  # written over another row's prefix, which comes first
        ((0, 2), (1, 0)),  # or second
        ((0, 0), (0, 1)),  # a row's prefix holds one page twice
    ],
)
def test_overlapping_pages_are_refused(one, other):
    table = lay_out(PAGED).block_table.clone()
    table[other] = table[one]
    inputs = changed("block_table", lambda _: table, PAGED)
    with pytest.raises(KernelError, match=r"overlap in page .* copy of the page"):
        require(inputs)


def test_rows_may_share_pages_that_no_tree_is_written_to():
    table = lay_out(PAGED).block_table.clone()
    table[1, 0] = table[0, 0]
    require(changed("block_table", lambda _: table, PAGED))
