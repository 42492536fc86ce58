import torch
from hypothesis import given
from hypothesis import strategies as st

from speclm.sampling.chooser import TokenChooser
from speclm.sampling.draws import DraftSampler, Draws, Families


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
