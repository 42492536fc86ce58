"""What proposers share that draft a level at a time."""

import pytest
import torch

from speclm.drafting.interface import Prefill
from speclm.drafting.levels import (
    LevelBounds,
    assemble,
    least_probability,
    options_with_tree,
    planned,
    row_probs,
)
from speclm.errors import OptionError, TopologyError
from speclm.methods.eagle.proposer import EagleProposerConfig
from speclm.tree.dynamic import GrownRow
from speclm.tree.plan import TreePlan


def test_probabilities_of_nodes_are_given_their_paths():
    row = GrownRow([5, 6, 7], [0, 0, 1], [None] * 3, [-0.5, -1.5, -0.75])

    found = torch.tensor(row_probs(row)).log()

    assert torch.allclose(found, torch.tensor([-0.5, -1.5, -0.25]))


def test_a_grown_draft_has_probabilities_and_padding_none():
    rows = [GrownRow([5], [0], [None], [-0.5]), GrownRow([6, 7], [0, 1], [None] * 2, [-0.2, -0.9])]

    draft = assemble(rows, torch.tensor([1, 2]))

    expected = torch.tensor([[0.0, -0.5, -torch.inf], [0.0, -0.2, -0.7]]).exp()
    assert torch.allclose(torch.tensor(draft.node_probs), expected)


def test_plan_goes_before_the_config_and_leaves_the_rest():
    config = EagleProposerConfig(width=5, min_probability=0.3)
    found = planned(config, TreePlan(3, 7, paths=((0,),), min_confidence=0.4))
    assert (found.depth, found.num_draft_tokens, found.paths) == (3, 7, ((0,),))
    assert (found.min_probability, found.min_confidence, found.width) == (0.3, 0.4, 5)
    assert planned(config, TreePlan(3, 7, min_probability=0.1)).min_probability == 0.1


def test_static_tree_sets_the_size():
    found = options_with_tree([2, 2], {"num_draft_tokens": 4, "width": 2})
    assert found == {
        "paths": ((0,), (1,), (0, 0), (0, 1)),
        "depth": 2,
        "num_draft_tokens": 4,
        "width": 2,
    }
    with pytest.raises(TopologyError, match="no paths"):
        options_with_tree([], {})
    with pytest.raises(OptionError, match="num_draft_tokens"):
        options_with_tree([2], {"num_draft_tokens": 0})


def test_the_threshold_of_a_single_row_is_the_option():
    assert least_probability(0.09, num_rows=1) == 0.09
    assert least_probability(0.09, num_rows=0) == 0.09


def test_more_rows_ask_for_likelier_nodes_up_to_a_bound():
    assert least_probability(0.09, num_rows=4) == pytest.approx(0.18)
    assert least_probability(0.09, num_rows=1000) == 0.5
    assert least_probability(0.7, num_rows=1000) == 0.7


def test_no_threshold_stays_none():
    assert least_probability(0.0, num_rows=64) == 0.0


def test_levels_of_a_row_are_bounded_by_what_it_may_still_emit_and_end_with_it():
    prompt = Prefill(
        tokens=torch.ones(2, 3, dtype=torch.long),
        num_padding=torch.zeros(2, dtype=torch.long),
        first_tokens=torch.ones(2, dtype=torch.long),
        temperature=0.0,
        max_new_tokens=6,
        eos_token_ids=frozenset(),
    )
    bounds = LevelBounds(prompt)
    assert bounds.within(4) == [4, 4]
    bounds.commit([[1, 2, 3], [1]])
    assert bounds.within(4) == [2, 4]
    bounds.commit([[1, 2, 3], []])
    assert bounds.within(4) == [0, 0]


def bounds_of(*, batch, max_new_tokens):
    return LevelBounds(
        Prefill(
            tokens=torch.zeros(batch, 1, dtype=torch.long),
            num_padding=torch.zeros(batch, dtype=torch.long),
            first_tokens=torch.zeros(batch, dtype=torch.long),
            temperature=0.0,
            max_new_tokens=max_new_tokens,
        )
    )


def levels(bounds, depth=9, least=0.3):
    return bounds.levels(depth, reads=False, least=least)


def test_levels_that_are_not_read_follow_from_the_last_drafts():
    bounds = bounds_of(batch=2, max_new_tokens=1000)
    first = levels(bounds)
    assert first[0] == first[1] > 3
    for _ in range(20):
        bounds.commit([[1], [1]])  # nothing accepted
        few = levels(bounds)
    assert few == [1, 1]
    for _ in range(40):
        bounds.commit([[1] * (1 + few[0])] * 2)  # everything
        few = levels(bounds)
    assert few == [9, 9]
    assert levels(bounds, depth=4) == [4, 4]
    assert bounds.levels(4, reads=True, least=1.0) == [4, 4]


def test_a_level_that_was_left_out_is_tried_again():
    bounds = bounds_of(batch=1, max_new_tokens=10_000)
    drafted = []
    for _ in range(300):
        drafted.append(levels(bounds)[0])
        bounds.commit([[1, 1]])  # the first level and no other
    assert max(drafted[50:]) == 2
    assert set(drafted[50:]) <= {1, 2}


def test_near_the_end_no_more_levels_are_drafted_than_fit():
    bounds = bounds_of(batch=1, max_new_tokens=4)
    assert levels(bounds) == [3]
    bounds.commit([[1, 2]])
    assert levels(bounds) == [1]
    bounds.commit([[1, 2]])
    assert levels(bounds) == [0]
