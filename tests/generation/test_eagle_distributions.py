"""EAGLE drafts that are drawn, through the real loop: the distribution of its outputs."""

from typing import Any

import pytest
import torch
from torch import Tensor
from typing_extensions import override

from speclm.acceptance import Accepted, RejectionRule
from speclm.drafting.interface import Draft, Prefill, Proposer
from speclm.methods.eagle.config import EagleConfig
from speclm.methods.eagle.network import EagleHeads
from speclm.methods.eagle.proposer import EagleProposer
from speclm.sampling import DraftSampling, PositionNoise
from tests import enumeration
from tests.enumeration import EXACT, LENGTH, VOCAB, TableTarget, distance, target_probs
from tests.generation.test_rule_distributions import SettledError, distribution_of, tables
from tests.models import build_model

pytestmark = pytest.mark.untraced  # what it runs is traced elsewhere, at half the speed

HIDDEN = 8


class FeatureTable(TableTarget):
    """A table whose hidden states tell tokens apart."""

    @override
    def prefill(self, tokens: Tensor, cache: Any, **named: object) -> Tensor:
        self.features = states_of(tokens)
        return super().prefill(tokens, cache, **named)

    @override
    def forward_tree(self, tokens: Tensor, *arguments: Any, **named: Any) -> Tensor:
        self.features = states_of(tokens)
        return super().forward_tree(tokens, *arguments, **named)


def states_of(tokens: Tensor) -> Tensor:
    turns = torch.arange(1, HIDDEN + 1, dtype=torch.float64)
    return (tokens[..., None] * turns).sin()


class FirstRound(Proposer):
    """Ends the run after the first draft of EAGLE heads; what follows it starts afresh."""

    draft_sampling = DraftSampling.WITHOUT_REPLACEMENT

    def __init__(self, inner: EagleProposer, lengths: set[int]) -> None:
        self.config, self._inner, self._lengths = inner.config, inner, lengths
        self.emitted: list[int] = []
        self._was_asked = False

    @property
    @override
    def features(self):
        return self._inner.features

    @override
    def begin(self, prompt: Prefill) -> None:
        self._inner.begin(prompt)

    @override
    def propose(self, roots: Tensor, *, noise: PositionNoise | None) -> Draft:
        if self._was_asked:
            raise SettledError
        self._was_asked = True
        return self._inner.propose(roots, noise=noise)

    @override
    def commit(self, accepted: Accepted) -> None:
        self.emitted += accepted.emitted[0]
        self._lengths.add(int(accepted.accepted_length[0]))
        self._inner.commit(accepted)


def heads_over(draft_vocab_size: int) -> EagleHeads:
    """Return heads in double precision that compute with nothing of the target's."""
    config = EagleConfig(
        kind="eagle3",
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        vocab_size=VOCAB,
        draft_vocab_size=draft_vocab_size,
        target_hidden_size=HIDDEN,
        feature_layers=(0,),
        num_features=1,
        has_own_embeddings=True,
        has_own_lm_head=True,
    )
    heads = EagleHeads(config, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if heads.draft_columns is not None:
            heads.set_draft_columns_(torch.tensor([0, 2]))
    return heads.requires_grad_(False)  # as when decoding


@pytest.mark.parametrize(
    ("variant", "tree", "draft_vocab_size"),
    [
        pytest.param("block", [1, 1], VOCAB, marks=pytest.mark.slow),
        pytest.param("multi_round", ((0,), (1,), (0, 0)), VOCAB, marks=pytest.mark.slow),
        pytest.param("traversal", [2], VOCAB, marks=pytest.mark.slow),
        ("multi_round", [2], 2),  # the target says what the heads cannot
    ],
)
def test_drawn_drafts_leave_the_targets_distribution(variant, tree, draft_vocab_size, monkeypatch):
    monkeypatch.setattr(enumeration, "TableTarget", FeatureTable)
    monkeypatch.setattr(enumeration, "LENGTH", LENGTH + 1)  # the prompt's forward gives the first
    table, _ = tables(3)
    base = build_model("llama", vocab_size=VOCAB, hidden_size=HIDDEN)
    heads, lengths = heads_over(draft_vocab_size), set()
    distribution, _ = distribution_of(
        monkeypatch,
        RejectionRule(variant),
        lambda: FirstRound(EagleProposer(heads, target=base, tree=tree), lengths),
        table=table,
    )
    assert abs(sum(distribution.values()) - 1) <= EXACT
    assert distance(distribution, target_probs(table=table)) <= EXACT
    assert max(lengths) > 0  # of rounds that did not end the text
