"""The training set: tokenized conversations, their tokens, their order and their batches."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerBase

from speclm.config import require_count
from speclm.errors import DataError, OptionError
from speclm.training.conversations import Conversation, Example, read_conversations
from speclm.training.loss_masks import is_trainable, mark_turns

_log = logging.getLogger("speclm")

EvalDataset = Dataset[Example] | dict[str, Dataset[Example]]
"""Examples to evaluate on, or several sets of them by name."""

_POOL_BATCHES = 50  # enough for batches of similar lengths, few enough that epochs differ
_PROGRESS_DELAY = 3.0  # seconds until reading shows its progress


@dataclass(frozen=True, slots=True)
class Dropped:
    """Examples that were left out for one reason.

    Args:
        reason: The reason in a few words.
        count: Number of examples.
        first: What is wrong with the first of them, with its file and line.
    """

    reason: str
    count: int
    first: str

    def __str__(self) -> str:
        """Return the line that is logged."""
        noun = "example" if self.count == 1 else "examples"
        return f"{self.count} {noun} dropped, {self.reason}; first {self.first}"


class ExampleDataset(Dataset[Example]):
    """Tokenized conversations, all in memory; `dropped` says what was left out."""

    def __init__(self, examples: Sequence[Example], *, dropped: Sequence[Dropped] = ()) -> None:
        self._examples = list(examples)
        self.dropped = tuple(dropped)
        _require_examples(len(self._examples))

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]

    def __iter__(self) -> Iterator[Example]:
        return iter(self._examples)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each example."""
        return [len(example["input_ids"]) for example in self._examples]


def load_examples(
    data: str | Path | Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int | None = None,
    seed: int = 0,
    max_length: int | None = None,
    is_strict: bool = False,
) -> ExampleDataset:
    """Read and tokenize conversations; show the progress at a terminal after three seconds.

    A conversation, or an assistant turn of it, that heads cannot learn from is dropped. A log line
    for each reason says how many there are and what is wrong with the first.

    Args:
        data: File of JSON lines, see `read_conversations`, or the conversations themselves.
        tokenizer: A fast tokenizer with a chat template.
        limit: Conversations drawn from a file; None for all.
        seed: Decides which are drawn.
        max_length: Tokens to keep of each; None for all.
        is_strict: Whether the first turn that would be dropped is an error instead.

    Raises:
        DataError: If the file cannot be read, no example is left, or, with `is_strict`, one would
            be dropped; the message names the row.
        OptionError: If an option is out of range or the tokenizer cannot be used.
    """
    if max_length is not None and max_length < 1:
        raise OptionError(f"max_length is {max_length!r}, expected at least 1; pass None for all")
    if isinstance(data, (str, Path)):
        data = read_conversations(data, limit=limit, seed=seed)
    shown = tqdm(data, desc="tokenizing", delay=_PROGRESS_DELAY, disable=None, leave=False)
    examples: list[Example] = []
    dropped: dict[str, Dropped] = {}
    for conversation in shown:
        marked, unusable = mark_turns(conversation, tokenizer, max_length=max_length)
        if unusable and is_strict:
            raise unusable[0]
        examples += marked
        for error in unusable:
            known = dropped.setdefault(error.reason, Dropped(error.reason, 0, str(error)))
            dropped[error.reason] = replace(known, count=known.count + 1)
    if dropped and not examples:
        raise DataError("no example can be trained on: " + ". ".join(map(str, dropped.values())))
    for part in dropped.values():
        _log.warning("%s", part)
    return ExampleDataset(examples, dropped=tuple(dropped.values()))


def require_trainable(dataset: Any, *, max_length: int | None) -> None:
    """Check that heads can learn from every example.

    Args:
        dataset: A dataset of examples with a length; all of them are read.
        max_length: Maximum tokens of an example; None for any number.

    Raises:
        DataError: If there are none, or one has no token to learn or too many tokens; the message
            gives its index.
    """
    _require_examples(len(dataset))
    for index in range(len(dataset)):
        example: Example = dataset[index]
        length = len(example["input_ids"])
        if not is_trainable(example["loss_mask"]):
            raise DataError(
                f"example {index}: the loss mask of {length} tokens is all zero after the second, "
                "expected assistant tokens to learn; drop the example, or mark what the assistant "
                "wrote"
            )
        if max_length is not None and length > max_length:
            raise DataError(
                f"example {index} has {length} tokens, expected at most {max_length}, the "
                "positions that base and heads were built for; cut examples with "
                f"max_length={max_length}, or drop it"
            )


