"""Ways to generate, all called alike: regular generation, methods of ours and of Transformers."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from speclm.bench.calls import Call
from speclm.drafting.interface import Proposer
from speclm.model import SpecModel
from speclm.model.trees import Tree
from speclm.stats import SpeculationStats


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one call.

    Args:
        tokens: New tokens of each row, up to and with the first end-of-sequence token.
        seconds: Wall time of the call, prefill included.
        stats: Counters of speculation; None for a method without counters.
    """

    tokens: list[list[int]]
    seconds: float
    stats: SpeculationStats | None

    @property
    def num_tokens(self) -> int:
        """Number of new tokens of all rows."""
        return sum(map(len, self.tokens))

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows per second."""
        return self.num_tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Decoder:
    """A way to generate.

    Args:
        name: Name in tables and records.
        generate: Returns prompts and new tokens.
        stats: Returns the counters of the last call.
        promises_identity: Whether the outputs have to be those of regular generation.
        max_batch: Largest batch that it can generate; None for any.
    """

    name: str
    generate: Callable[[Call], Tensor]
    stats: Callable[[], SpeculationStats | None]
    promises_identity: bool
    max_batch: int | None = None

    def can_run(self, batch: int) -> bool:
        """Return whether it can generate a batch of that size."""
        return self.max_batch is None or batch <= self.max_batch

    def run(self, call: Call) -> Outcome:
        """Seed, generate and measure the time."""
        torch.manual_seed(call.seed)
        _synchronize(call.input_ids)
        start = perf_counter()
        output = self.generate(call)
        _synchronize(call.input_ids)
        seconds = perf_counter() - start
        new = output[:, call.input_ids.shape[1] :].tolist()
        tokens = [until_end(row, call.eos_token_ids) for row in new]
        return Outcome(tokens=tokens, seconds=seconds, stats=self.stats())


def until_end(tokens: list[int], eos_token_ids: frozenset[int]) -> list[int]:
    """Return the tokens up to and with the first end-of-sequence token."""
    for index, token in enumerate(tokens):
        if token in eos_token_ids:
            return tokens[: index + 1]
    return tokens


def plain_decoder(base: PreTrainedModel) -> Decoder:
    """Return regular generation: ``base.generate``."""
    return Decoder("plain", _generate_with(base), _no_stats, promises_identity=True)


def prompt_lookup_decoder(base: PreTrainedModel, *, num_tokens: int = 10) -> Decoder:
    """Return Transformers' prompt lookup.

    Args:
        base: The model.
        num_tokens: Draft tokens per round; 10 is the value in Transformers' documentation.
    """
    return Decoder(
        name="prompt_lookup",
        generate=_generate_with(base, prompt_lookup_num_tokens=num_tokens),
        stats=_no_stats,
        promises_identity=False,  # when sampling, it draws other tokens
        max_batch=1,
    )


def assisted_decoder(base: PreTrainedModel, assistant: PreTrainedModel) -> Decoder:
    """Return Transformers' assisted generation.

    Transformers adapts the number of draft tokens in the assistant's generation config, which is
    restored after each call, so that every call starts alike.
    """
    generate = _generate_with(base, assistant_model=assistant)

    def generate_and_restore(call: Call) -> Tensor:
        before = assistant.generation_config
        assistant.generation_config = copy.deepcopy(before)
        try:
            return generate(call)
        finally:
            assistant.generation_config = before

    return Decoder(
        "assisted", generate_and_restore, _no_stats, promises_identity=False, max_batch=1
    )


def speculative_decoder(
    name: str, base: PreTrainedModel, heads: Proposer | None, *, tree: Tree | None = None
) -> Decoder:
    """Return `SpecModel` with a proposer.

    Args:
        name: Name in tables and records.
        base: The model.
        heads: The proposer; None for one token per round.
        tree: Passed to ``generate``; None for the proposer's own settings.
    """
    model = SpecModel(base, heads)

    def generate(call: Call) -> Tensor:
        output = model.generate(**call.arguments, tree=tree)
        assert isinstance(output, Tensor)
        return output

    return Decoder(name, generate, lambda: model.last_speculation, promises_identity=True)


def _generate_with(base: PreTrainedModel, **options: Any) -> Callable[[Call], Tensor]:
    def generate(call: Call) -> Tensor:
        output = base.generate(**call.arguments, **options)  # type: ignore[operator]  # mixin
        assert isinstance(output, Tensor)
        return output

    return generate


def _no_stats() -> SpeculationStats | None:
    return None


def _synchronize(tokens: Tensor) -> None:
    if tokens.device.type != "cpu":
        torch.accelerator.synchronize(tokens.device)
