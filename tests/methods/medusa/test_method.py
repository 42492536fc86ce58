"""What Medusa heads say about themselves, and the options of their training."""

import pytest
import torch
import yaml

from speclm.cards import GENERATED_MARK
from speclm.errors import OptionError
from speclm.methods.medusa.checkpoint import MedusaCheckpoint
from speclm.methods.medusa.method import MedusaTrainingOptions, medusa_card


def checkpoint(**changes):
    weight = torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16)
    return MedusaCheckpoint.of_stacked(**{"weight": weight, **changes})


def test_card_gives_numbers_and_loading():
    lm_weight = torch.zeros(3, 7, 4, dtype=torch.bfloat16)
    heads = checkpoint(lm_weight=lm_weight, base_name_or_path="org/base", choices=((0,), (1,)))
    card = medusa_card(heads, repo_id="me/heads").render()
    assert yaml.safe_load(card.split("---\n", 2)[1])["tags"][1] == "medusa"
    assert 'SpecModel.from_pretrained("org/base", "me/heads")' in card
    for row in ("heads | 3", "residual layers of each head | 2", "parameters | 180"):
        assert f"| {row} |" in card
    for row in (
        "dtype | bfloat16",
        "tree | 2 nodes, not counting the root",
        "output matrix | one in each head",
    ):
        assert f"| {row} |" in card
    assert GENERATED_MARK in card


def test_card_leaves_out_what_is_not_known():
    card = medusa_card(checkpoint()).render()
    assert "| base model | not recorded |" in card
    assert "| tree | chosen when they are loaded |" in card
    assert "None" not in card


def test_training_options_out_of_range_are_refused():
    for wrong, words in (
        ({"num_heads": 0}, "--num-heads is 0"),
        ({"num_layers": 65}, "--num-layers is 65"),
        ({"decay": 2.0}, "decay is 2.0"),
        ({"soft_weight": -1.0}, "soft_weight is -1.0"),
    ):
        with pytest.raises(OptionError, match=words):
            MedusaTrainingOptions(**wrong)
