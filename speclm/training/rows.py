"""The training set: tokenized conversations, and how they are put into batches."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from speclm.errors import DataError, OptionError
from speclm.training.assistant_tokens import TokenizedRow, tokenize_conversation
from speclm.training.conversations import Conversation, read_conversations

Item = dict[str, list[int]]
"""``input_ids`` and ``loss_mask`` of one row, equally long."""

EvalRows = Dataset[Item] | dict[str, Dataset[Item]]
"""Rows to evaluate on, or several sets of them by name."""


class TrainingRows(Dataset[Item]):
    """Tokenized conversations, all in memory."""

    def __init__(self, rows: Iterable[TokenizedRow]) -> None:
        """Hold rows.

        Raises:
            DataError: If there are none.
        """
        self._rows = list(rows)
        if not self._rows:
            raise DataError("no rows to train on, expected at least one conversation; add some")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Item:
        row = self._rows[index]
        return {"input_ids": row.tokens, "loss_mask": row.loss_mask}

    def __iter__(self) -> Iterator[Item]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(row.tokens) for row in self._rows]

    @property
    def num_assistant_tokens(self) -> int:
        """Tokens that the loss counts, over all rows."""
        return sum(sum(row.loss_mask) for row in self._rows)


def load_rows(
    data: str | Path | Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int | None = None,
    seed: int = 0,
    max_length: int | None = None,
) -> TrainingRows:
    """Read and tokenize conversations.

    Args:
        data: File of JSON lines, see `read_conversations`, or the conversations themselves.
        tokenizer: A fast tokenizer with a chat template.
        limit: Conversations drawn from a file; None for all.
        seed: Decides which are drawn.
        max_length: Tokens to keep of each; None for all.

    Raises:
        DataError: If the data or one of its rows cannot be trained on; the message names it.
        OptionError: If an option or the tokenizer is of no use.
    """
    if max_length is not None and max_length < 1:
        raise OptionError(f"max_length is {max_length!r}, expected at least 1; pass None for all")
    if isinstance(data, (str, Path)):
        data = read_conversations(data, limit=limit, seed=seed)
    return TrainingRows(
        tokenize_conversation(conversation, tokenizer, max_length=max_length)
        for conversation in data
    )


def require_trainable(rows: Any, *, max_length: int | None) -> None:
    """Check that something can be learnt from every row.

    Args:
        rows: A data set of items, with a length; all of them are read.
        max_length: Most tokens of a row; None for any number.

    Raises:
        DataError: If there are none, or a row has nothing to guess or too many tokens; the message
            says which.
    """
    if not len(rows):
        raise DataError("no rows to train on, expected at least one conversation; add some")
    for index in range(len(rows)):
        row: Item = rows[index]
        length = len(row["input_ids"])
        # Heads guess the second token after a hidden state and later ones, so two come before it.
        if not any(row["loss_mask"][2:]):
            raise DataError(
                f"row {index}: the loss mask of {length} tokens is all zero after the second, "
                "expected assistant tokens to guess; drop the row, or mark what the assistant wrote"
            )
        if max_length is not None and length > max_length:
            raise DataError(
                f"row {index} has {length} tokens, expected at most {max_length}, the positions "
                f"that base and heads were built for; cut rows with max_length={max_length}, or "
                "drop it"
            )


def collate_rows(items: Sequence[Item]) -> dict[str, Tensor]:
    """Pad rows on the right.

    The attention mask comes from the lengths: a token that equals the padding, as an
    end-of-sequence token often does, is attended to like any other.

    Returns:
        ``input_ids`` padded with 0, ``attention_mask``, and ``loss_mask`` (bool, padded with
        False), each ``[batch, seq]``, on the CPU.
    """
    lengths = torch.tensor(
        [len(item["input_ids"]) for item in items], dtype=torch.long, device="cpu"
    )
    longest = int(lengths.max())
    tokens = torch.zeros(len(items), longest, dtype=torch.long, device="cpu")
    loss_mask = torch.zeros(len(items), longest, dtype=torch.bool, device="cpu")
    for row, item in enumerate(items):
        length = len(item["input_ids"])
        tokens[row, :length] = torch.tensor(item["input_ids"], dtype=torch.long, device="cpu")
        loss_mask[row, :length] = torch.tensor(item["loss_mask"], dtype=torch.bool, device="cpu")
    attention_mask = (torch.arange(longest, device="cpu") < lengths[:, None]).long()
    return {"input_ids": tokens, "attention_mask": attention_mask, "loss_mask": loss_mask}
