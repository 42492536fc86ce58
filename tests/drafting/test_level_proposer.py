"""Drafts of a network that runs once for each level."""

import pytest
import torch

from speclm.drafting.interface import Prefill
from speclm.drafting.level_proposer import LevelProposer, LevelProposerConfig, WholeVocabulary
from speclm.errors import OptionError

VOCAB = 6


class Counting:
    """Always expects the next number, and says so with certainty."""

    def begin(self, prompt):
        self.last = prompt.first_tokens[:, None]

    def commit(self, accepted):
        pass

    def catch_up(self, *, num_ranks=None):
        pass

    def start(self, widths, *, width=0, num_ranks=None):
        return self

    @property
    def logits(self):
        return 50.0 * torch.nn.functional.one_hot((self.last + 1) % VOCAB, VOCAB)

    def best(self, num):
        found = self.logits.log_softmax(-1).topk(num, dim=-1)
        return found.values, found.indices

    def below(self, tokens, parents):
        self.last = tokens


class CountingProposer(LevelProposer):
    """Drafts with `Counting`."""

    def __init__(self, *, max_levels=None, **options):
        self.max_levels = max_levels
        self._prepare(
            LevelProposerConfig(**options),
            context=Counting(),
            vocabulary=WholeVocabulary(),
            sizes=(VOCAB, VOCAB),
        )


def draft(**options):
    proposer, roots = CountingProposer(**options), torch.tensor([1, 4])
    proposer.begin(
        Prefill(
            tokens=torch.zeros(2, 0, dtype=torch.long),
            num_padding=torch.zeros(2, dtype=torch.long),
            first_tokens=roots,
            temperature=0.0,
            max_new_tokens=9,
        )
    )
    return proposer.propose(roots, noise=None).tokens.tolist()


def test_levels_end_where_the_network_does():
    assert draft(depth=4) == [[1, 2, 3, 4, 5], [4, 5, 0, 1, 2]]
    assert draft(depth=4, max_levels=2) == [[1, 2, 3], [4, 5, 0]]
    static = {"paths": ((0,), (0, 0), (0, 0, 0)), "depth": 3}
    assert draft(**static) == [[1, 2, 3, 4], [4, 5, 0, 1]]
    assert draft(**static, max_levels=1) == [[1, 2], [4, 5]]


def test_ranks_of_a_static_tree_must_exist():
    with pytest.raises(OptionError, match="tree asks for rank 6"):
        CountingProposer(paths=((6,),), depth=1)
