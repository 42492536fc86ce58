import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speclm.errors import OptionError
from speclm.generation.calibrate import calibrate_choices, estimate_tau, replay_rounds
from speclm.tree.choices import normalize_choices, static_tree

TEXTS = st.lists(
    st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=12),
    min_size=1,
    max_size=4,
)


def test_a_round_goes_as_far_as_the_tree_has_the_ranks_that_came():
    chain = ((0,), (0, 0))
    ranks = [[0, 0, 0], [9, 9, 9], [9, 9, 9], [0, 1, 0], [9, 9, 9], [1, 0, 0], [0, -1, -1]]
    assert replay_rounds(ranks, chain) == [2, 1, 0, 1]
    assert estimate_tau([ranks], chain) == 7 / 4  # the last round ends the text


def test_the_end_of_a_text_ends_its_last_round():
    assert replay_rounds([[0, 0, -1]], ((0,), (0, 0), (0, 0, 0))) == [2]


def test_calibration_takes_the_most_frequent_paths():
    ranks = [[0, 1]] * 6 + [[1, 0]] * 3 + [[2, 2]]
    assert calibrate_choices([[row] for row in ranks], num_nodes=2) == ((0,), (0, 1))
    assert calibrate_choices([[row] for row in ranks], num_nodes=3) == ((0,), (1,), (0, 1))


def test_ranks_and_levels_beyond_the_bounds_are_left_out():
    ranks = [[[5, 0]], [[0, 0]], [[0, 0]]]
    assert calibrate_choices(ranks, num_nodes=9, max_rank=5) == ((0,), (0, 0))
    assert calibrate_choices(ranks, num_nodes=9, max_depth=1) == ((0,), (5,))


@given(TEXTS, st.integers(1, 8))
def test_calibrated_choices_are_a_tree_and_no_worse_than_a_chain_of_equal_size(texts, num_nodes):
    choices = calibrate_choices(texts, num_nodes=num_nodes)
    assert normalize_choices(choices) == choices
    static_tree(choices, device=torch.device("cpu"))
    assert len(choices) <= num_nodes


def test_errors_name_what_is_missing():
    with pytest.raises(OptionError, match="num_nodes"):
        calibrate_choices([[[0]]], num_nodes=0)
    with pytest.raises(OptionError, match="no text"):
        calibrate_choices([[]], num_nodes=3)
    with pytest.raises(OptionError, match="no text"):
        estimate_tau([[]], ((0,),))
