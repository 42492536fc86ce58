from speclm.bench.tree_sizes import SIZES, simulate_tau
from speclm.methods.ngram.proposer import NgramProposer


def test_tau_by_nodes_is_replayed_and_does_not_fall(tiny_base, calls_of):
    calls = calls_of(max_new_tokens=24)[:2]
    found = simulate_tau(tiny_base, NgramProposer(), calls)
    assert list(found) == list(SIZES)[: len(found)]  # fewer where large forwards were measured slow
    taus = list(found.values())
    assert taus == sorted(taus)
    assert 1 < taus[0] <= 2


def test_without_a_draft_nothing_is_simulated(tiny_base, calls_of):
    assert simulate_tau(tiny_base, NgramProposer(), calls_of(max_new_tokens=1)[3:]) == {}
