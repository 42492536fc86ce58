"""Numbers of the ranking distribution, estimated from what the target chose."""

import copy
import pickle
from dataclasses import astuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from speclm.drafting.mixture import (
    NUM_LEVELS,
    ROUNDS_PER_UPDATE,
    THINNING,
    Mixture,
    MixtureEstimator,
    mixture_scores,
    require_mixture,
)
from speclm.drafting.ranking import mixture_log_probs
from speclm.errors import OptionError
from speclm.methods.draft_model.proposer import DraftModelProposer
from tests.models import shared_model

VOCAB = 48


def draws(num: int, *, spread: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return distributions, the more certain the larger the spread, and noise."""
    generator = torch.Generator().manual_seed(seed)
    distributions = (spread * torch.randn(num, VOCAB, generator=generator)).log_softmax(-1)
    return distributions, torch.empty(num, VOCAB).exponential_(generator=generator)


def taught(
    distributions: Tensor,
    noise: Tensor,
    tokens: Tensor,
    *,
    depth: int = 0,
    start: Mixture | None = None,
) -> MixtureEstimator:
    """Return an estimator that saw four observations a round."""
    estimator = MixtureEstimator(start=start)
    estimator.begin("setting")
    for rows in torch.arange(len(tokens)).split(4):
        if estimator.wants_round():
            estimator.observe(distributions[rows], noise[rows], tokens[rows], depth=depth)
            estimator.end_round()
    return estimator


def test_numbers_do_not_depend_on_the_default_dtype_and_device():
    distributions, noise = draws(4 * ROUNDS_PER_UPDATE, spread=1.5)
    rounds = list(
        zip(distributions.split(4), noise.split(4), sampled(distributions).split(4), strict=True)
    )

    def learned() -> Mixture:
        estimator = MixtureEstimator()
        for one in rounds:
            estimator.observe(*one, depth=0)
            estimator.end_round()
        return estimator.at(0)

    expected = learned()
    with torch.device("meta"):
        torch.set_default_dtype(torch.float64)
        try:
            assert learned() == expected != Mixture()
        finally:
            torch.set_default_dtype(torch.float32)


def log_likelihood(distributions: Tensor, noise: Tensor, tokens: Tensor, mixture: Mixture) -> float:
    ranked = mixture_log_probs(distributions, noise, mixture)
    return float(ranked.gather(1, tokens[:, None]).mean())


def sampled(distributions: Tensor, *, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(distributions.exp(), 1, generator=generator)[:, 0]


@given(
    weight=st.floats(0.1, 0.9),
    exponents=st.tuples(*[st.floats(0.5, 2.0)] * 3),
    seed=st.integers(0, 99),
)
def test_gradients_are_those_of_the_log_likelihood(weight, exponents, seed):
    distributions, noise = draws(3, spread=1.5, seed=seed)
    distributions, noise, tokens = (
        distributions.double(),
        noise.double(),
        torch.tensor([0, 5, VOCAB - 1]),
    )
    free = torch.tensor([weight, *exponents], dtype=torch.float64)
    free = torch.cat([free[:1].logit(), free[1:].log()]).repeat(3, 1).requires_grad_()
    w, a, b, plain = free[:, :1].sigmoid(), *free[:, 1:].exp().split(1, dim=1)
    coupled = (a * distributions - b * noise.log()).softmax(-1)
    distribution = w * coupled + (1 - w) * (plain * distributions).softmax(-1)
    probabilities = distribution.gather(1, tokens[:, None])
    (expected,) = torch.autograd.grad(probabilities.log().sum(), free)
    numbers = torch.cat([w, a, b, plain], dim=1).detach()
    found, _ = mixture_scores(distributions, noise, tokens, numbers)
    assert torch.allclose(found, expected.clamp(-8, 8), atol=1e-9)


def test_information_is_the_mean_outer_product_of_gradients():
    distributions, noise = draws(1, spread=1.0)
    numbers = torch.tensor([[0.6, 1.2, 0.9, 1.3]])
    every = torch.arange(VOCAB)
    gradients, information = mixture_scores(
        distributions.expand(VOCAB, -1), noise.expand(VOCAB, -1), every, numbers.expand(VOCAB, -1)
    )
    probabilities = mixture_log_probs(
        distributions[0], noise[0], Mixture(*numbers[0].tolist())
    ).exp()
    expected = torch.einsum("v,vi,vj->ij", probabilities, gradients, gradients)
    assert torch.allclose(information[0], expected, atol=1e-4)
    assert torch.allclose(probabilities @ gradients, torch.zeros(4), atol=1e-4)  # means of a score


def test_targets_that_follow_the_noise_have_a_weight_near_one():
    distributions, noise = draws(1200, spread=2.0)
    found = taught(distributions, noise, (distributions - noise.log()).argmax(-1)).at(0)
    assert found.weight > 0.93
    assert found.noise_exponent > 1.5


def test_near_certain_targets_that_ignore_the_noise_have_a_small_weight():
    distributions, noise = draws(1200, spread=5.0)
    assert taught(distributions, noise, distributions.argmax(-1)).at(0).weight < 0.25


def test_numbers_that_targets_follow_are_found():
    truth = Mixture(weight=0.5, draft_exponent=1.3, noise_exponent=0.8, plain_exponent=1.6)
    distributions, noise = draws(8000, spread=2.5)
    found = taught(
        distributions, noise, sampled(mixture_log_probs(distributions, noise, truth))
    ).at(0)
    assert found.weight == pytest.approx(truth.weight, abs=0.1)
    assert found.draft_exponent == pytest.approx(truth.draft_exponent, rel=0.15)
    assert found.noise_exponent == pytest.approx(truth.noise_exponent, rel=0.15)
    assert found.plain_exponent == pytest.approx(truth.plain_exponent, rel=0.15)


@pytest.mark.parametrize("spread", [0.5, 2.0, 5.0])
@pytest.mark.parametrize("error", [0.0, 0.7, 2.0])
def test_held_out_choices_are_no_less_likely_than_under_the_start_values(spread, error):
    distributions, noise = draws(1600, spread=spread)
    generator = torch.Generator().manual_seed(9)
    target = (
        distributions + error * torch.randn(distributions.shape, generator=generator)
    ).log_softmax(-1)
    tokens = (target - noise.log()).argmax(-1)
    found = taught(distributions[:800], noise[:800], tokens[:800]).at(0)
    held_out = distributions[800:], noise[800:], tokens[800:]
    tolerance = 0.02  # of 800 draws
    assert log_likelihood(*held_out, found) > log_likelihood(*held_out, Mixture()) - tolerance


def test_choices_of_the_start_values_leave_them_where_they_are():
    distributions, noise = draws(2000, spread=2.0)
    tokens = sampled(mixture_log_probs(distributions, noise, Mixture()))
    found = taught(distributions, noise, tokens).at(0)
    assert found.weight == pytest.approx(0.75, abs=0.08)
    assert found.noise_exponent == pytest.approx(1.1, abs=0.15)


def test_deeper_numbers_lean_on_those_above_and_shallower_ones_stay():
    distributions, noise = draws(800, spread=2.0)
    tokens = (distributions - noise.log()).argmax(-1)
    at_root = taught(distributions, noise, tokens)
    assert at_root.at(NUM_LEVELS + 5) == at_root.at(NUM_LEVELS - 1)
    assert at_root.at(1).weight > 0.85  # nothing was seen there
    below = taught(distributions, noise, tokens, depth=2)
    assert below.at(1) == below.at(0) == Mixture()
    assert below.at(2).weight > 0.8


def test_tokens_outside_the_drafts_vocabulary_count_for_nothing():
    distributions, noise = draws(400, spread=2.0)
    tokens = (distributions - noise.log()).argmax(-1)
    outside = torch.where(torch.arange(400) % 2 == 0, tokens, -1)
    found = taught(distributions, noise, outside)
    state = found._states["setting"]
    expected = MixtureEstimator()
    expected.begin("setting")
    for rows in torch.arange(400).split(4):
        expected.wants_round()
        expected.observe(distributions[rows][::2], noise[rows][::2], tokens[rows][::2], depth=0)
        expected.end_round()
    assert torch.allclose(state.pull, expected._states["setting"].pull, rtol=1e-3)


def test_tokens_that_the_draft_cut_off_count_for_nothing():
    distributions, noise = draws(400, spread=2.0)
    tokens = (distributions - noise.log()).argmax(-1)
    hidden = torch.arange(400) % 2 == 0
    cut = torch.where(
        hidden[:, None] & (torch.arange(VOCAB) == tokens[:, None]), -torch.inf, distributions
    )
    found = taught(cut, noise, tokens)._states["setting"]
    expected = taught(distributions, noise, torch.where(hidden, -1, tokens))._states["setting"]
    assert torch.isfinite(found.pull).all()
    assert torch.allclose(found.pull, expected.pull, rtol=1e-3)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_distributions_that_overflow_count_for_nothing(wrong):
    distributions, noise = draws(8 * ROUNDS_PER_UPDATE, spread=3.0)
    tokens = sampled(distributions)
    broken = distributions.clone()
    broken[::4] = wrong  # one observation of every round

    found = taught(broken, noise, tokens)

    expected = MixtureEstimator()
    expected.begin("setting")
    for rows in torch.arange(len(tokens)).view(-1, 4)[:, 1:]:
        expected.observe(distributions[rows], noise[rows], tokens[rows], depth=0)
        expected.end_round()
    assert found.at(0) != Mixture()
    assert astuple(found.at(0)) == pytest.approx(astuple(expected.at(0)))


def test_settings_have_numbers_of_their_own_that_outlive_calls():
    distributions, noise = draws(400, spread=2.0)
    estimator = taught(distributions, noise, (distributions - noise.log()).argmax(-1))
    learned = estimator.at(0)
    assert learned != Mixture()
    estimator.begin("other")
    assert estimator.at(0) == Mixture()
    estimator.begin("setting")
    assert estimator.at(0) == learned
    for other in range(20):
        estimator.begin(other)
    estimator.begin("setting")
    assert estimator.at(0) == Mixture()  # long forgotten


def test_many_short_calls_teach_as_much_as_a_long_one():
    distributions, noise = draws(ROUNDS_PER_UPDATE, spread=2.0)
    tokens = (distributions - noise.log()).argmax(-1)
    estimator = MixtureEstimator()
    for row in range(ROUNDS_PER_UPDATE):
        estimator.begin("setting")
        assert estimator.wants_round()
        one = slice(row, row + 1)
        estimator.observe(distributions[one], noise[one], tokens[one], depth=0)
        estimator.end_round()
    assert estimator.at(0) != Mixture()


def test_after_many_rounds_few_are_observed():
    estimator = MixtureEstimator()
    estimator.begin("setting")
    wanted = [estimator.wants_round() for _ in range(1000)]
    assert all(wanted[:200])
    assert sum(wanted[-40 * THINNING :]) == 40


def test_fixed_numbers_want_no_round():
    estimator = MixtureEstimator(start=Mixture(weight=0.4), is_fixed=True)
    estimator.begin("setting")
    assert not estimator.wants_round()
    assert estimator.at(3) == Mixture(weight=0.4)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_copies_and_pickles_keep_what_was_learned_and_go_their_own_way(duplicate):
    distributions, noise = draws(400, spread=2.0)
    tokens = (distributions - noise.log()).argmax(-1)
    estimator = taught(distributions, noise, tokens)
    learned, other = estimator.at(0), duplicate(estimator)
    assert other.at(0) == learned
    for _ in range(ROUNDS_PER_UPDATE):
        other.wants_round()
        other.observe(distributions[:4], noise[:4], distributions[:4].argmin(-1), depth=0)
        other.end_round()
    assert other.at(0) != learned
    assert estimator.at(0) == learned


def test_absurd_choices_leave_numbers_finite_and_in_bounds():
    distributions, noise = draws(2000, spread=8.0)
    found = taught(distributions, noise, (distributions - noise.log()).argmin(-1)).at(0)
    assert 0.0 < found.weight < 1.0
    assert 0.2 < found.draft_exponent < 5.0


@pytest.mark.parametrize(
    ("numbers", "words"),
    [({"weight": 1.5}, "weight is 1.5"), ({"noise_exponent": -1.0}, "noise_exponent is -1.0")],
)
def test_numbers_out_of_range_are_refused(numbers, words):
    with pytest.raises(OptionError, match=words):
        Mixture(**numbers)


def test_what_is_no_mixture_is_refused_as_an_option():
    require_mixture(None)
    require_mixture(Mixture())
    with pytest.raises(OptionError, match=r"mixture is 0\.7.*expected a Mixture"):
        require_mixture(0.7)


def test_proposers_take_fixed_numbers():
    model = shared_model("llama")
    proposer = DraftModelProposer(model, target=model, mixture=Mixture(weight=0.4))
    assert proposer.config.mixture == Mixture(weight=0.4)
    assert proposer._ranking.estimator.is_fixed
