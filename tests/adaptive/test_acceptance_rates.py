from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speclm import SpecModel
from speclm.adaptive.acceptance_rates import (
    RankRecorder,
    calibrated_paths,
    expected_tau,
    observing_paths,
    replay_rounds,
)
from speclm.drafting.combined import CombinedProposer
from speclm.drafting.interface import Draft, Proposer
from speclm.errors import OptionError
from speclm.methods.draft_model.proposer import DraftModelProposer
from speclm.methods.ngram.proposer import NgramProposer
from speclm.tree.static import normalize_paths, static_tree
from tests.models import generate, prompts, shared_model
from tests.proposers import random_heads


class RankedProposer(Proposer):
    """Puts the true tokens at ranks that a script names, one for each depth."""

    fills_static_trees = True

    def __init__(self, reference, ranks):
        self._reference, self._ranks, self._num_tokens = reference, ranks, 0

    def begin(self, prompt):
        self._num_tokens = 0

    def propose(self, roots, *, noise):
        tree = static_tree(self.plan.paths, device=roots.device)
        tokens = torch.zeros(1, 1 + len(tree.paths), dtype=torch.long)  # never generated
        for node, path in enumerate(tree.paths, start=1):
            depth = len(path)
            position = self._num_tokens + depth - 1
            if path == tuple(self._ranks[:depth]) and position < len(self._reference):
                tokens[0, node] = self._reference[position]
        return Draft(tokens, tree.topology)

    def commit(self, accepted):
        self._num_tokens += len(accepted.emitted[0])


def test_ranks_are_counted_where_they_were_accepted():
    base, inputs = shared_model("llama"), prompts(9)
    plain, _ = generate(base, inputs, max_new_tokens=24, do_sample=False)
    reference = plain[0, inputs["input_ids"].shape[1] :].tolist()
    assert 0 not in reference
    recorder = RankRecorder(RankedProposer(reference, (1, 0, 2)))
    model = SpecModel(base, recorder, adaptive=False)

    found, _ = generate(model, inputs, max_new_tokens=24, do_sample=False)

    assert torch.equal(found, plain)
    assert model.last_speculation.tau == 4.0
    acceptance = recorder.acceptance
    assert acceptance[0][:2] == [0.0, 1.0]
    assert acceptance[1][0] == 1.0
    assert acceptance[2] == [0.0, 0.0, 1.0]
    assert len(acceptance) == 3


def test_a_wrapped_proposer_keeps_its_features_and_gives_its_plan_back():
    from speclm.methods.medusa.proposer import MedusaProposer

    base, inputs = shared_model("llama"), prompts(9, 5)
    inner = MedusaProposer(random_heads(base), target=base)
    model = SpecModel(base, RankRecorder(inner), adaptive=False)
    plain, _ = generate(base, inputs, max_new_tokens=8, do_sample=False)

    found, _ = generate(model, inputs, max_new_tokens=8, do_sample=False)

    assert torch.equal(found, plain)
    assert model.proposer.features == inner.features
    assert inner.plan is None


def test_a_draft_model_that_is_the_target_is_always_right_first():
    base, inputs = shared_model("llama"), prompts(9)
    recorder = RankRecorder(DraftModelProposer(deepcopy(base), target=base, depth=3))

    generate(SpecModel(base, recorder, adaptive=False), inputs, max_new_tokens=20, do_sample=False)

    assert recorder.acceptance == [[1.0], [1.0], [1.0]]


def test_a_proposer_without_ranks_is_refused():
    with pytest.raises(OptionError, match=r"CombinedProposer does not rank.*auto"):
        RankRecorder(CombinedProposer([NgramProposer()]))


SHARES = st.lists(
    st.lists(st.sampled_from([0.05, 0.1, 0.2, 0.25]), min_size=1, max_size=4),
    min_size=1,
    max_size=4,
)


def test_a_round_goes_as_far_as_the_tree_has_the_ranks_that_came():
    chain = ((0,), (0, 0))
    ranks = [[0, 0, 0], [9, 9, 9], [9, 9, 9], [0, 1, 0], [9, 9, 9], [1, 0, 0], [0, -1, -1]]
    assert replay_rounds(ranks, chain) == [2, 1, 0, 1]
    assert replay_rounds([[0, 0, -1]], ((0,), (0, 0), (0, 0, 0))) == [2]  # the text ends


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
    with pytest.raises(OptionError, match=r"no draft token was ever accepted.*prompts"):
        calibrated_paths([[0.0]], num_nodes=4)
    with pytest.raises(OptionError, match="num_nodes is 0"):
        calibrated_paths([[0.5]], num_nodes=0)


@pytest.mark.parametrize("depth", [1, 3, 8, 40])
def test_the_tree_to_observe_with_shows_the_best_ranks_at_every_depth(depth):
    paths = observing_paths(max_depth=depth)

    assert normalize_paths(paths) == paths
    assert len(paths) < 200
    assert {(rank,) for rank in range(8)} <= set(paths)
    assert (0,) * min(depth, 8) in paths
    assert max(map(len, paths)) == min(depth, 8)
