"""Measurements and failures become verdicts; a module that draws random numbers is found."""

import math

import pytest
import torch

from speclm.self_check.verdict import (
    Evidence,
    SelfCheck,
    Verification,
    distinct_tokens,
    first_draw,
    judge,
    relative_difference,
)
from speclm.target import TargetView
from tests.models import build_model, prompts, shared_model


def test_names_in_reports_and_what_passes():
    names = ["tree attention", "chains", "regular generation"]
    assert [verification.value for verification in Verification] == names
    for verification in Verification:
        check = SelfCheck(verification, "because")
        assert check.passes is (verification is not Verification.REGULAR)
        assert check.error == math.inf
        assert not check.is_cached


def verdict_on(error, effect):
    return judge(
        TargetView(shared_model("llama")), Verification.TREES, lambda _: Evidence(error, effect)
    )


def test_error_has_to_be_small_absolutely_and_relative_to_the_effect_of_the_text():
    assert verdict_on(5e-5, 1.0).verification is Verification.TREES
    assert "at most 1e-04 expected" in verdict_on(2e-4, 1.0).reason
    assert "too little" in verdict_on(0.0, 1e-3).reason
    assert "not numbers" in verdict_on(math.nan, math.nan).reason
    assert verdict_on(math.inf, 1.0).verification is Verification.REGULAR


def test_difference_is_relative_to_the_spread_of_each_position():
    wanted = torch.tensor([[1.0, -1.0], [10.0, -10.0]])
    found = wanted + torch.tensor([[0.1, 0.0], [0.0, 0.5]])
    assert relative_difference(found, wanted) == pytest.approx(0.1)


@pytest.mark.parametrize("masked", [-math.inf, torch.finfo(torch.float32).min, -1e9])
def test_tokens_that_never_occur_are_left_out(masked):
    wanted = torch.tensor([[1.0, masked, -1.0]])
    assert relative_difference(wanted + 0.1, wanted) == pytest.approx(0.1)
    found = torch.tensor([[1.0, 0.0, -1.0]])
    assert relative_difference(found, wanted) == math.inf


def test_numbers_on_only_one_side_are_found():
    wanted = torch.tensor([[1.0, -1.0]])
    broken = torch.tensor([[1.0, torch.nan]])
    assert relative_difference(broken, wanted) == math.inf
    assert math.isnan(relative_difference(wanted, broken))


@pytest.mark.parametrize("vocab_size", [1, 2, 10, 37, 160])
def test_tokens_are_as_distinct_as_the_vocabulary_allows(vocab_size):
    tokens = distinct_tokens(TargetView(build_model("llama", vocab_size=vocab_size)), 20)
    assert tokens.shape == (20,)
    assert int(tokens.max()) < vocab_size
    assert len(set(tokens.tolist())) >= min(20, vocab_size - 1)  # padding is left out
    assert vocab_size == 1 or 0 not in tokens.tolist()


def forward(view):
    with torch.no_grad():
        view.model(**prompts(4))


def test_module_whose_hook_draws_is_named_with_attention_before_it_that_does_not():
    model = build_model("llama")
    model.model.layers[1].mlp.register_forward_hook(lambda _, __, out: out + torch.rand(1))
    assert first_draw(TargetView(model), forward) == "module 'model.layers.1.mlp'"


def test_nothing_is_named_where_nothing_draws():
    assert first_draw(TargetView(shared_model("llama")), forward) is None


def test_code_that_fails_after_it_has_drawn_is_found():
    def fail(_):
        torch.rand(1)
        raise ZeroDivisionError

    assert first_draw(TargetView(shared_model("llama")), fail) == "the model"
