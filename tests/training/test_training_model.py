import math

import pytest
import torch

from speclm.training.training_model import (
    IGNORED,
    TrainingModel,
    rank_columns,
    rank_targets,
    shifted_targets,
    soft_cross_entropy,
    token_cross_entropy,
    weighted_loss,
)

CLOSE = 1e-6  # one float32 sum of two terms


def test_model_without_a_writer_cannot_be_made():
    with pytest.raises(TypeError, match="write"):
        TrainingModel()


def test_targets_of_a_hand_made_row():
    # positions:           0  1  2  3  4  5   and one of padding
    tokens = torch.tensor([[5, 6, 7, 8, 9, 1, 0]])
    mask = torch.tensor([[0, 0, 0, 1, 0, 1, 0]]).bool()
    targets = shifted_targets(tokens, mask, num_drafted=3)[0].tolist()
    none = IGNORED
    assert targets == [
        [none, 8, none],  # tokens 2, 3, 4; of these the assistant wrote token 3
        [8, none, 1],  # tokens 3, 4, 5
        [none, 1, none],
        [1, none, none],
        [none, none, none],
        [none, none, none],
        [none, none, none],
    ]


@pytest.mark.parametrize("num_drafted", [1, 4, 9])
def test_target_of_draft_token_i_at_t_is_token_t_plus_2_plus_i(num_drafted):
    tokens = torch.randint(1, 50, (3, 6), generator=torch.Generator().manual_seed(0))
    targets = shifted_targets(tokens, torch.ones_like(tokens).bool(), num_drafted=num_drafted)
    assert targets.shape == (3, 6, num_drafted)
    for t in range(6):
        for index in range(num_drafted):
            inside = t + 2 + index < 6
            expected = tokens[:, t + 2 + index] if inside else torch.full((3,), IGNORED)
            assert torch.equal(targets[:, t, index], expected)


def test_rank_of_a_target_is_the_number_of_larger_logits():
    logits = torch.tensor([[3.0, 1.0, 2.0]]).expand(4, 3)
    ranks = rank_targets(logits, torch.tensor([0, 1, 2, IGNORED]))
    assert ranks.tolist() == [0, 2, 1, -1]


def test_soft_cross_entropy_is_computed_in_float32():
    probs = torch.tensor([[0.25, 0.75]])
    logits = torch.tensor([[math.log(0.5), math.log(0.5)]], dtype=torch.bfloat16)
    found = soft_cross_entropy(logits, probs)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(math.log(2), abs=CLOSE)


def test_losses_are_divided_by_their_own_counts_and_decayed():
    loss = weighted_loss(torch.tensor([6.0, 4.0, 9.0]), torch.tensor([3, 1, 0]), decay=0.5)
    assert loss.item() == pytest.approx(2.0 + 0.5 * 4.0 + 0.25 * 9.0)
    loss = weighted_loss(torch.tensor([6.0, 0.0]), torch.tensor([3, 0]), decay=1.0)
    assert loss.item() == pytest.approx(2.0)


def test_ranks_count_the_better_columns():
    logits = torch.tensor([[3.0, 1.0, 2.0]] * 4)
    targets = torch.tensor([5, 9, 7, -100])
    ranks = rank_columns(logits, targets, torch.tensor([5, 6, 9]))
    assert ranks.tolist() == [0, 1, 3, -1]  # 7 has no column
    assert rank_columns(logits[:3], torch.tensor([0, 1, 2]), None).tolist() == [0, 2, 1]


def test_cross_entropy_of_a_token_without_a_column_is_zero():
    logits = torch.tensor([[0.0, math.log(3.0)]] * 2)
    found = token_cross_entropy(logits, torch.tensor([9, 7]), torch.tensor([4, 9]))
    torch.testing.assert_close(found, torch.tensor([math.log(4 / 3), 0.0]))
    found = token_cross_entropy(logits, torch.tensor([0, 1]), None)
    torch.testing.assert_close(found, torch.tensor([4.0, 4 / 3]).log())
