"""Draws have the distributions that they promise, and come from their own generator."""

import math
from collections import Counter
from itertools import permutations

import pytest
import torch

from speclm.sampling import GeneratorDraws, TokenChooser, seeded_draws
from speclm.sampling.draws import DraftSampler, Families

LAW = torch.tensor([0.5, 0.0, 0.3, 0.2])
NUM = 4000
SIGMAS = 5  # of a binomial; seeds are fixed


def draws(seed=0):
    return GeneratorDraws(torch.Generator().manual_seed(seed))


def require_share(count, probability):
    assert (
        abs(count / NUM - probability)
        <= SIGMAS * math.sqrt(probability * (1 - probability) / NUM) + 1e-9
    )


def test_bernoulli_follows_its_probability_and_takes_nan_for_never():
    source = draws()
    require_share(sum(source.bernoulli(0.3) for _ in range(NUM)), 0.3)
    assert all(source.bernoulli(1.0) and source.bernoulli(7.0) for _ in range(100))
    assert not any(source.bernoulli(0.0) or source.bernoulli(math.nan) for _ in range(100))


def test_categorical_follows_probabilities_that_need_not_be_normalised():
    source = draws()
    counts = Counter(source.categorical(3 * LAW) for _ in range(NUM))
    for token, probability in enumerate(LAW.tolist()):
        require_share(counts[token], probability)
    assert source.categorical(torch.full((3,), math.nan)) == -1


def test_siblings_are_drawn_without_replacement_in_order():
    drawn = draws().without_replacement(LAW.expand(NUM, -1), num=3).tolist()
    counts = Counter(map(tuple, drawn))
    for order in permutations([0, 2, 3]):
        first, second, _ = (float(LAW[token]) for token in order)
        require_share(counts[order], first * second / (1 - first))


def test_what_has_no_probability_comes_last():
    drawn = draws().without_replacement(LAW.expand(50, -1), num=4)
    assert (drawn[:, 3] == 1).all()


def test_seeded_draws_take_one_draw_of_the_default_generator():
    torch.manual_seed(3)
    first = [seeded_draws(torch.device("cpu")).categorical(LAW) for _ in range(20)]
    state = torch.get_rng_state()
    torch.manual_seed(3)
    for _ in range(20):
        torch.randint(2**63 - 1, ())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    assert first == [seeded_draws(torch.device("cpu")).categorical(LAW) for _ in range(20)]
    assert len(set(first)) > 1


def test_distributions_are_processed_in_the_logits_precision_or_better():
    sampler = DraftSampler(TokenChooser([], is_greedy=False), draws())
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    for given, expected in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        distribution = sampler.distribution(logits.to(given))
        assert distribution.dtype == expected
        torch.testing.assert_close(distribution, logits.to(given).to(expected).softmax(-1))
    assert sampler.siblings(sampler.distribution(logits), num=2).shape == (2, 3, 2)


@pytest.mark.parametrize(
    ("parents", "expected"),
    [
        ([0], ([], [], 0)),
        ([0, 0, 1, 0, 4], ([0, 1], [[1, 3], [2]], 2)),
    ],
)
def test_families_leave_out_root_and_padding(parents, expected):
    families = Families.of(parents)
    assert (families.parents, families.children, families.max_children) == expected
