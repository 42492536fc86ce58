"""What is compared: ways to generate, all called alike."""

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
from speclm.model.call import Tree
from speclm.stats import SpeculationStats


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one call gave.

    Args:
        tokens: New tokens of each row, up to and with the first end-of-sequence token.
        seconds: Wall time of the call, prefill included.
        stats: Counters, where the method has any.
    """

    tokens: list[list[int]]
    seconds: float
    stats: SpeculationStats | None

    @property
    def num_tokens(self) -> int:
        """New tokens of all rows."""
        return sum(map(len, self.tokens))

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows a second."""
        return self.num_tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Decoder:
    """A way to generate.

    Args:
        name: For tables and records.
        generate: Returns prompts and new tokens.
        stats: Returns the counters of the last call.
        promises_identity: Whether the outputs have to be those of regular generation.
        max_batch: Most rows that it can generate at once; None for any number.
    """

    name: str
    generate: Callable[[Call], Tensor]
    stats: Callable[[], SpeculationStats | None]
    promises_identity: bool
    max_batch: int | None = None

    def can_run(self, batch: int) -> bool:
        """Return whether the method can generate that many rows at once."""
        return self.max_batch is None or batch <= self.max_batch

    def run(self, call: Call) -> Outcome:
        """Seed, generate and take the time."""
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
    """Return the method of ``base.generate``."""
    return Decoder("plain", _generate_with(base), _no_stats, promises_identity=True)


def prompt_lookup_decoder(base: PreTrainedModel, *, num_tokens: int = 10) -> Decoder:
    """Return the method of Transformers' prompt lookup.

    Args:
        base: The model.
        num_tokens: Most tokens drafted a round; 10 is the value of Transformers' documentation.
    """
    return Decoder(
        name="prompt_lookup",
        generate=_generate_with(base, prompt_lookup_num_tokens=num_tokens),
        stats=_no_stats,
        promises_identity=False,  # when sampling, it draws otherwise than regular generation
        max_batch=1,
    )


def assisted_decoder(base: PreTrainedModel, assistant: PreTrainedModel) -> Decoder:
    """Return the method of Transformers' assisted generation, every call as if it were the first.

    Args:
        base: The model.
        assistant: The draft model. Transformers writes the number of tokens to draft into its
            generation config; that is undone after each call.
    """
    generate = _generate_with(base, assistant_model=assistant)

    def generate_afresh(call: Call) -> Tensor:
        before = assistant.generation_config
        assistant.generation_config = copy.deepcopy(before)
        try:
            return generate(call)
        finally:
            assistant.generation_config = before

    return Decoder("assisted", generate_afresh, _no_stats, promises_identity=False, max_batch=1)


def speculative_decoder(
    name: str, base: PreTrainedModel, heads: Proposer | None, *, tree: Tree | None = None
) -> Decoder:
    """Return the method of `SpecModel` with a proposer, or with none.

    Args:
        name: For tables and records.
        base: The model.
        heads: What guesses.
        tree: What it is told to draft; None for what it does by itself.
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
