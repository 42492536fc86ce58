import pytest
import torch

from speclm.errors import DataError, OptionError
from speclm.training.rows import TrainingRows, collate_rows, load_rows
from tests.training.talks import TAGGED, conversation, word_tokenizer, write_alphabet


def test_rows_are_read_from_a_file_and_cut(tmp_path):
    path = write_alphabet(tmp_path / "rows.jsonl")
    rows = load_rows(path, word_tokenizer(TAGGED), limit=5, max_length=10)
    assert rows.lengths == [10] * 5
    assert rows.num_assistant_tokens == 5 * 6


def test_rows_are_taken_from_conversations():
    rows = load_rows([conversation("a", "b"), conversation("a", "bcd")], word_tokenizer(TAGGED))
    assert (len(rows), rows.lengths) == (2, [6, 8])
    assert rows[1]["loss_mask"] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_padding_is_on_the_right_and_hides_no_token():
    rows = load_rows([conversation("a", "b"), conversation("a", "bcd")], word_tokenizer(TAGGED))
    batch = collate_rows([rows[0], rows[1]])
    assert batch["input_ids"][0, -2:].tolist() == [0, 0]
    assert batch["attention_mask"].sum(1).tolist() == [6, 8]
    assert batch["loss_mask"].sum(1).tolist() == [2, 4]
    assert batch["loss_mask"].dtype == torch.bool
    # The end of a turn is the padding token, and yet attended to.
    assert batch["input_ids"][0, 5] == 0
    assert batch["attention_mask"][0].tolist() == [1, 1, 1, 1, 1, 1, 0, 0]


def test_no_rows_are_refused():
    with pytest.raises(DataError, match="no rows to train on"):
        TrainingRows([])


def test_max_length_below_one_is_refused(tmp_path):
    with pytest.raises(OptionError, match="max_length is 0"):
        load_rows(tmp_path / "rows.jsonl", word_tokenizer(TAGGED), max_length=0)