def _require_examples(count: int) -> None:
    if not count:
        raise DataError("no examples to train on, expected at least one conversation; add some")


def count_tokens(dataset: Iterable[Example], *, vocab_size: int) -> Int[Tensor, " vocab"]:
    """Count each token among those that the assistant wrote.

    Args:
        dataset: The training set.
        vocab_size: Width of the target's logits.

    Raises:
        OptionError: If an example has a token outside the vocabulary.
    """
    counts = torch.zeros(vocab_size, dtype=torch.int64, device="cpu")
    for index, example in enumerate(dataset):
        tokens = torch.tensor(example["input_ids"], dtype=torch.long, device="cpu")
        counted = tokens[torch.tensor(example["loss_mask"], dtype=torch.bool, device="cpu")]
        if len(counted) and int(counted.max()) >= vocab_size:
            raise OptionError(
                f"example {index} has token {int(counted.max())}, expected ids below "
                f"{vocab_size}, the target's vocabulary; tokenize with the target's own tokenizer"
            )
        counts += torch.bincount(counted, minlength=vocab_size)
    return counts


def choose_columns(counts: Int[Tensor, " vocab"], size: int) -> Int[Tensor, " draft_vocab"]:
    """Return the `size` most frequent tokens in the order of their ids.

    If fewer tokens occur, those with the lowest ids are added.

    Args:
        counts: Result of `count_tokens`.
        size: Number of tokens to choose.

    Raises:
        OptionError: If `size` exceeds the vocabulary.

    Example:
        >>> choose_columns(torch.tensor([0, 5, 0, 9, 1]), 3).tolist()
        [1, 3, 4]
    """
    require_count("draft_vocab_size", size, low=1, high=len(counts))
    order = counts.argsort(descending=True, stable=True)
    return order[:size].sort().values


def collate_examples(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Pad examples on the right.

    The attention mask comes from the lengths: tokens that equal the padding token, as
    end-of-sequence tokens often do, are attended to like any other.

    Returns:
        ``input_ids`` padded with 0, ``attention_mask``, and ``loss_mask`` (bool, padded with
        False), each ``[batch, seq]``, on the CPU.
    """
    lengths = [len(example["input_ids"]) for example in examples]
    shape = (len(examples), max(lengths))
    batch = {
        "input_ids": torch.zeros(shape, dtype=torch.long, device="cpu"),
        "attention_mask": torch.zeros(shape, dtype=torch.long, device="cpu"),
        "loss_mask": torch.zeros(shape, dtype=torch.bool, device="cpu"),
    }
    for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        tokens, mask = example["input_ids"], example["loss_mask"]
        batch["input_ids"][row, :length] = torch.tensor(tokens, dtype=torch.long, device="cpu")
        batch["loss_mask"][row, :length] = torch.tensor(mask, dtype=torch.bool, device="cpu")
        batch["attention_mask"][row, :length] = 1
    return batch


class LengthSampler(Sampler[int]):
    """Draws examples so that those of one batch have similar lengths.

    Random pools of examples are sorted by length and cut into batches, which are shuffled. The
    order depends only on seed and epoch, so a resumed training sees the same examples as an
    uninterrupted one.
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int, seed: int = 0) -> None:
        if batch_size < 1:
            raise OptionError(f"batch_size is {batch_size!r}, expected at least 1; raise it")
        self._lengths = list(lengths)
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; Accelerate calls this before each."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        shuffled = torch.randperm(len(self._lengths), generator=generator, device="cpu").tolist()
        size, pool_size = self._batch_size, self._batch_size * _POOL_BATCHES
        batches = []
        for start in range(0, len(shuffled), pool_size):
            pool = sorted(shuffled[start : start + pool_size], key=self._lengths.__getitem__)
            batches += [pool[i : i + size] for i in range(0, len(pool), size)]
        # A short batch anywhere but at the end would shift all later batches.
        full = [batch for batch in batches if len(batch) == size]
        order = torch.randperm(len(full), generator=generator, device="cpu").tolist()
        for batch in [*(full[i] for i in order), *(b for b in batches if len(b) < size)]:
            yield from batch
