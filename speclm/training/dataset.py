"""The training set: tokenized conversations, their tokens, their order and their batches."""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.data_loader import SeedableRandomSampler
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset, RandomSampler, Sampler
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerBase, TrainingArguments

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
    eos_token_ids: Collection[int] = (),
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
        eos_token_ids: Tokens at which the base stops besides the tokenizer's own; see
            `tokenize_conversation`.
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
    _warn_of_lost_reasoning(data, tokenizer)
    shown = tqdm(data, desc="tokenizing", delay=_PROGRESS_DELAY, disable=None, leave=False)
    examples: list[Example] = []
    dropped: dict[str, Dropped] = {}
    for conversation in shown:
        marked, unusable = mark_turns(
            conversation, tokenizer, max_length=max_length, eos_token_ids=eos_token_ids
        )
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


def _warn_of_lost_reasoning(
    data: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Log a warning if the chat template writes none of the reasoning of a conversation.

    The first conversation with reasoning in its last answer decides: templates may leave out that
    of earlier answers on purpose.
    """

    def is_reasoned(conversation: Conversation) -> bool:
        return bool(conversation.messages[-1].get("reasoning_content"))

    found = next(filter(is_reasoned, data), None)
    if found is None:
        return
    last = {key: text for key, text in found.messages[-1].items() if key != "reasoning_content"}
    last.setdefault("content", "")
    render: Any = tokenizer.apply_chat_template
    options = {"tools": found.tools, "tokenize": False, **(found.template_options or {})}
    try:
        without = render([*found.messages[:-1], last], **options)
        is_lost = render(found.messages, **options) == without
    except Exception:  # noqa: BLE001 - a template is a program; its refusal is reported per row
        return
    if is_lost:
        _log.warning(
            "%s: the chat template leaves out the reasoning_content, so heads do not learn to "
            "draft it; use the template of a model that thinks, or put the reasoning into content",
            found.where,
        )


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


class PaddedExamples(Dataset[Example]):
    """Examples, followed by padding from which nothing is learned.

    Processes of a training need equally many rows. Without padding, Accelerate repeats some, which
    then count twice.
    """

    def __init__(self, dataset: Any) -> None:
        """Wrap a dataset, whose length stays.

        Args:
            dataset: Examples with a length.
        """
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Example:
        if index < len(self._dataset):
            example: Example = self._dataset[index]
            return example
        tokens = self._dataset[0]["input_ids"]  # cached features may have no other text
        return Example(input_ids=tokens, loss_mask=[0] * len(tokens))


class PaddedSampler(Sampler[int]):
    """Draws the rows of another sampler, and then padding up to a multiple of the batch size."""

    def __init__(self, rows: Any, *, num_rows: int, batch_size: int) -> None:
        """Wrap a sampler.

        Args:
            rows: Yields each row once.
            num_rows: Number of rows; this index stands for padding, see `PaddedExamples`.
            batch_size: Rows of a batch of all processes; 1 for no padding.
        """
        self._rows, self._num_rows, self._batch_size = rows, num_rows, batch_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; Accelerate calls this before each."""
        if hasattr(self._rows, "set_epoch"):
            self._rows.set_epoch(epoch)

    def __len__(self) -> int:
        return -(-self._num_rows // self._batch_size) * self._batch_size

    def __iter__(self) -> Iterator[int]:
        yield from self._rows
        yield from [self._num_rows] * (len(self) - self._num_rows)


def train_sampler(
    dataset: Any, args: TrainingArguments, *, usual: Callable[[Any], Any]
) -> Sampler[int] | None:
    """Return the order in which a training reads its rows.

    Args:
        dataset: Examples, in `PaddedExamples` if several processes read them.
        args: Arguments of the training.
        usual: Returns the sampler of `Trainer`.
    """
    batch_size = args.train_batch_size * args.world_size
    # Transformers' own sampler draws an epoch from the global generator, whose state differs in a
    # resumed training.
    if args.train_sampling_strategy == "group_by_length":
        seed = args.seed if args.data_seed is None else args.data_seed
        sampler: Any = LengthSampler(_lengths(dataset), batch_size=batch_size, seed=seed)
    else:
        sampler = usual(dataset)
        if type(sampler) is RandomSampler and args.world_size > 1:
            # Accelerate would make this one, which draws the same rows in every process.
            sampler = SeedableRandomSampler(dataset, data_seed=args.data_seed)
    if isinstance(dataset, PaddedExamples) and not args.dataloader_drop_last:
        return PaddedSampler(sampler, num_rows=len(dataset), batch_size=batch_size)
    return cast("Sampler[int] | None", sampler)


def eval_sampler(dataset: Any, args: TrainingArguments) -> Sampler[int] | None:
    """Return the order in which an evaluation reads its rows, the same for any number of processes.

    Args:
        dataset: Examples, in `PaddedExamples` if several processes read them.
        args: Arguments of the training.
    """
    if not isinstance(dataset, Sized):
        return None
    rows: Any = range(len(dataset))
    if args.train_sampling_strategy == "group_by_length":
        rows = sorted(rows, key=_lengths(dataset).__getitem__, reverse=True)
    is_padded = isinstance(dataset, PaddedExamples) and not args.dataloader_drop_last
    batch_size = args.eval_batch_size * args.world_size if is_padded else 1
    return PaddedSampler(rows, num_rows=len(dataset), batch_size=batch_size)


def _lengths(dataset: Any) -> list[int]:
    if isinstance(dataset, ExampleDataset):
        return dataset.lengths
    return [len(dataset[index]["input_ids"]) for index in range(len(dataset))]
