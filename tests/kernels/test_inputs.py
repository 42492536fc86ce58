from dataclasses import replace

import pytest
import torch

from speclm.errors import KernelError
from speclm.kernels.inputs import MAX_SLOTS, MAX_SPLITS, require_shapes, require_values
from tests.kernels.tree_cases import TreeCase, grow, lay_out

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


def test_odd_groups_and_rows_without_a_prefix_are_taken():
    for groups, integers in ((1, torch.int32), (3, torch.int64), (7, torch.int32)):
        case = TreeCase((grow("padded", 7),), (0, 5), nodes=3, groups=groups, integers=integers)
        require(lay_out(case))


def test_sizes_follow_from_the_tensors():
    inputs = lay_out(replace(CASE, nodes=5))
    assert (inputs.batch, inputs.q_heads, inputs.kv_heads, inputs.groups) == (2, 6, 2, 3)
    assert (inputs.num_nodes, inputs.num_slots, inputs.num_rows) == (5, 6, 15)
    assert (inputs.head_dim, inputs.kv_len) == (16, 9 + 6 + CASE.spare)
    assert inputs.host_bounds() == [(2, 9, 9), (0, 4, 5)]


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
    "no key heads": ("query", lambda t: t[:1], "key has 2 rows, query 1"),
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
}


def test_shape_type_or_stride_that_does_not_fit_is_refused():
    for field, change, words in BAD_SHAPES.values():
        with pytest.raises(KernelError, match=words):
            require_shapes(changed(field, change))


def test_heads_of_a_key_without_heads_are_refused():
    inputs = lay_out(CASE)
    inputs = replace(inputs, key=inputs.key[:, :0], value=inputs.value[:, :0])
    with pytest.raises(KernelError, match="expected heads, and a width"):
        require_shapes(inputs)


def test_tensor_on_another_device_is_refused():
    names = ("key", "value", "prefix_lengths", "ancestor_words", "depths", "prefix_starts")
    for name in (*names, "tree_starts", "sinks"):
        inputs = changed(name, lambda tensor: tensor.to(META))
        with pytest.raises(KernelError, match=f"{name} is on meta, query on cpu; move it there"):
            require_shapes(inputs)


def test_number_out_of_range_is_refused():
    bad_numbers = {
        "scale": (0.0, -1.0, float("inf"), float("nan")),
        "window": (0, -3),
        "softcap": (0.0, -5.0, float("inf"), float("nan")),
        "num_splits": (0, -1, MAX_SPLITS + 1),
    }
    for name, numbers in bad_numbers.items():
        for number in numbers:
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
    "padding beyond the prefix": ("prefix_starts", at(0, 10), "slots 10 to 9"),
    "negative padding": ("prefix_starts", at(1, -1), "row 1 .* slots -1 to 4"),
    "tree inside the prefix": ("tree_starts", at(0, 8), "its tree from 8"),
    "tree beyond the cache": ("tree_starts", at(1, 15), "row 1 needs slots up to 21.* has 20"),
    "later node": ("ancestor_words", at((1, 2, 0), 0b1111), "node 2 of row 1 .* later slot 3"),
    "slot there is not": ("ancestor_words", at((0, 5, 0), -1), "node 5 of row 0 .* slot 6"),
    "blind node": ("ancestor_words", at((0, 3, 0), 0b0111), "node 3 of row 0 does not see itself"),
    "negative depth": ("depths", at((0, 4), -1), "depths holds a negative number"),
}


def test_value_that_does_not_fit_is_refused():
    for field, change, words in BAD_VALUES.values():
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
