import math

import pytest
import torch

from speclm.errors import UnknownNameError
from speclm.training.targets import IGNORED
from speclm.training.training_model import (
    TrainingModel,
    rank_columns,
    rank_targets,
    soft_cross_entropy,
    token_cross_entropy,
    tokenizer_of,
    weighted_loss,
)
from tests.models import build_model

CLOSE = 1e-6  # one float32 sum of two terms


def test_model_without_a_writer_cannot_be_made():
    with pytest.raises(TypeError, match="write"):
        TrainingModel()


def test_base_without_a_tokenizer_is_named(tmp_path):
    base = build_model("llama")
    base.config.name_or_path = str(tmp_path)
    with pytest.raises(UnknownNameError, match=r"(?s)has no tokenizer that can be loaded.*save it"):
        tokenizer_of(base)


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
