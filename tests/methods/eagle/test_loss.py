import math

import pytest
import torch

from speclm.methods.eagle.loss import distribution_loss, feature_loss, find_sources, rank_targets

CLOSE = 1e-6


def test_sources_are_the_slots_from_which_a_counted_token_is_guessed():
    tokens = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 0]])
    mask = torch.tensor([[0, 0, 0, 1, 0], [0, 0, 1, 1, 1]]).bool()
    sources = find_sources(tokens, mask, num_steps=2)
    # Row 0 guesses token 3 at step 0 of slot 1 and at step 1 of slot 0.
    assert sources.indices.tolist() == [[0, 1, 0], [0, 1, 2]]
    assert sources.targets.tolist() == [
        [[-100, 4], [4, -100], [-100, -100]],
        [[8, 9], [9, 0], [0, -100]],
    ]


def test_batch_without_any_counted_token_has_one_source_without_target():
    sources = find_sources(torch.tensor([[1, 2, 3]]), torch.zeros(1, 3).bool(), num_steps=1)
    assert sources.targets.tolist() == [[[-100]]]


def test_distribution_loss_is_the_cross_entropy_in_float32():
    distribution = torch.tensor([[0.25, 0.75]])
    logits = torch.tensor([[math.log(0.5), math.log(0.5)]], dtype=torch.bfloat16)
    found = distribution_loss(logits, distribution)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(math.log(2), abs=CLOSE)


def test_feature_loss_is_square_near_zero_and_linear_beyond_one():
    found = feature_loss(torch.tensor([[0.5, 3.0]]), torch.zeros(1, 2))
    assert found.item() == pytest.approx((0.125 + 2.5) / 2, abs=CLOSE)


def test_ranks_count_the_better_columns():
    logits = torch.tensor([[3.0, 1.0, 2.0]] * 4)
    targets = torch.tensor([5, 9, 7, -100])
    ranks = rank_targets(logits, targets, torch.tensor([5, 6, 9]))
    assert ranks.tolist() == [0, 1, 3, -1]  # 7 has no column
    assert rank_targets(logits[:3], torch.tensor([0, 1, 2]), None).tolist() == [0, 2, 1]
