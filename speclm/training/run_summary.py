"""What a training says before its first step: what it trains, on what, and with which memory."""

import logging
import time
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from speclm.training.conversations import Example
from speclm.training.dataset import collate_examples
from speclm.training.feature_cache import STATES
from speclm.training.partitions import num_elements
from speclm.training.training_model import TrainingModel

_log = logging.getLogger("speclm")

MIN_AGREEMENT = 0.7
"""Share of tokens below which the base did not write the data.

Texts that a model sampled at temperature 1 agree with its most likely tokens at four of five
positions or more. At 0.7 a text follows the base through three draft tokens in a third of all
rounds at most, however well heads draft.
"""

MAX_EXAMPLES = 64
"""Maximum examples of which the agreement is measured."""

_MAX_SECONDS = 20.0
_GIGABYTE, _MEGABYTE = 1e9, 1e6


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What is trained, on what, and the memory that is known in advance.

    Args:
        num_frozen: Parameters of the base and of the heads that stay as they are.
        num_trained: Parameters that are trained.
        num_examples: Examples; None for a stream.
        num_tokens: Tokens of the examples that heads learn to draft; None for a stream.
        num_steps: Optimizer steps.
        weight_bytes: Size of all parameters.
        gradient_bytes: Size of their gradients.
        optimizer_bytes: Size of the optimizer's state; None if it is unknown for this optimizer.
    """

    num_frozen: int
    num_trained: int
    num_examples: int | None
    num_tokens: int | None
    num_steps: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int | None

    def lines(self) -> list[str]:
        """Return the summary as text."""
        examples = "a stream of examples"
        if self.num_examples is not None:
            examples = f"{self.num_examples:,} examples, {self.num_tokens:,} tokens that count"
        optimizer, known = "unknown", self.weight_bytes + self.gradient_bytes
        if self.optimizer_bytes is not None:
            optimizer, known = size_text(self.optimizer_bytes), known + self.optimizer_bytes
        memory = (
            f"memory: {size_text(known)} (weights {size_text(self.weight_bytes)}, "
            f"gradients {size_text(self.gradient_bytes)}, optimizer {optimizer}), plus hidden "
            "states and logits"
        )
        return [
            f"trained: {self.num_trained:,} parameters; frozen: {self.num_frozen:,}",
            f"data: {examples}; {self.num_steps:,} optimizer steps",
            memory,
        ]


def summarize(
    model: TrainingModel, args: TrainingArguments, *, dataset: Any, num_steps: int
) -> RunSummary:
    """Return the summary of a training.

    Args:
        model: Heads and base.
        args: Its arguments; the optimizer decides the size of the state.
        dataset: Examples; those of a dataset with a length are all read.
        num_steps: Optimizer steps.
    """
    base: Any = model.view.model
    optimizer: Any = args.optim  # a string only before it is checked
    in_base = {id(parameter) for parameter in base.parameters()}  # an adapter is in both
    own = [parameter for parameter in model.parameters() if id(parameter) not in in_base]
    num_own = sum(num_elements(parameter) for parameter in own)
    trained = [p for p in (*own, *base.parameters()) if p.requires_grad]
    num_trained = sum(num_elements(parameter) for parameter in trained)
    trained_bytes = _bytes(trained)
    num_examples = len(dataset) if isinstance(dataset, Sized) else None
    num_tokens = None
    if num_examples is not None:
        num_tokens = sum(sum(dataset[index]["loss_mask"]) for index in range(num_examples))
    return RunSummary(
        num_frozen=base.num_parameters() + num_own - num_trained,
        num_trained=num_trained,
        num_examples=num_examples,
        num_tokens=num_tokens,
        num_steps=num_steps,
        weight_bytes=base.get_memory_footprint() + _bytes(own),
        gradient_bytes=trained_bytes,
        optimizer_bytes=_optimizer_bytes(optimizer.value, num_trained, trained_bytes),
    )


def _bytes(parameters: Any) -> int:
    return sum(num_elements(parameter) * parameter.element_size() for parameter in parameters)


def _optimizer_bytes(name: str, num_trained: int, trained_bytes: int) -> int | None:
    """Return the size of the state of the optimizers that keep two moments of each gradient."""
    if not name.startswith("adamw"):
        return None
    return 2 * num_trained if "8bit" in name else 2 * trained_bytes


def size_text(num_bytes: int) -> str:
    """Return a size in megabytes or gigabytes for messages."""
    if num_bytes >= _GIGABYTE:
        return f"{num_bytes / _GIGABYTE:.2f} GB"
    return f"{num_bytes / _MEGABYTE:.1f} MB"


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far data agrees with the base.

    Args:
        share: Share of the assistant's tokens that are the base's most likely ones.
        num_examples: Examples of which it was measured.
    """

    share: float
    num_examples: int

    def __str__(self) -> str:
        """Return the line that is announced."""
        noun = "example" if self.num_examples == 1 else "examples"
        return (
            f"the base itself would write {self.share:.0%} of the answers' tokens "
            f"({self.num_examples} {noun})"
        )


@torch.no_grad()
def measure_agreement(
    model: TrainingModel,
    dataset: Any,
    *,
    batch_size: int,
    collate: Callable[[Sequence[Example]], dict[str, Tensor]] = collate_examples,
    clock: Callable[[], float] = time.monotonic,
) -> Agreement | None:
    """Return how far data agrees with the base.

    Args:
        model: Heads and base.
        dataset: Examples; `MAX_EXAMPLES` of them are read, evenly spread over the dataset.
        batch_size: Examples of a forward.
        collate: Makes a batch, with cached features or without.
        clock: Returns seconds; after twenty of them no further forward is run.

    Returns:
        None for a stream, or if no token counts.
    """
    size = len(dataset) if isinstance(dataset, Sized) else 0
    num_sampled = min(size, MAX_EXAMPLES)
    chosen = [size * index // num_sampled for index in range(num_sampled)]
    num_agreeing = num_known = num_read = 0
    until = clock() + _MAX_SECONDS
    for start in range(0, num_sampled, batch_size):
        examples: list[Example] = [dataset[index] for index in chosen[start : start + batch_size]]
        batch = collate(examples)
        with model.given_states(batch.pop(STATES, None)):
            _, last = model.read_base(batch["input_ids"], batch["attention_mask"], (-1,))
        base_tokens = model.base_tokens(last, batch["loss_mask"])
        is_known = base_tokens >= 0
        num_agreeing += int((is_known & (base_tokens == batch["input_ids"])).sum())
        num_known += int(is_known.sum())
        num_read += len(examples)
        if clock() > until:
            break
    return Agreement(num_agreeing / num_known, num_read) if num_known else None


def announce_agreement(agreement: Agreement | None, announce: Callable[[str], None]) -> None:
    """Say how far the data agrees with the base; log a warning if it does not."""
    if agreement is None:
        return
    if agreement.share >= MIN_AGREEMENT:
        announce(str(agreement))
        return
    _log.warning(
        "%s, expected %.0f%% or more: heads learn to draft what the base writes, and these answers "
        "are somebody else's, so decoding will accept few draft tokens; let the base answer the "
        "prompts with: speclm data distill",
        agreement,
        100 * MIN_AGREEMENT,
    )
