import pytest
from hypothesis import given
from hypothesis import strategies as st

from speclm.adaptive.acceptance_rates import calibrated_paths, expected_tau, observing_paths
from speclm.errors import OptionError
from speclm.tree.static import normalize_paths

SHARES = st.lists(
    st.lists(st.sampled_from([0.05, 0.1, 0.2, 0.25]), min_size=1, max_size=4),
    min_size=1,
    max_size=4,
)


def test_the_likeliest_paths_are_chosen():
    acceptance = [[0.6, 0.3], [0.5, 0.2]]

    assert calibrated_paths(acceptance, num_nodes=2) == ((0,), (1,))
    assert calibrated_paths(acceptance, num_nodes=4) == ((0,), (1,), (0, 0), (1, 0))


@given(acceptance=SHARES, num_nodes=st.integers(1, 12))
def test_no_other_tree_of_that_size_is_expected_to_give_more(acceptance, num_nodes):
    chosen = calibrated_paths(acceptance, num_nodes=num_nodes)

    assert normalize_paths(chosen) == chosen
    assert len(chosen) <= num_nodes
    every = calibrated_paths(acceptance, num_nodes=511)
    gains = dict.fromkeys(every, 1.0)
    for path in every:
        for depth, rank in enumerate(path):
            gains[path] *= acceptance[depth][rank]
    best = sum(sorted(gains.values(), reverse=True)[:num_nodes])
    assert expected_tau(acceptance, chosen) == pytest.approx(1 + best)


def test_what_was_never_accepted_is_in_no_tree():
    assert calibrated_paths([[0.5, 0.0, 0.1]], num_nodes=9) == ((0,), (2,))
    assert expected_tau([[0.5]], ((0,), (1,), (0, 0))) == 1.5
    with pytest.raises(OptionError, match=r"no guess was ever accepted.*prompts"):
        calibrated_paths([[0.0]], num_nodes=4)
    with pytest.raises(OptionError, match="num_nodes is 0"):
        calibrated_paths([[0.5]], num_nodes=0)


@pytest.mark.parametrize("depth", [1, 3, 8, 40])
def test_the_tree_to_observe_with_shows_the_best_ranks_at_every_depth(depth):
    choices = observing_paths(max_depth=depth)

    assert normalize_paths(choices) == choices
    assert len(choices) < 200
    assert {(rank,) for rank in range(8)} <= set(choices)
    assert (0,) * min(depth, 8) in choices
    assert max(map(len, choices)) == min(depth, 8)
