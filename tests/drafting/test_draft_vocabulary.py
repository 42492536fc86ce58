"""Lists of a draft vocabulary, as they are published."""

from pathlib import Path

import pytest
import torch

from speclm.drafting.draft_vocabulary import draft_lists, read_columns
from speclm.errors import CheckpointError

COLUMNS = torch.tensor([0, 3, 4, 11, 19])
FILE = Path("model.safetensors")


def test_lists_read_back_as_the_tokens_they_stand_for():
    lists = draft_lists(COLUMNS, vocab_size=20)
    assert lists["d2t"].tolist() == [0, 2, 2, 8, 15]
    found = read_columns(FILE, lists["d2t"], lists["t2d"], vocab_size=20, num_columns=5)
    assert torch.equal(found, COLUMNS)
    whole = draft_lists(None, vocab_size=3)
    assert (whole["d2t"].tolist(), whole["t2d"].tolist()) == ([0, 0, 0], [True] * 3)


@pytest.mark.parametrize(
    ("offsets", "is_drafted", "words"),
    [
        ([0, 2, 2, 8], None, r"'d2t' is torch.int64 of shape \[4\], expected.*\[5\]"),
        ([0, 2, 2, 8, 16], None, "draft token 4 to 20, expected a token from 0 to 19"),
        ([0, 2, 1, 8, 15], None, "draft tokens 1 and 2 to 3 and 3, expected increasing tokens"),
        ([0, 2, 2, 8, 15], [True] * 20, "'t2d' holds True for token 1, expected False"),
        ([0, 2, 2, 8, 15], [True] * 19, r"'t2d' is torch.bool of shape \[19\]"),
    ],
)
def test_lists_that_contradict_are_refused(offsets, is_drafted, words):
    drafted = None if is_drafted is None else torch.tensor(is_drafted)
    with pytest.raises(CheckpointError, match=words):
        read_columns(FILE, torch.tensor(offsets), drafted, vocab_size=20, num_columns=5)
