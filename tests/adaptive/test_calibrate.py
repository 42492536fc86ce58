import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speclm import SpecModel
from speclm.adaptive.acceptance_rates import (
    calibrate_choices,
    estimate_tau,
    measure_ranks,
    replay_rounds,
)
from speclm.errors import OptionError
from speclm.methods.medusa.network import MedusaHeads, MedusaHeadsConfig
from speclm.methods.medusa.proposer import MedusaProposer
from speclm.target import TargetView
from speclm.tree.static import normalize_paths, static_tree
from tests.methods.medusa.test_proposer import random_heads
from tests.models import VOCAB_SIZE, build_model, prompts, shared_model

TEXTS = st.lists(
    st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=12),
    min_size=1,
    max_size=4,
)


@torch.no_grad()
def test_measured_ranks_are_those_of_the_tokens_that_came():
    base = shared_model("llama")
    heads = random_heads(num_heads=3)
    prompt, answer = [5, 9, 2], [7, 1, 8, 3]
    ranks = measure_ranks(TargetView(base), heads, prompt, answer)
    hidden = base.model(torch.tensor([prompt + answer])).last_hidden_state[0]
    for root in range(3):
        distributions = heads(hidden[2 + root][None], lm_head=base.lm_head)[0]
        for head in range(3):
            if root + 1 + head >= len(answer):
                assert ranks[root][head] == -1
            else:
                order = distributions[head].argsort(descending=True).tolist()
                assert order[ranks[root][head]] == answer[root + 1 + head]


def test_the_estimate_is_the_tau_that_generating_the_texts_has():
    base = build_model("llama", seed=3)
    heads = MedusaHeads(MedusaHeadsConfig(40, VOCAB_SIZE, num_heads=3))
    heads.init_weights_(base.lm_head.weight)
    choices = normalize_paths([4, 3, 1])
    spec = SpecModel(base, MedusaProposer(heads, target=base, tree=choices))
    texts, emitted, rounds = [], 0, 0
    for seed in range(6):
        inputs = prompts(7, seed=seed)
        output = spec.generate(**inputs, max_new_tokens=24)
        answer = output[0, 7:].tolist()
        texts.append(
            measure_ranks(TargetView(base), heads, inputs["input_ids"][0].tolist(), answer)
        )
        (row,) = spec.last_speculation.rows
        emitted += sum(row.accepted_lengths) + len(row.accepted_lengths)
        rounds += len(row.accepted_lengths)
    assert estimate_tau(texts, choices) == pytest.approx(emitted / rounds, abs=1e-9)


@pytest.mark.parametrize(("prompt", "answer"), [([], [1, 2]), ([1], [2])])
def test_texts_without_a_guess_are_refused(prompt, answer):
    base = shared_model("llama")
    with pytest.raises(OptionError, match="leave such texts out"):
        measure_ranks(TargetView(base), random_heads(), prompt, answer)


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
    assert normalize_paths(choices) == choices
    static_tree(choices, device=torch.device("cpu"))
    assert len(choices) <= num_nodes


def test_errors_name_what_is_missing():
    with pytest.raises(OptionError, match="num_nodes"):
        calibrate_choices([[[0]]], num_nodes=0)
    with pytest.raises(OptionError, match="no text"):
        calibrate_choices([[]], num_nodes=3)
    with pytest.raises(OptionError, match="no text"):
        estimate_tau([[]], ((0,),))
