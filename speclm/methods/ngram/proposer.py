"""Draft without a model: copy what followed the same tokens before."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from heapq import heappop, heappush

import torch
from jaxtyping import Int
from torch import Tensor
from typing_extensions import override

from speclm.acceptance import Accepted
from speclm.config import MAX_DEPTH, ProposerConfig, require_count, require_in_range
from speclm.drafting.interface import Draft, Prefill, Proposer
from speclm.drafting.levels import least_probability
from speclm.sampling.noise import PositionNoise
from speclm.tree.plan import TreePlan
from speclm.tree.topology import trees_of

MAX_FOLLOWERS = 8
"""Maximum followers stored for one n-gram; if there are more, none is likely."""

# Fitted by simulation to 1600 answers of the bundled base to training prompts (text-to-SQL and
# word problems, greedy and at temperature 1). A token that had followed an n-gram once followed it
# again in 39 to 84 of 100 cases, with no clear trend in the length of the n-gram. So the estimate
# starts in the middle, and after some sixteen observations the row's own record decides.
_ONCE_PROBABILITY = 0.6
_ONCE_WEIGHT = 16.0
# Counts are discounted as in prediction by partial matching (Howard 1993): little if all
# occurrences agree, more if they do not.
_AGREED_DISCOUNT = 0.35
_SPLIT_DISCOUNT = 0.6


class NgramIndex:
    """The followers of every n-gram of one row.

    Args:
        tokens: Text so far, oldest token first.
        max_ngram: Longest n-gram that is looked up.
    """

    def __init__(self, tokens: Iterable[int], *, max_ngram: int) -> None:
        self._max_ngram = max_ngram
        self._followers: dict[tuple[int, ...], dict[int, int]] = {}  # counts, most recent last
        self._once_hits = _ONCE_PROBABILITY * _ONCE_WEIGHT
        self._once_seen = _ONCE_WEIGHT
        self._context: tuple[int, ...] = ()
        for token in tokens:  # how much a prompt repeats itself says little about its answer
            self._append(token)

    @property
    def context(self) -> tuple[int, ...]:
        """The last tokens of the text, as many as an n-gram may have."""
        return self._context

    def slide(self, context: tuple[int, ...], token: int) -> tuple[int, ...]:
        """Return the context one token later."""
        return (*context, token)[-self._max_ngram :]

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens to the text, and learn from them how reliable a single occurrence is."""
        for token in tokens:
            is_hit = self._append(token)
            if is_hit is not None:
                self._once_hits += is_hit
                self._once_seen += 1

    def candidates(self, context: tuple[int, ...], *, limit: int) -> list[tuple[int, float]]:
        """Return at most `limit` tokens that may follow, each with its probability.

        They followed the longest known n-gram at the end of `context`. The most frequent come
        first, and among equals the most recent.
        """
        counts: dict[int, int] = {}
        for length in range(1, len(context) + 1):
            longer = self._followers.get(context[-length:])
            if longer is None:
                break  # longer n-grams that contain this one are not known either
            counts = longer
        if len(counts) == 1:
            ((token, count),) = counts.items()
            is_once = count == 1
            probability = (
                self._once_hits / self._once_seen if is_once else 1 - _AGREED_DISCOUNT / count
            )
            return [(token, probability)]
        total = sum(counts.values())
        latest_first = reversed(counts)
        ranked = sorted(latest_first, key=counts.__getitem__, reverse=True)
        return [(token, (counts[token] - _SPLIT_DISCOUNT) / total) for token in ranked[:limit]]

    def _append(self, token: int) -> bool | None:
        """Append a token; if `candidates` knew a single occurrence, return whether it was right."""
        context = self._context
        is_hit: bool | None = None
        for length in range(1, len(context) + 1):
            ngram = context[-length:]
            counts = self._followers.get(ngram)
            if counts is None:
                self._followers[ngram] = {token: 1}
                continue
            # The longest known n-gram, which decides, comes last.
            is_once = len(counts) == 1 and 1 in counts.values()
            is_hit = token in counts if is_once else None
            counts[token] = counts.pop(token, 0) + 1
            if len(counts) > MAX_FOLLOWERS:
                del counts[next(iter(counts))]
        self._context = self.slide(context, token)
        return is_hit


_LEAST_PROBABILITY = 0.001


@dataclass(frozen=True, slots=True)
class NgramConfig(ProposerConfig):
    """Settings of the n-gram proposer.

    Args:
        depth: Maximum draft tokens on one path; equal to the number of nodes.
        num_draft_tokens: Maximum nodes of a draft, root excluded, in ``[1, MAX_DEPTH]``.
        max_ngram: Longest run of tokens that is looked up, in ``[1, 16]``; the index holds one
            entry per token and length.
        branches: Maximum children of a node, in ``[1, 8]``.
        min_probability: Minimum estimated acceptance probability of a node, in ``[0.001, 1]``. The
            best value is the time that a node adds to a round, in steps of regular generation,
            times the mean number of tokens generated in the time of such a step.
    """

    depth: int = 15
    num_draft_tokens: int = 15
    max_ngram: int = 6
    branches: int = 3
    min_probability: float = 0.09

    def __post_init__(self) -> None:
        require_count("num_draft_tokens", self.num_draft_tokens, low=1, high=MAX_DEPTH)
        require_count("max_ngram", self.max_ngram, low=1, high=16)
        require_count("branches", self.branches, low=1, high=MAX_FOLLOWERS)
        require_in_range("min_probability", self.min_probability, low=0.001, high=1.0)


