"""Draws have the distributions that they promise, and come from their own generator."""

import math
from collections import Counter
from itertools import permutations

import torch
from hypothesis import given
from hypothesis import strategies as st

from speclm.sampling import GeneratorDraws, TokenChooser, seeded_draws
from speclm.sampling.draws import DraftSampler, Draws, Families

DISTRIBUTION = torch.tensor([0.5, 0.0, 0.3, 0.2])
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
    counts = Counter(source.categorical(3 * DISTRIBUTION) for _ in range(NUM))
    for token, probability in enumerate(DISTRIBUTION.tolist()):
        require_share(counts[token], probability)
    assert source.categorical(torch.full((3,), math.nan)) == -1


def test_siblings_are_drawn_without_replacement_in_order():
    drawn = draws().without_replacement(DISTRIBUTION.expand(NUM, -1), num=3).tolist()
    counts = Counter(map(tuple, drawn))
    for order in permutations([0, 2, 3]):
        first, second, _ = (float(DISTRIBUTION[token]) for token in order)
        require_share(counts[order], first * second / (1 - first))


def test_what_has_no_probability_comes_last():
    drawn = draws().without_replacement(DISTRIBUTION.expand(50, -1), num=4)
    assert (drawn[:, 3] == 1).all()


def test_seeded_draws_take_one_draw_of_the_default_generator():
    torch.manual_seed(3)
    first = [seeded_draws(torch.device("cpu")).categorical(DISTRIBUTION) for _ in range(20)]
    state = torch.get_rng_state()
    torch.manual_seed(3)
    for _ in range(20):
        torch.randint(2**63 - 1, ())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    assert first == [seeded_draws(torch.device("cpu")).categorical(DISTRIBUTION) for _ in range(20)]
    assert len(set(first)) > 1


def test_distributions_are_processed_in_the_logits_precision_or_better():
    sampler = DraftSampler(TokenChooser([], is_greedy=False), draws())
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    for dtype, expected in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        distribution = sampler.distribution(logits.to(dtype))
        assert distribution.dtype == expected
        torch.testing.assert_close(distribution, logits.to(dtype).to(expected).softmax(-1))
    assert sampler.siblings(sampler.distribution(logits), num=2).shape == (2, 3, 2)


class LikeliestDraws(Draws):
    """Draws the likeliest tokens."""

    def bernoulli(self, probability):
        return probability > 0.5

    def categorical(self, probs):
        return int(probs.argmax())

    def without_replacement(self, probs, *, num):
        return probs.topk(num).indices


def sampler():
    return DraftSampler(TokenChooser([], is_greedy=False), LikeliestDraws())


def test_distribution_is_a_distribution_at_every_node():
    distribution = sampler().distribution(torch.randn(2, 3, 7))
    assert distribution.shape == (2, 3, 7)
    assert torch.allclose(distribution.sum(-1), torch.ones(2, 3))


def test_siblings_are_drawn_below_every_node():
    distributions = torch.rand(2, 3, 7)
    drawn = sampler().siblings(distributions, num=2)
    assert torch.equal(drawn, distributions.topk(2).indices)


def test_families_list_children_by_parent():
    families = Families.of([0, 0, 0, 1, 4, 1])  # node 4 is padding
    assert families.parents == [0, 1]
    assert families.children == [[1, 2], [3, 5]]
    assert families.max_children == 2
    assert Families.of([0]).max_children == 0


@given(st.lists(st.integers(0, 30), max_size=12))
def test_every_node_but_the_root_has_one_family(seeds):
    parents = [0, *(seed % node for node, seed in enumerate(seeds, start=1))]
    families = Families.of(parents)
    children = sorted(child for family in families.children for child in family)
    assert children == list(range(1, len(parents)))
