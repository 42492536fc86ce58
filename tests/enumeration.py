"""Exact enumeration of what the real loop gives, on a target of three tokens.

The target is a table over the last two tokens. Nothing is sampled: a run of the loop follows one
list of decisions, each with its exact probability, and all lists are run through.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from types import SimpleNamespace
from typing import Any, TypeVar

import jaxtyping
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import (
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)
from typing_extensions import override

from speclm.acceptance import AcceptanceRule, ExactRule
from speclm.drafting.interface import Proposer
from speclm.generation.loop import generate_tokens
from speclm.generation.request import Setup
from speclm.stats import SpeculationStats
from speclm.target import TargetFeatures, TargetView
from speclm.tree.topology import TreeTopology

T = TypeVar("T")

VOCAB = 3
LENGTH = 3
PROMPT = [[1, 2]]
EXACT = 1e-12  # sums of some thousand products in double precision
WRONG = 1e-2
TABLE = 2 * torch.randn(VOCAB, VOCAB, VOCAB, generator=torch.Generator().manual_seed(4))
WARPERS = {
    "plain": [],
    "temperature": [TemperatureLogitsWarper(0.6)],
    "top-k": [TemperatureLogitsWarper(1.4), TopKLogitsWarper(2)],
}


class Decisions:
    """A list of decisions, made up while a run asks for them, and its probability."""

    def __init__(self) -> None:
        self._taken: list[int] = []
        self._options: list[int] = []
        self._at = 0
        self.weight = 1.0

    def take(self, num_options: int) -> int:
        if self._at == len(self._taken):
            self._taken.append(0)
            self._options.append(num_options)
        self._at += 1
        return self._taken[self._at - 1]

    def draw(self, distribution: Sequence[float]) -> int:
        """Decide between the options that the distribution has."""
        options = [index for index, probability in enumerate(distribution) if probability > 0]
        choice = options[self.take(len(options))]
        self.weight *= distribution[choice]
        return choice

    def advance(self) -> bool:
        """Turn to the next list; False after the last one."""
        assert self._at == len(self._taken), "a run is a function of its decisions"
        while self._taken and self._taken[-1] + 1 == self._options[-1]:
            self._taken.pop()
            self._options.pop()
        if self._taken:
            self._taken[-1] += 1
        self._at, self.weight = 0, 1.0
        return bool(self._taken)


def all_runs(run: Callable[[Decisions], T]) -> Iterator[tuple[T, float]]:
    """Yield what each list of decisions leads to, and its probability.

    Only the first run has its shapes checked, which takes most of the time of one.
    """
    decisions = Decisions()
    yield run(decisions), decisions.weight
    before = jaxtyping.config.jaxtyping_disable
    while decisions.advance():
        jaxtyping.config.update("jaxtyping_disable", True)
        try:
            outcome = run(decisions)
        finally:
            jaxtyping.config.update("jaxtyping_disable", before)
        yield outcome, decisions.weight


class TableTarget(TargetView):
    """Keeps tokens in place of keys and values, in a real cache, and looks logits up."""

    def __init__(self, table: Tensor = TABLE) -> None:
        self.features = None
        self._table = table
        self.model = SimpleNamespace(config=SimpleNamespace(name_or_path="table"))
        self._text_config = SimpleNamespace(num_hidden_layers=1, max_position_embeddings=64)

    @property
    @override
    def vocab_size(self) -> int:
        return VOCAB

    @property
    @override
    def rotary_switch(self) -> None:
        return None

    @override
    def prefill(self, tokens: Tensor, cache: Any, **_: object) -> Tensor:
        self._write(tokens, cache)
        cache.commit_prompt()
        return self._table[tokens[:, -2], tokens[:, -1]]

    @override
    def forward_tree(
        self,
        tokens: Tensor,
        topology: TreeTopology,
        cache: Any,
        *,
        prompt: Tensor | None = None,
        **_: object,
    ) -> Tensor:
        fed = tokens if prompt is None else torch.cat([prompt, tokens], dim=1)
        cache.reserve(fed.shape[1])
        stored = self._write(fed, cache)[0]
        cache.append(fed.shape[1])
        if prompt is not None:
            cache.split(prompt.shape[1], num_pending=tokens.shape[1])
        committed = stored[: cache.host_lengths[0]]
        nodes = stored[cache.tree_start :]
        contexts = [[*committed, *nodes[seen].tolist()] for seen in topology.ancestor_mask[0]]
        return torch.stack([self._table[int(path[-2]), int(path[-1])] for path in contexts])[None]

    @override
    @contextmanager
    def decoding(self, features: TargetFeatures = TargetFeatures.NONE) -> Iterator[None]:
        yield

    @override
    @contextmanager
    def steps(self) -> Iterator[None]:
        yield

    def _write(self, tokens: Tensor, cache: Any) -> Tensor:
        stored = tokens[:, None, :, None].float()
        return cache.layers[0].update(stored, stored.clone())[0][:, 0, :, 0]


def run_loop(
    proposer: Proposer | None,
    warpers: Sequence[Any],
    *,
    greedy: bool = False,
    rule: AcceptanceRule | None = None,
    table: Tensor = TABLE,
    stats: SpeculationStats | None = None,
) -> Tensor:
    config = GenerationConfig(max_length=len(PROMPT[0]) + LENGTH, do_sample=not greedy)
    config._pad_token_tensor = None
    config._bos_token_tensor = None
    return generate_tokens(
        torch.tensor(PROMPT),
        Setup(TableTarget(table), proposer, rule=rule or ExactRule()),
        stats or SpeculationStats(),
        logits_processor=LogitsProcessorList(warpers),
        stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(config.max_length)]),
        generation_config=config,
    ).sequences


def process(warpers: Sequence[Any], scores: Tensor) -> Tensor:
    rows = scores[None]
    for warper in warpers:
        rows = warper(None, rows)
    return rows[0].double().softmax(-1)


def target_probs(
    warpers: Sequence[Any] = (), *, table: Tensor = TABLE
) -> dict[tuple[int, ...], float]:
    """Return the product of the table's distributions over all outputs."""
    distribution = {}
    for output in product(range(VOCAB), repeat=LENGTH):
        path, weight = list(PROMPT[0]), 1.0
        for token in output:
            weight *= float(process(warpers, table[path[-2], path[-1]])[token])
            path.append(token)
        distribution[output] = weight
    return distribution


def distance(found: dict[tuple[int, ...], float], expected: dict[tuple[int, ...], float]) -> float:
    assert set(found) <= set(expected)
    return max(abs(found.get(output, 0.0) - weight) for output, weight in expected.items())