class NgramProposer(Proposer):
    """Drafts what followed the longest n-gram that occurred before, in prompt or output.

    A draft grows node by node, most likely first, and every node looks up its own n-gram. A copy
    may therefore continue past the end of the text. It branches where earlier occurrences differ,
    and ends when another node is not worth its time. Needs no weights, and no sync in a round.

    Args:
        num_draft_tokens: Maximum nodes of a draft; `NgramConfig` describes all options.
        max_ngram: Longest run of tokens that is looked up.
        branches: Maximum children of a node.
        min_probability: Minimum estimated acceptance probability of a node, for a single row;
            higher in a batch.

    Raises:
        OptionError: If an option is out of range.
    """

    def __init__(
        self,
        *,
        num_draft_tokens: int = 15,
        max_ngram: int = 6,
        branches: int = 3,
        min_probability: float = 0.09,
    ) -> None:
        self.config: NgramConfig = NgramConfig(
            depth=num_draft_tokens,
            num_draft_tokens=num_draft_tokens,
            max_ngram=max_ngram,
            branches=branches,
            min_probability=min_probability,
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
            _Tree.only_root(index) if is_waiting else _Tree.grow(index, options, self._ends)
            for index, is_waiting in zip(self._rows, self._is_waiting, strict=True)
        ]
        num_nodes = max(len(tree.tokens) for tree in trees)
        tokens = [tree.tokens + [0] * (num_nodes - len(tree.tokens)) for tree in trees]
        return Draft(
            tokens=torch.tensor(tokens, device=roots.device, dtype=torch.long),
            topology=trees_of([tree.parents for tree in trees], device=roots.device),
            node_probs=[tree.probs + [0.0] * (num_nodes - len(tree.probs)) for tree in trees],
        )

    @override
    def commit(self, accepted: Accepted) -> None:
        for index, emitted in zip(self._rows, accepted.emitted, strict=True):
            index.extend(emitted)
        # A row without new tokens has most likely ended: nodes for it would slow the others.
        self._is_waiting = [not emitted for emitted in accepted.emitted]


@dataclass(frozen=True, slots=True)
class _Tree:
    """One row of a draft, on the host."""

    tokens: list[int]
    parents: list[int]
    probs: list[float]

    @classmethod
    def only_root(cls, index: NgramIndex) -> "_Tree":
        return cls([index.context[-1]], [0], [1.0])

    @classmethod
    def grow(cls, index: NgramIndex, options: NgramConfig, ends: frozenset[int]) -> "_Tree":
        """Add the most likely remaining node until none is worth its time."""
        tree = cls.only_root(index)
        # Entries: minus the probability of the path, order of arrival, token, its probability given
        # the path, parent, context before.
        waiting: list[tuple[float, int, int, float, int, tuple[int, ...]]] = []
        node, probability, context, arrivals, is_leaf = 0, 1.0, index.context, 0, False
        depths = [0]
        while True:
            following = [] if is_leaf else index.candidates(context, limit=options.branches)
            for token, prob in following:
                if probability * prob >= options.min_probability:
                    arrivals += 1
                    heappush(waiting, (-probability * prob, arrivals, token, prob, node, context))
            if not waiting or len(tree.tokens) > options.num_draft_tokens:
                return tree
            minus_probability, _, token, prob, parent, before = heappop(waiting)
            node, probability, context = (
                len(tree.tokens),
                -minus_probability,
                index.slide(before, token),
            )
            tree.tokens.append(token)
            tree.parents.append(parent)
            tree.probs.append(prob)
            depths.append(depths[parent] + 1)
            is_leaf = token in ends or depths[node] >= options.depth


@lru_cache(maxsize=256)
def _planned(config: NgramConfig, plan: TreePlan | None, *, num_rows: int) -> NgramConfig:
    """Return the settings of the next drafts; a plan overrides those of the config."""
    min_probability = least_probability(config.min_probability, num_rows=num_rows)
    if plan is None:
        return replace(config, min_probability=min_probability)
    if plan.min_probability is not None:
        min_probability = max(plan.min_probability, _LEAST_PROBABILITY)
    num_draft_tokens = min(plan.num_draft_tokens, MAX_DEPTH)
    return replace(
        config, depth=plan.depth, num_draft_tokens=num_draft_tokens, min_probability=min_probability
    )
