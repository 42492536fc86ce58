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
