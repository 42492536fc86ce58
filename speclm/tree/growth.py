"""Grows a tree level by level and keeps its best nodes."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_STEP_PENALTY = 1e-6  # makes a sure child score below its parent, so that the best nodes connect

_DRAWN_CHANCE = 0.65  # a usual overlap of the laws of a draft model and its target


@dataclass(slots=True, eq=False)
class _Level:
    """Candidates at one depth."""

    tokens: Int[Tensor, "batch candidates"]
    scores: Float[Tensor, "batch candidates"]
    expanded: Int[Tensor, "batch width"]  # candidates that the next level starts from
    expanded_scores: Float[Tensor, "batch width"]


@dataclass(frozen=True, slots=True)
class GrownRow:
    """The best nodes of one row, the root left out.

    Args:
        tokens: Token of each node, parents first.
        parents: Index of each node's parent in the draft, where the root is node 0.
        expansions: Level and place at which a node was expanded, None when it was not.
        scores: Cumulative log-probability of each node.
    """

    tokens: list[int]
    parents: list[int]
    expansions: list[tuple[int, int] | None]
    scores: list[float]


class GrowingTree:
    """Best-first search over cumulative log-probability, a level at a time.

    Source: Li et al. 2024 (EAGLE-2), expansion and reranking of dynamic draft trees.
    """

    def __init__(
        self,
        *,
        width: int,
        branches: int,
        leaf_tokens: Int[Tensor, " leaves"] | None = None,
        is_idle: Bool[Tensor, " batch"] | None = None,
    ) -> None:
        """Start at the root.

        Args:
            width: Nodes expanded at each level.
            branches: Children considered for each expanded node.
            leaf_tokens: Tokens after which nothing follows, such as the end of the sequence.
            is_idle: Rows that take part for their place in the batch alone; none of their nodes
                is scored.
        """
        self._width = width
        self._branches = branches
        self._leaf_tokens = leaf_tokens
        self._levels: list[_Level] = []
        self._is_idle = is_idle
        self._has_stopped = is_idle

    @property
    def depth(self) -> int:
        """Levels grown so far."""
        return len(self._levels)

    def grow(self, log_probs: Float[Tensor, "batch expanded vocab"]) -> None:
        """Add the children of the nodes that were last expanded; at first, of the root."""
        best = log_probs.topk(self._branches, dim=-1)  # [batch, expanded, branches]
        scores = best.values - _STEP_PENALTY
        if self._levels:
            scores = scores + self._levels[-1].expanded_scores[:, :, None]
        scores, tokens = scores.flatten(1), best.indices.flatten(1)  # [batch, candidates]
        if self._has_stopped is not None:
            scores = scores.masked_fill(self._has_stopped[:, None], float("-inf"))
        expandable = scores
        if self._leaf_tokens is not None:
            expandable = scores.masked_fill(torch.isin(tokens, self._leaf_tokens), float("-inf"))
        following = expandable.topk(min(self._width, scores.shape[1]), dim=1)
        self._levels.append(_Level(tokens, scores, following.indices, following.values))

    @property
    def expanded_tokens(self) -> Int[Tensor, "batch width"]:
        """Tokens of the nodes to be expanded next."""
        last = self._levels[-1]
        return last.tokens.gather(1, last.expanded)

    @property
    def expanded_parents(self) -> Int[Tensor, "batch width"]:
        """Place of each such node's parent among the nodes expanded before."""
        return self._levels[-1].expanded // self._branches

    def stop_rows_below(self, floor: float) -> float:
        """Let no row grow further whose best node to expand scores below `floor`.

        Returns:
            Share of the rows not idle that still grow; syncs with the device.
        """
        is_low = self._levels[-1].expanded_scores[:, 0] < floor  # [batch]
        self._has_stopped = is_low if self._has_stopped is None else self._has_stopped | is_low
        num_growing = (~self._has_stopped).sum()
        if self._is_idle is None:
            return float(num_growing) / len(self._has_stopped)
        return float(num_growing / (~self._is_idle).sum().clamp(min=1))

    def best_nodes(self, num_nodes: int, *, min_score: float) -> list[GrownRow]:
        """Return the `num_nodes` best candidates of each row with a score of at least `min_score`.

        Syncs with the device: the tree's shape is decided on the host.
        """
        levels = [
            [
                _HostLevel(*columns)
                for columns in zip(
                    level.tokens.tolist(),
                    level.scores.tolist(),
                    level.expanded.tolist(),
                    strict=True,
                )
            ]
            for level in self._levels
        ]
        rows = zip(*levels, strict=True)
        return [
            _best_of_row(row, num_nodes, branches=self._branches, min_score=min_score)
            for row in rows
        ]


class _HostLevel(NamedTuple):
    """One row of a level, on the host."""

    tokens: list[int]
    scores: list[float]
    expanded: list[int]


def _best_of_row(
    levels: tuple[_HostLevel, ...], num_nodes: int, *, branches: int, min_score: float
) -> GrownRow:
    best = sorted(
        (-score, depth, place)
        for depth, level in enumerate(levels)
        for place, score in enumerate(level.scores)
        if score >= min_score
    )[:num_nodes]
    nodes = sorted((depth, cost, place) for cost, depth, place in best)
    index = {(depth, place): node for node, (depth, _, place) in enumerate(nodes, start=1)}
    grown = GrownRow([], [], [], [])
    for depth, cost, place in nodes:
        level = levels[depth]
        above = None if depth == 0 else levels[depth - 1].expanded[place // branches]
        grown.tokens.append(level.tokens[place])
        grown.parents.append(0 if above is None else index[depth - 1, above])
        grown.expansions.append(
            (depth, level.expanded.index(place)) if place in level.expanded else None
        )
        grown.scores.append(-cost)
    return grown


@lru_cache(maxsize=64)
def drawn_choices(
    *, width: int, branches: int, depth: int, num_nodes: int
) -> tuple[tuple[int, ...], ...]:
    """Return the shape of a tree whose tokens are drawn, and so may not shape it.

    The places that are likeliest to be reached are kept, if the first child drawn were accepted
    with one chance at every node, and each further one with that chance of what is left.

    Args:
        width: Nodes expanded at each level.
        branches: Most children of a node.
        depth: Most levels.
        num_nodes: Nodes, the root left out.

    Returns:
        Paths of ranks, parents before their children.
    """
    scored: list[tuple[float, tuple[int, ...]]] = []
    expanded: list[tuple[float, tuple[int, ...]]] = [(1.0, ())]
    for _ in range(min(depth, num_nodes)):
        level = [
            (score * _DRAWN_CHANCE * (1 - _DRAWN_CHANCE) ** rank, (*path, rank))
            for score, path in expanded
            for rank in range(branches)
        ]
        level.sort(key=lambda entry: (-entry[0], entry[1]))
        expanded = level[:width]
        scored += level
    scored.sort(key=lambda entry: (-entry[0], len(entry[1]), entry[1]))
    kept = [path for _, path in scored[:num_nodes]]
    return tuple(sorted(kept, key=lambda path: (len(path), path)))
