"""Ranking by the draft's law, and by the noise that decides the position."""

import pytest
import torch

from speclm.proposers.ranking import COUPLED_WEIGHT, rank_log_probs

LOGITS = torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(0))
NOISE = torch.empty(2, 11).exponential_(generator=torch.Generator().manual_seed(1))


def test_greedy_ranks_by_the_drafts_own_law():
    ranked = rank_log_probs(LOGITS, temperature=0.3, noise=None)
    assert torch.equal(ranked, LOGITS.log_softmax(-1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_ranking_is_a_law(temperature):
    ranked = rank_log_probs(LOGITS, temperature=temperature, noise=NOISE)
    assert torch.allclose(ranked.exp().sum(-1), torch.ones(2, 3), atol=1e-5)


def test_sampled_ranking_is_the_mixture_by_hand():
    law = (LOGITS[1, 2].double() / 0.8).softmax(-1)
    coupled = (law / NOISE[1].double()) ** 1.1
    mixture = (1 - COUPLED_WEIGHT) * law + COUPLED_WEIGHT * coupled / coupled.sum()
    ranked = rank_log_probs(LOGITS, temperature=0.8, noise=NOISE)[1, 2]
    assert torch.allclose(ranked.exp().double(), mixture, atol=1e-6)


def test_draft_with_the_targets_law_ranks_the_targets_token_first():
    generator = torch.Generator().manual_seed(2)
    noise = torch.empty(500, 11).exponential_(generator=generator)
    logits = torch.randn(500, 1, 11, generator=generator)
    chosen = (logits[:, 0].softmax(-1) / noise).argmax(-1)
    coupled = rank_log_probs(logits, temperature=1.0, noise=noise)[:, 0].argmax(-1)
    plain = rank_log_probs(logits, temperature=1.0, noise=None)[:, 0].argmax(-1)
    assert (coupled == chosen).float().mean() > 0.9
    assert (plain == chosen).float().mean() < 0.6


def test_halves_are_ranked_in_single_precision():
    assert rank_log_probs(LOGITS.bfloat16(), temperature=1.0, noise=None).dtype == torch.float32
