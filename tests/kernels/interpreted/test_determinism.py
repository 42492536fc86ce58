"""Deterministic tree attention: a node's bits depend on what it sees, and on nothing next to it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.grids import turns
from tests.kernels.interpreted.launching import attend, attend_as_planned, plan, quick_search
from tests.kernels.tree_cases import TreeCase, assert_right, draw_contents, grow, tree_cases

LONG = 150  # keys of more than two splits of the interpreter's plan

cases = st.sampled_from([16, 64]).flatmap(
    lambda block: tree_cases(
        block=block,
        most_blocks=3,
        sizes=(4, 17, 33),
        head_dims=(16, 80),
        most_rows=32,
        nodes=None,
        deterministic=True,
    )
)


@pytest.fixture(scope="module", autouse=True)
def _products_that_do_not_depend_on_the_row():
    """Multiply tiles with bits that a row has anywhere in its tile, as a GPU does.

    The interpreter uses numpy's product, which on some processors rounds the last rows of a matrix
    otherwise than the first.
    """

    def product(one, other, dtype=None):
        return np.einsum("ij,jk->ik", one, other, dtype=dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "matmul", product)
        yield


def fixed_plan(case, *, fixed_tiles, **sizes):
    """Splits of so many tiles, as many as a case needs and two more."""
    num_tiles = 2 + (max(case.begins) + case.slots) // sizes["block_keys"]
    return plan(2 + num_tiles // fixed_tiles, fixed_tiles=fixed_tiles, **sizes)


def assert_equal_bits(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def first_nodes(case, contents, how_many, run):
    part = replace(case, parents=tuple(tree[:how_many] for tree in case.parents))
    return run(part, contents.tree_slots(slice(0, how_many)))


def row_alone(case, contents, row, run):
    rows = slice(row, row + 1)
    alone = replace(
        case,
        parents=case.parents if len(case.parents) == 1 else case.parents[rows],
        lengths=case.lengths[rows],
        starts=case.starts and case.starts[rows],
        gaps=case.gaps and case.gaps[rows],
    )
    return run(alone, contents.rows(rows))


@quick_search
@given(cases, st.sampled_from([1, 2, 7]))
def test_first_nodes_alone_have_their_bits_inside_a_larger_tree(case, how_many):
    contents = draw_contents(case)
    output, lse = attend_as_planned(case, contents)
    how_many = min(how_many, case.slots)
    found = first_nodes(case, contents, how_many, attend_as_planned)
    assert_equal_bits(found, (output[:, :how_many], lse[:, :, :how_many]))


@quick_search
@given(cases, st.sampled_from([1, 5]))
def test_last_nodes_alone_have_their_bits_inside_a_larger_tree(case, how_many):
    part = replace(case, nodes=min(how_many, case.slots))
    contents = draw_contents(case)
    output, lse = attend_as_planned(case, contents)
    found = attend_as_planned(part, contents)
    assert_equal_bits(found, (output[:, -part.attending :], lse[:, :, -part.attending :]))


@quick_search
@given(cases)
def test_row_alone_has_its_bits_in_a_batch(case):
    contents = draw_contents(case)
    output, lse = attend_as_planned(case, contents)
    for row in range(case.batch):
        found = row_alone(case, contents, row, attend_as_planned)
        assert_equal_bits(found, (output[row : row + 1], lse[row : row + 1]))


@quick_search
@given(cases, st.sampled_from([0, 64, 300]), st.sampled_from([1, 2, 5]))
def test_room_in_the_cache_and_splits_asked_for_change_no_bit(case, spare, num_splits):
    contents = draw_contents(case)
    expected = attend_as_planned(case, contents)
    moved = replace(case, spare=spare)
    assert_equal_bits(attend_as_planned(moved, contents, num_splits=num_splits), expected)


@quick_search
@given(cases, st.integers(1, 3), st.sampled_from([16, 64]), st.sampled_from([16, 32, 64]))
def test_bits_are_equal_wherever_splits_end(case, fixed_tiles, block_rows, block_keys):
    sizes = {"block_rows": block_rows, "block_keys": block_keys}
    how = fixed_plan(case, fixed_tiles=fixed_tiles, **sizes)
    contents = draw_contents(case)

    def run(part, its_contents):
        return attend(part, how, its_contents)

    output, lse = run(case, contents)
    assert_right(case, (output, lse), contents)
    found = first_nodes(case, contents, 3, run)
    assert_equal_bits(found, (output[:, :3], lse[:, :, :3]))
    found = row_alone(case, contents, case.batch - 1, run)
    assert_equal_bits(found, (output[-1:], lse[-1:]))


@pytest.mark.parametrize(("window", "length"), turns([17, 24, 33, 48], [33, 40, 64]))
def test_root_has_its_bits_where_deeper_nodes_see_less_through_their_window(length, window):
    # Tiles that the root sees in full are cut for deeper nodes: they may not move in the order.
    case = TreeCase((grow("near_chain", 33),), (length,), window=window, deterministic=True)
    contents = draw_contents(case)
    output, lse = attend_as_planned(case, contents)
    for how_many in (1, 8):
        found = first_nodes(case, contents, how_many, attend_as_planned)
        assert_equal_bits(found, (output[:, :how_many], lse[:, :, :how_many]))


@pytest.mark.parametrize(("window", "sinks"), turns([None, 140], [1.0, None]))
def test_bits_of_a_long_prefix_are_those_of_any_tree_batch_cache_and_splits(window, sinks):
    case = TreeCase(
        (grow("top_k", 9),),
        (LONG, 3),
        groups=2,
        window=window,
        sinks=sinks,
        deterministic=True,
    )
    contents = draw_contents(case)
    output, lse = attend_as_planned(case, contents)
    assert_right(case, (output, lse), contents)
    found = first_nodes(case, contents, 1, attend_as_planned)
    assert_equal_bits(found, (output[:, :1], lse[:, :, :1]))
    for row in range(2):
        found = row_alone(case, contents, row, attend_as_planned)
        assert_equal_bits(found, (output[row : row + 1], lse[row : row + 1]))
    roomy = replace(case, spare=3 * LONG)
    for num_splits in (1, 3):
        found = attend_as_planned(roomy, contents, num_splits=num_splits)
        assert_equal_bits(found, (output, lse))
