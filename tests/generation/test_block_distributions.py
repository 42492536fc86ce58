"""Drafts of block heads that are drawn, through the real loop: the distribution of its outputs."""

from typing import Any

import pytest
import torch

from speclm.acceptance import RejectionRule
from speclm.methods.block.proposer import BlockProposer
from tests import enumeration
from tests.enumeration import EXACT, LENGTH, VOCAB, distance, target_probs
from tests.generation.test_eagle_distributions import HIDDEN, FeatureTable, FirstRound
from tests.generation.test_rule_distributions import distribution_of, tables
from tests.methods.block.block_heads import make_heads
from tests.models import build_model

pytestmark = pytest.mark.untraced  # what it runs is traced elsewhere, at half the speed

OWN = {
    "hidden_size": HIDDEN,
    "vocab_size": VOCAB,
    "draft_vocab_size": VOCAB,
    "feature_layers": (0,),
    "mask_token_id": 0,
    "block_size": 3,
    "has_own_embeddings": True,
    "has_own_lm_head": True,
}
RNN: dict[str, Any] = {"markov": "rnn", "markov_rank": 3}
IN_PLACE: dict[str, Any] = {"is_causal": (False, False), "predicts_next": False}


@pytest.mark.parametrize(
    ("variant", "tree", "changes"),
    [
        ("block", [1, 1], RNN),
        pytest.param("multi_round", ((0,), (1,), (0, 0)), RNN, marks=pytest.mark.slow),
        pytest.param("traversal", [2], IN_PLACE, marks=pytest.mark.slow),
        pytest.param(  # the target says the third token
            "multi_round", [2], IN_PLACE | {"draft_vocab_size": 2}, marks=pytest.mark.slow
        ),
    ],
)
def test_drawn_drafts_leave_the_targets_distribution(variant, tree, changes, monkeypatch):
    monkeypatch.setattr(enumeration, "TableTarget", FeatureTable)
    monkeypatch.setattr(enumeration, "LENGTH", LENGTH + 1)  # the prompt's forward gives the first
    table, _ = tables(3)
    base = build_model("llama", vocab_size=VOCAB, hidden_size=HIDDEN)
    heads, lengths = make_heads(**OWN | changes), set()
    if heads.draft_columns is not None:
        heads.set_draft_columns_(torch.tensor([0, 2]))
    distribution, _ = distribution_of(
        monkeypatch,
        RejectionRule(variant),
        lambda: FirstRound(BlockProposer(heads, target=base, tree=tree), lengths),
        table=table,
    )
    assert abs(sum(distribution.values()) - 1) <= EXACT
    assert distance(distribution, target_probs(table=table)) <= EXACT
    assert max(lengths) > 0  # of rounds that did not end the text
