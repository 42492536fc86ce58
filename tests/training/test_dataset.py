import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speclm.errors import DataError, OptionError
from speclm.training.arguments import training_arguments
from speclm.training.conversations import Example
from speclm.training.dataset import (
    ExampleDataset,
    LengthSampler,
    PaddedExamples,
    choose_columns,
    collate_examples,
    count_tokens,
    eval_sampler,
    load_examples,
    train_sampler,
)
from speclm.training.loss_masks import ALL_ZERO, CUT_OFF
from tests.training.alphabet import TAGGED, conversation, word_tokenizer, write_alphabet


def test_rows_are_read_from_a_file_and_cut(tmp_path):
    path = write_alphabet(tmp_path / "rows.jsonl")
    rows = load_examples(path, word_tokenizer(TAGGED), limit=5, max_length=10)
    assert rows.lengths == [10] * 5
    assert sum(sum(row["loss_mask"]) for row in rows) == 5 * 6


def test_rows_are_taken_from_conversations():
    rows = load_examples([conversation("a", "b"), conversation("a", "bcd")], word_tokenizer(TAGGED))
    assert (len(rows), rows.lengths) == (2, [6, 8])
    assert rows[1]["loss_mask"] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_examples_that_cannot_be_learned_are_dropped_and_counted_by_reason(caplog):
    rows = [
        conversation("a", "b"),
        conversation("a", "", where="row 2"),
        *(conversation("abcdef", "g", where=f"row {number}") for number in (3, 4)),
    ]
    tokenizer = word_tokenizer(
        TAGGED.replace("{{ m['content'] }}<end>{% endg", "{{ m['content'] }}{% endg")
    )
    with caplog.at_level("WARNING", "speclm"):
        dataset = load_examples(rows, tokenizer, max_length=7)
    assert len(dataset) == 1
    assert [(part.reason, part.count) for part in dataset.dropped] == [(ALL_ZERO, 1), (CUT_OFF, 2)]
    assert "2 examples dropped, max_length cuts off the answer; first row 3: max_l" in caplog.text
    assert "1 example dropped, no token of the assistant is marked; first row 2" in caplog.text
    with pytest.raises(DataError, match="row 2: the loss mask of 4 tokens is all zero"):
        load_examples(rows, tokenizer, max_length=7, is_strict=True)
    with pytest.raises(DataError, match=r"no example can .* on: 1 example dropped.*\. 2 examples"):
        load_examples(rows[1:], tokenizer, max_length=7)


def test_reasoning_that_the_template_leaves_out_is_named(caplog):
    thinking = conversation("a", "b")
    thinking.messages[-1]["reasoning_content"] = "c"
    written = TAGGED.replace("{{ m['content'] }}", "{{ m['reasoning_content'] }}{{ m['content'] }}")
    for template, is_lost in ((TAGGED, True), (written, False)):
        caplog.clear()
        with caplog.at_level("WARNING", "speclm"):
            load_examples([conversation("a", "b"), thinking], word_tokenizer(template))
        assert ("template leaves out the reasoning_content" in caplog.text) == is_lost


def test_padding_is_on_the_right_and_hides_no_token():
    rows = load_examples([conversation("a", "b"), conversation("a", "bcd")], word_tokenizer(TAGGED))
    batch = collate_examples([rows[0], rows[1]])
    assert batch["input_ids"][0, -2:].tolist() == [0, 0]
    assert batch["attention_mask"].sum(1).tolist() == [6, 8]
    assert batch["loss_mask"].sum(1).tolist() == [2, 4]
    assert batch["loss_mask"].dtype == torch.bool
    # The end of a turn is the padding token, and yet attended to.
    assert batch["input_ids"][0, 5] == 0
    assert batch["attention_mask"][0].tolist() == [1, 1, 1, 1, 1, 1, 0, 0]


def test_no_rows_are_refused():
    with pytest.raises(DataError, match="no examples to train on"):
        ExampleDataset([])


def test_max_length_below_one_is_refused(tmp_path):
    with pytest.raises(OptionError, match="max_length is 0"):
        load_examples(tmp_path / "rows.jsonl", word_tokenizer(TAGGED), max_length=0)


@given(st.lists(st.integers(1, 99), min_size=1, max_size=400), st.integers(1, 5))
def test_every_row_is_drawn_once(lengths, batch_size):
    sampler = LengthSampler(lengths, batch_size=batch_size)
    assert sorted(sampler) == list(range(len(sampler))) == list(range(len(lengths)))


def test_rows_of_a_batch_are_about_equally_long():
    sampler = LengthSampler([length % 100 for length in range(200)], batch_size=4)
    rows = [row % 100 for row in sampler]
    spreads = [max(batch) - min(batch) for batch in zip(*[iter(rows)] * 4, strict=True)]
    assert max(spreads) <= 2


def test_order_depends_on_seed_and_epoch_alone():
    lengths = list(range(64))
    first, again = LengthSampler(lengths, batch_size=2), LengthSampler(lengths, batch_size=2)
    start = list(first)
    first.set_epoch(3)
    again.set_epoch(3)
    assert list(first) == list(first) == list(again) != start
    assert list(LengthSampler(lengths, batch_size=2, seed=1)) != start


def test_batch_size_below_one_is_refused():
    with pytest.raises(OptionError, match="batch_size is 0"):
        LengthSampler([1], batch_size=0)


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


def test_rows_of_several_processes_are_read_once_and_padded(tmp_path):
    rows = [Example(input_ids=[5] * length, loss_mask=[0, 0, 1]) for length in (3, 5, 4, 6, 3)]
    padded = PaddedExamples(ExampleDataset(rows))
    assert len(padded) == 5
    assert padded[3] == rows[3]
    assert padded[5] == {"input_ids": [5] * 3, "loss_mask": [0] * 3}
    settings = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 4, "use_cpu": True}
    args = training_arguments(tmp_path, settings)
    sampler = train_sampler(padded, args, usual=list)
    alone = train_sampler(ExampleDataset(rows), args, usual=list)
    orders = []
    for epoch in range(3):
        for each in (sampler, alone):
            each.set_epoch(epoch)
        orders.append(list(alone))
        assert list(sampler) == [*alone, 5]
        assert sorted(alone) == [0, 1, 2, 3, 4]
    assert len(sampler) == 6
    assert orders[0] != orders[1] or orders[1] != orders[2]
    assert list(eval_sampler(padded, args)) == [3, 1, 2, 0, 4, 5, 5, 5]  # longest first
    assert list(eval_sampler(ExampleDataset(rows), args)) == [3, 1, 2, 0, 4]
    args.dataloader_drop_last = True
    assert len(train_sampler(padded, args, usual=list)) == 5
    args.train_sampling_strategy = "sequential"
    assert list(eval_sampler(padded, args)) == [0, 1, 2, 3, 4]
    assert eval_sampler(iter(rows), args) is None
