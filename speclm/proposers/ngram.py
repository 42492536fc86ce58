"""A proposer without a model: what followed the same words before may follow again."""

from dataclasses import dataclass, replace
from functools import lru_cache
from heapq import heappop, heappush

import torch
from jaxtyping import Int
from torch import Tensor
from typing_extensions import override

from speclm.acceptance.accepted import Accepted
from speclm.config import MAX_DEPTH, ProposerConfig, require_count, require_in_range
from speclm.proposers._ngram_index import MAX_FOLLOWERS, NgramIndex
from speclm.proposers._pruning import least_chance
from speclm.proposers.interface import Draft, Prefill, Proposer
from speclm.proposers.registry import register_proposer
from speclm.sampling.noise import PositionNoise
from speclm.tree.plan import TreePlan
from speclm.tree.topology import trees_of

_LEAST_CHANCE = 0.001


@dataclass(frozen=True, slots=True)
class NgramConfig(ProposerConfig):
    """Settings of the n-gram proposer.

    Args:
        depth: Most draft tokens on one path; as many as nodes, since any path may go on.
        num_draft_tokens: Most nodes of a draft, root excluded, in ``[1, MAX_DEPTH]``.
        max_ngram: Longest run of tokens that is looked up, in ``[1, 16]``; the index holds one
            entry per token and length.
        branches: Most children of a node, in ``[1, 8]``.
        min_chance: Least estimated chance of acceptance at which a node is drafted, in
            ``[0.001, 1]``. Best is what a node adds to the time of a round, as a share of a plain
            step, times the tokens that the time of a plain step yields on average.
    """

    depth: int = 15
    num_draft_tokens: int = 15
    max_ngram: int = 6
    branches: int = 3
    min_chance: float = 0.09

    def __post_init__(self) -> None:
        require_count("num_draft_tokens", self.num_draft_tokens, low=1, high=MAX_DEPTH)
        require_count("max_ngram", self.max_ngram, low=1, high=16)
        require_count("branches", self.branches, low=1, high=MAX_FOLLOWERS)
        require_in_range("min_chance", self.min_chance, low=0.001, high=1.0)


@register_proposer("ngram")
class NgramProposer(Proposer):
    """Proposes what followed the longest n-gram that occurred before, in prompt or output.

    A draft grows node by node, likeliest first, and every node looks its own n-gram up: a copy
    goes on past the end of the text, branches where earlier occurrences differ, and ends where
    another node is not worth its time. Needs no weights, and no sync with the device in a round.

    Args:
        num_draft_tokens: Most nodes of a draft; `NgramConfig` describes all options.
        max_ngram: Longest run of tokens that is looked up.
        branches: Most children of a node.
        min_chance: Least estimated chance of acceptance at which a node is drafted for a single
            row; more in a batch.

    Raises:
        OptionError: If an option is out of range.
    """

    def __init__(
        self,
        *,
        num_draft_tokens: int = 15,
        max_ngram: int = 6,
        branches: int = 3,
        min_chance: float = 0.09,
    ) -> None:
        self.config: NgramConfig = NgramConfig(
            depth=num_draft_tokens,
            num_draft_tokens=num_draft_tokens,
            max_ngram=max_ngram,
            branches=branches,
            min_chance=min_chance,
        )
        self._rows: list[NgramIndex] = []
        self._is_waiting: list[bool] = []
        self._ends: frozenset[int] = frozenset()

    @override
    def begin(self, prompt: Prefill) -> None:
        # Once per generation: the index lives on the host.
        rows, firsts = prompt.tokens.tolist(), prompt.first_tokens.tolist()
        paddings = prompt.num_padding.tolist()
        self._rows = [
            NgramIndex([*row[padding:], first], max_ngram=self.config.max_ngram)
            for row, padding, first in zip(rows, paddings, firsts, strict=True)
        ]
        self._is_waiting = [False] * len(rows)
        self._ends = prompt.eos_token_ids

    @override
    def propose(self, roots: Int[Tensor, " batch"], *, noise: PositionNoise | None) -> Draft:
        options = _planned(self.config, self.plan, num_rows=self._is_waiting.count(False))
        trees = [
            _Tree.root_alone(index) if is_waiting else _Tree.grow(index, options, self._ends)
            for index, is_waiting in zip(self._rows, self._is_waiting, strict=True)
        ]
        num_nodes = max(len(tree.tokens) for tree in trees)
        tokens = [tree.tokens + [0] * (num_nodes - len(tree.tokens)) for tree in trees]
        return Draft(
            tokens=torch.tensor(tokens, device=roots.device, dtype=torch.long),
            topology=trees_of([tree.parents for tree in trees], device=roots.device),
            probs=torch.tensor(
                [tree.probs + [0.0] * (num_nodes - len(tree.probs)) for tree in trees],
                device=roots.device,
                dtype=torch.float32,
            ),
        )

    @override
    def commit(self, accepted: Accepted) -> None:
        for index, emitted in zip(self._rows, accepted.emitted, strict=True):
            index.extend(emitted)
        # A row that was given nothing has most likely ended: nodes for it would slow the others.
        self._is_waiting = [not emitted for emitted in accepted.emitted]


@dataclass(frozen=True, slots=True)
class _Tree:
    """One row of a draft, on the host."""

    tokens: list[int]
    parents: list[int]
    probs: list[float]

    @classmethod
    def root_alone(cls, index: NgramIndex) -> "_Tree":
        return cls([index.context[-1]], [0], [1.0])

    @classmethod
    def grow(cls, index: NgramIndex, options: NgramConfig, ends: frozenset[int]) -> "_Tree":
        """Add the likeliest node that is left until none is worth its time."""
        tree = cls.root_alone(index)
        # Entries: minus the chance of the path, order of arrival, token, its chance given the path,
        # parent, context before.
        frontier: list[tuple[float, int, int, float, int, tuple[int, ...]]] = []
        node, chance, context, arrivals, is_leaf = 0, 1.0, index.context, 0, False
        depths = [0]
        while True:
            guesses = [] if is_leaf else index.guess(context, limit=options.branches)
            for token, prob in guesses:
                if chance * prob >= options.min_chance:
                    arrivals += 1
                    heappush(frontier, (-chance * prob, arrivals, token, prob, node, context))
            if not frontier or len(tree.tokens) > options.num_draft_tokens:
                return tree
            minus_chance, _, token, prob, parent, before = heappop(frontier)
            node, chance, context = len(tree.tokens), -minus_chance, index.slide(before, token)
            tree.tokens.append(token)
            tree.parents.append(parent)
            tree.probs.append(prob)
            depths.append(depths[parent] + 1)
            is_leaf = token in ends or depths[node] >= options.depth


@lru_cache(maxsize=256)
def _planned(config: NgramConfig, plan: TreePlan | None, *, num_rows: int) -> NgramConfig:
    """Return the settings of the next drafts; what a plan leaves open is the config's."""
    min_chance = least_chance(config.min_chance, num_rows=num_rows)
    if plan is None:
        return replace(config, min_chance=min_chance)
    if plan.min_chance is not None:
        min_chance = max(plan.min_chance, _LEAST_CHANCE)
    num_draft_tokens = min(plan.num_draft_tokens, MAX_DEPTH)
    return replace(
        config, depth=plan.depth, num_draft_tokens=num_draft_tokens, min_chance=min_chance
    )
