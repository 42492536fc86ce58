import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speclm.errors import OptionError
from speclm.training.conversations import Example
from speclm.training.dataset import ExampleDataset
from speclm.training.token_counts import choose_columns, count_tokens


def example(tokens, loss_mask):
    return Example(input_ids=tokens, loss_mask=loss_mask)


def test_only_tokens_that_the_loss_counts_are_counted():
    rows = ExampleDataset([example([1, 2, 2, 3], [0, 0, 1, 1]), example([2, 2], [1, 1])])
    assert count_tokens(rows, vocab_size=5).tolist() == [0, 0, 3, 1, 0]


def test_token_outside_the_vocabulary_is_named_with_its_example():
    rows = ExampleDataset([example([1, 2], [1, 1]), example([1, 7], [1, 1])])
    with pytest.raises(OptionError, match=r"example 1 has token 7, expected ids below 7.*tokenize"):
        count_tokens(rows, vocab_size=7)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.data())
def test_columns_are_the_most_frequent_tokens_in_order_of_their_ids(counts, data):
    size = data.draw(st.integers(1, len(counts)))
    columns = choose_columns(torch.tensor(counts), size).tolist()
    assert columns == sorted(set(columns))
    assert len(columns) == size
    left_out = [count for token, count in enumerate(counts) if token not in columns]
    assert max(left_out, default=0) <= min(counts[token] for token in columns)


def test_lowest_other_tokens_fill_up():
    assert choose_columns(torch.tensor([0, 0, 4, 0]), 3).tolist() == [0, 1, 2]
