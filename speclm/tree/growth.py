"""Grows a tree level by level and keeps its best nodes."""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_DRAWN_CHANCE = 0.65  # a usual overlap of the laws of a draft model and its target


@dataclass(slots=True, eq=False)
class _Level:
    """Candidates at one depth."""

    tokens: Int[Tensor, "batch candidates"]
    scores: Float[Tensor, "batch candidates"]
    expanded: Int[Tensor, "batch width"]  # candidates that the next level starts from
    expanded_scores: Float[Tensor, "batch width"]

    @property
    def num_candidates(self) -> int:
        return self.tokens.shape[1]


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
        token_ids: Int[Tensor, " vocab"] | None = None,
        is_idle: Bool[Tensor, " batch"] | None = None,
    ) -> None:
        """Start at the root.

        Args:
            width: Nodes expanded at each level.
            branches: Children considered for each expanded node.
            leaf_tokens: Tokens after which nothing follows, such as the end of the sequence.
            token_ids: Token of each column of what `grow` is given; None where they are the same.
            is_idle: Rows that take part for their place in the batch alone; none of their nodes
                is scored.
        """
        self._width = width
        self._branches = branches
        self._leaf_tokens = leaf_tokens
        self._token_ids = token_ids
        self._levels: list[_Level] = []
        self._has_stopped = is_idle
        # Idle rows are known on the host beforehand, where what stops others is decided.
        self._is_idle: list[bool] | None = None if is_idle is None else is_idle.tolist()
        self._stopped = self._is_idle

    @property
    def depth(self) -> int:
        """Levels grown so far."""
        return len(self._levels)

    def grow(self, log_probs: Float[Tensor, "batch expanded vocab"]) -> None:
        """Add the children of the nodes that were last expanded; at first, of the root."""
        best = log_probs.topk(self._branches, dim=-1)  # [batch, expanded, branches]
        scores = best.values.clamp(max=0)  # rounding may make a sure child likelier than that
        if self._levels:
            scores = scores + self._levels[-1].expanded_scores[:, :, None]
        scores, tokens = scores.flatten(1), best.indices.flatten(1)  # [batch, candidates]
        if self._token_ids is not None:
            tokens = self._token_ids[tokens]
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
        best: list[float] = self._levels[-1].expanded_scores[:, 0].tolist()
        before = self._stopped or [False] * len(best)
        stopped = [was or score < floor for was, score in zip(before, best, strict=True)]
        if stopped != before:
            self._has_stopped = torch.tensor(stopped, device=self._levels[-1].scores.device)
        self._stopped = stopped
        num_idle = sum(self._is_idle or ())
        return stopped.count(False) / max(len(stopped) - num_idle, 1)

    def best_nodes(self, num_nodes: int, *, min_score: float) -> list[GrownRow]:
        """Return the `num_nodes` best candidates of each row with a score of at least `min_score`.

        Nodes are chosen on the device, and read by the host at once.
        """
        scores = torch.cat([level.scores for level in self._levels], dim=1)
        num_candidates = scores.shape[1]
        # No child scores above its parent, and of equals a stable sort takes the parent first: so
        # the best are a tree.
        best = scores.sort(dim=1, descending=True, stable=True)
        values, order = best.values[:, :num_nodes], best.indices[:, :num_nodes]
        order = order.masked_fill(values < min_score, num_candidates)
        kept = order.sort(dim=1).values  # by level; what is left out comes last
        chosen = kept.clamp(max=num_candidates - 1)
        tokens = torch.cat([level.tokens for level in self._levels], dim=1).gather(1, chosen)
        above, places = self._origins()
        parents = torch.searchsorted(kept, above.gather(1, chosen), right=True)
        # One transfer: scores travel as their bits.
        bits = scores.gather(1, chosen).float().view(torch.int32).long()
        packed = torch.stack([kept, tokens, parents, places.gather(1, chosen), bits]).cpu()
        return [
            self._grown_row(*columns)
            for columns in zip(
                *packed[:4].tolist(), packed[4].int().view(torch.float32).tolist(), strict=True
            )
        ]

    def _origins(self) -> tuple[Int[Tensor, "batch candidates"], Int[Tensor, "batch candidates"]]:
        """Return the candidate above each one, -1 for the root, and the place it was expanded at.

        Candidates are counted over all levels; those that were not expanded have place -1.
        """
        above = [torch.full_like(self._levels[0].tokens, -1)]
        places, first = [], 0
        for level in self._levels:
            slots = torch.arange(level.expanded.shape[1], device=level.expanded.device)
            unexpanded = torch.full_like(level.tokens, -1)
            places.append(unexpanded.scatter(1, level.expanded, slots.expand_as(level.expanded)))
            below = (level.expanded + first)[:, :, None].expand(-1, -1, self._branches)
            above.append(below.flatten(1))
            first += level.num_candidates
        return torch.cat(above[:-1], dim=1), torch.cat(places, dim=1)

    def _grown_row(
        self,
        kept: list[int],
        tokens: list[int],
        parents: list[int],
        places: list[int],
        scores: list[float],
    ) -> GrownRow:
        """Return a row from what the device chose, without what was left out."""
        ends = list(accumulate(level.num_candidates for level in self._levels))
        num = bisect_left(kept, ends[-1])
        expansions = [
            None if place < 0 else (bisect_right(ends, candidate), place)
            for candidate, place in zip(kept[:num], places, strict=False)
        ]
        return GrownRow(tokens[:num], parents[:num], expansions, scores[:num])


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
