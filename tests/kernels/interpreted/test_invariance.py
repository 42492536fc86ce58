"""What changes no result of tree attention, to the bit where nothing is computed in another way."""

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.interpreted.launching import attend, plans, quick_search
from tests.kernels.tree_cases import (
    draw_contents,
    renumber,
    reorder,
    tree_cases,
)

REORDERED = 1e-5  # float32 sums in another order


def assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=REORDERED, atol=REORDERED)


def assert_equal_bits(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


sizes = {"sizes": (4, 7, 17, 33), "head_dims": (16, 80), "most_blocks": 3, "most_rows": 32}
small = tree_cases(dtypes=(torch.float32,), **sizes)
whole_trees = tree_cases(dtypes=(torch.float32,), nodes=None, **sizes)


@quick_search
@given(whole_trees, plans(), st.integers(0, 99))
def test_order_of_siblings_orders_the_results_alike(case, how, seed):
    case = replace(case, parents=case.parents[:1])
    contents = draw_contents(case)
    order = reorder(case.parents[0], seed)
    other = replace(case, parents=(renumber(case.parents[0], order),))
    output, lse = attend(case, how, contents)
    found = attend(other, how, contents.tree_slots(order))
    assert_close(found, (output[:, order], lse[:, :, order]))


@quick_search
@given(whole_trees, plans(block_keys=64))
def test_further_node_changes_no_bit_of_another_node(case, how):
    # Without a window, which tiles are seen in full depends on no node; the tree keeps to one tile.
    case = replace(case, parents=tuple(tree[:31] for tree in case.parents), window=None)
    grown = replace(case, parents=tuple((*tree, len(tree) // 2) for tree in case.parents))
    contents = draw_contents(grown)
    output, lse = attend(grown, how, contents)
    alone = attend(case, how, contents.tree_slots(slice(0, case.slots)))
    assert_equal_bits(alone, (output[:, :-1], lse[:, :, :-1]))


@quick_search
@given(whole_trees, plans())
def test_contents_of_a_node_change_no_bit_of_nodes_that_do_not_see_it(case, how):
    contents = draw_contents(case)
    others = draw_contents(replace(case, seed=case.seed + 1))
    last = [slot == case.slots - 1 for slot in range(case.slots)]
    is_last = torch.tensor(last)[:, None]
    changed = replace(
        contents,
        query=others.query.where(is_last, contents.query),
        tree_key=others.tree_key.where(is_last, contents.tree_key),
        tree_value=others.tree_value.where(is_last, contents.tree_value),
    )
    output, lse = attend(case, how, contents)
    found, found_lse = attend(case, how, changed)
    assert_equal_bits((found[:, :-1], found_lse[:, :, :-1]), (output[:, :-1], lse[:, :, :-1]))


@quick_search
@given(small, plans())
def test_row_by_itself_is_the_row_in_a_batch(case, how):
    contents = draw_contents(case)
    output, lse = attend(case, how, contents)
    for row in range(case.batch):
        rows = slice(row, row + 1)
        alone = replace(
            case,
            parents=case.parents if len(case.parents) == 1 else case.parents[rows],
            lengths=case.lengths[rows],
            starts=case.starts and case.starts[rows],
            gaps=case.gaps and case.gaps[rows],
        )
        assert_equal_bits(attend(alone, how, contents.rows(rows)), (output[rows], lse[rows]))


@quick_search
@given(small, plans())
def test_tree_of_each_row_may_be_shared_where_they_are_equal(case, how):
    shared = replace(case, parents=case.parents[:1])
    repeated = replace(case, parents=case.parents[:1] * case.batch)
    assert_equal_bits(attend(shared, how), attend(repeated, how))


@quick_search
@given(small, plans(), plans())
def test_tiles_and_splits_change_only_the_rounding(case, how, other):
    assert_close(attend(case, how), attend(case, other))


@quick_search
@given(small, plans(), st.sampled_from(["contiguous", "sliced"]))
def test_place_in_memory_changes_no_bit(case, how, layout):
    moved = replace(case, layout=layout, spare=case.spare + 7)
    contents = draw_contents(case)
    assert_equal_bits(attend(case, how, contents), attend(moved, how, contents))


@quick_search
@given(whole_trees, plans(), st.integers(1, 33))
def test_queries_of_the_last_nodes_alone_give_their_results(case, how, nodes):
    part = replace(case, nodes=min(nodes, case.slots))
    contents = draw_contents(case)
    output, lse = attend(case, how, contents)
    last = (output[:, -part.attending :], lse[:, :, -part.attending :])
    assert_close(attend(part, how, contents), last)


@quick_search
@given(whole_trees, plans(), st.sampled_from([0, 1, 16, 17]))
def test_two_parts_of_the_keys_are_joined_by_their_denominators(case, how, cut):
    # Every node of the first part sees the keys before the cut and itself, with a score so low
    # that it counts for nothing there; those of the second see the rest, and the sinks.
    fixed = {"window": None, "gaps": None, "starts": None, "groups": 1}
    case = replace(case, softcap=None, **fixed)
    contents = draw_contents(case)
    cuts = tuple(min(cut, length) for length in case.lengths)
    alone = (tuple(range(case.slots)),)
    faint = replace(contents, tree_key=-1e4 * contents.query, sinks=None)
    parts = [
        attend(replace(case, lengths=cuts, parents=alone, sinks=None), how, faint),
        attend(replace(case, starts=cuts), how, contents),
    ]
    weights = torch.stack([lse for _, lse in parts]).softmax(0).transpose(2, 3)[..., None]
    output = (weights * torch.stack([part for part, _ in parts])).sum(0)
    lse = torch.stack([lse for _, lse in parts]).logsumexp(0)
    assert_close(attend(case, how, contents), (output, lse))
