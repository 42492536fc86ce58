"""What MTP layers predict at every level of a draft: the same as a plain reference."""

import pytest
import torch

from speclm import SpecModel
from tests.methods.mtp.mtp_bases import (
    MIMO,
    ROWS,
    TOLERANCE,
    logits_along,
    make_base,
    reference_logits,
)
from tests.models import prompts

GUESSES = [7, 11, 3, 20]


@pytest.mark.parametrize("name", ROWS)
def test_logits_of_every_level_equal_a_plain_reference(name, tmp_path):
    made = make_base(tmp_path, name)
    spec = SpecModel.from_pretrained(str(tmp_path), "mtp")
    text = prompts(13)["input_ids"][0]
    is_hidden_first = ROWS[name].names is MIMO
    expected = [
        reference_logits(made, text, GUESSES[:depth], hidden_first=is_hidden_first)
        for depth in range(len(GUESSES) + 1)
    ]
    torch.testing.assert_close(
        logits_along(spec, text, GUESSES), torch.stack(expected), **TOLERANCE
    )
