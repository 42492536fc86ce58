"""Trees that are grown or filled level by level."""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from speclm.tree.static import RankPath, RankPaths, sorted_paths, static_tree
from speclm.tree.topology import TreeTopology

_DRAWN_PROBABILITY = 0.65  # typical overlap of the distributions of a draft model and its target


@dataclass(slots=True, eq=False)
class _Candidates:
    """Candidates at one depth, and those of them that the next level starts from."""

    tokens: Int[Tensor, "batch candidates"]
    scores: Float[Tensor, "batch candidates"]
    expanded: Int[Tensor, "batch width"]
    expanded_scores: Float[Tensor, "batch width"]


@dataclass(frozen=True, slots=True)
class GrownRow:
    """The best nodes of one row, without the root.

    Args:
        tokens: Token of each node, parents first.
        parents: Each node's parent in the draft, where the root is node 0.
        expansions: Level at which each node was expanded and its index there; None if it was not.
        scores: Cumulative log-probability of each node.
    """

    tokens: list[int]
    parents: list[int]
    expansions: list[tuple[int, int] | None]
    scores: list[float]


@runtime_checkable
class GrownRows(Protocol):
    """Grown trees by row, such as a list of them."""

    def __getitem__(self, row: int, /) -> GrownRow:
        """Return the tree of a row."""
        ...


class GrowingTree:
    """Search for the most likely paths, level by level.

    Source: Li et al. 2024 (EAGLE-2), expansion and reranking of dynamic draft trees.
    """

    def __init__(
        self,
        *,
        width: int,
        leaf_tokens: Int[Tensor, " leaves"] | None = None,
        is_idle: Bool[Tensor, " batch"] | None = None,
    ) -> None:
        """Start at the root.

        Args:
            width: Nodes expanded at each level.
            leaf_tokens: Tokens after which nothing follows, such as the end of the sequence.
            is_idle: Rows that have ended; they get no nodes.
        """
        self._width = width
        self._branches = 1  # children of each expanded node
        self._leaf_tokens = leaf_tokens
        self._is_idle = is_idle
        self._levels: list[_Candidates] = []

    @property
    def depth(self) -> int:
        """Levels grown so far."""
        return len(self._levels)

    def add(
        self,
        values: Float[Tensor, "batch expanded branches"],
        tokens: Int[Tensor, "batch expanded branches"],
    ) -> None:
        """Add some children of the nodes expanded last, at first of the root.

        Args:
            values: Log-probabilities of the best children of each node, best first.
            tokens: Their tokens.
        """
        self._branches = values.shape[2]
        # NaN would break the order of parents and children, so it counts as probability 0.
        scores = values.nan_to_num(nan=-torch.inf, posinf=0.0, neginf=-torch.inf)
        scores = scores.clamp(max=0)  # rounding may exceed probability 1
        if self._levels:
            scores = scores + self._levels[-1].expanded_scores[:, :, None]
        scores, tokens = scores.flatten(1), tokens.flatten(1)  # [batch, candidates]
        if self._is_idle is not None:
            scores = scores.masked_fill(self._is_idle[:, None], float("-inf"))
        expandable = scores
        if self._leaf_tokens is not None:
            expandable = scores.masked_fill(torch.isin(tokens, self._leaf_tokens), float("-inf"))
        following = expandable.topk(min(self._width, scores.shape[1]), dim=1)
        self._levels.append(_Candidates(tokens, scores, following.indices, following.values))

    @property
    def expanded_tokens(self) -> Int[Tensor, "batch width"]:
        """Tokens of the nodes that are expanded next."""
        last = self._levels[-1]
        return last.tokens.gather(1, last.expanded)

    @property
    def expanded_parents(self) -> Int[Tensor, "batch width"]:
        """Index of the parent of each of these among the nodes expanded before."""
        return self._levels[-1].expanded // self._branches

    def stop_rows(self, is_stopped: Bool[Tensor, " batch"]) -> None:
        """Give some rows no nodes below those of the last level; does not sync."""
        level = self._levels[-1]
        level.expanded_scores = level.expanded_scores.masked_fill(is_stopped[:, None], -torch.inf)

    @property
    def expanded_scores(self) -> Float[Tensor, "batch width"]:
        """Scores of the nodes that are expanded next, not increasing."""
        return self._levels[-1].expanded_scores

    def best_nodes(self, num_nodes: int, *, min_score: float) -> list[GrownRow]:
        """Return the `num_nodes` best candidates of each row that score at least `min_score`.

        The device chooses the nodes, and the host reads them in one transfer.
        """
        scores = torch.cat([level.scores for level in self._levels], dim=1)
        num_candidates = scores.shape[1]
        # No child scores above its parent, and a stable sort puts the parent first if they are
        # equal. The best nodes therefore form a tree.
        best = scores.sort(dim=1, descending=True, stable=True)
        values, order = best.values[:, :num_nodes], best.indices[:, :num_nodes]
        kept = order.masked_fill(values < min_score, num_candidates).sort(dim=1).values
        chosen = kept.clamp(max=num_candidates - 1)  # nodes that are left out come last
        tokens = torch.cat([level.tokens for level in self._levels], dim=1).gather(1, chosen)
        bits = scores.gather(1, chosen).float().view(torch.int32)  # scores travel as their bits
        expanded = [level.expanded for level in self._levels]
        packed = torch.cat([kept, tokens, bits, *expanded], dim=1).cpu()
        sizes = [kept.shape[1]] * 3 + [level.shape[1] for level in expanded]
        kept, tokens, bits, *expanded = torch.split(packed, sizes, dim=1)
        rows = zip(
            kept.tolist(),
            tokens.tolist(),
            bits.int().view(torch.float32).tolist(),
            zip(*(level.tolist() for level in expanded), strict=True),
            strict=True,
        )
        ends = list(accumulate(level.tokens.shape[1] for level in self._levels))
        return [_grown_row(*row, ends=ends, branches=self._branches) for row in rows]


def _grown_row(
    kept: list[int],
    tokens: list[int],
    scores: list[float],
    expanded: tuple[list[int], ...],
    *,
    ends: list[int],
    branches: int,
) -> GrownRow:
    """Return the row of the candidates that the device chose.

    Args:
        kept: Their indices over all levels, ascending; larger than all others if none is left.
        tokens: Their tokens.
        scores: Their scores.
        expanded: For each level the indices, within it, of the candidates that were expanded.
        ends: Number of candidates up to and including each level.
        branches: Children considered for each expanded node.
    """
    num = bisect_left(kept, ends[-1])
    grown = GrownRow(tokens[:num], [], [], scores[:num])
    nodes: list[dict[int, int]] = [{} for _ in ends]  # from the index in a level to the node
    for node, candidate in enumerate(kept[:num], start=1):
        depth = bisect_right(ends, candidate)
        index = candidate - (ends[depth - 1] if depth else 0)
        nodes[depth][index] = node
        parent = expanded[depth - 1][index // branches] if depth else -1
        grown.parents.append(nodes[depth - 1][parent] if depth else 0)
        at_level = expanded[depth]
        grown.expansions.append((depth, at_level.index(index)) if index in at_level else None)
    return grown


@lru_cache(maxsize=64)
def drawn_paths(*, width: int, branches: int, depth: int, num_nodes: int) -> RankPaths:
    """Return the static tree whose nodes drawn tokens are most likely to reach.

    Tokens that are drawn must not shape their tree. The estimate assumes that the first child drawn
    is accepted with a fixed probability, and each further child with the same probability if the
    ones before it were rejected.

    Args:
        width: Nodes expanded at each level.
        branches: Maximum children of a node.
        depth: Maximum levels.
        num_nodes: Number of nodes, root excluded.
    """
    scored: list[tuple[float, RankPath]] = []
    expanded: list[tuple[float, RankPath]] = [(1.0, ())]
    for _ in range(min(depth, num_nodes)):
        level = [
            (score * _DRAWN_PROBABILITY * (1 - _DRAWN_PROBABILITY) ** rank, (*path, rank))
            for score, path in expanded
            for rank in range(branches)
        ]
        level.sort(key=lambda entry: (-entry[0], entry[1]))
        expanded = level[:width]
        scored += level
    scored.sort(key=lambda entry: (-entry[0], len(entry[1]), entry[1]))
    return sorted_paths(path for _, path in scored[:num_nodes])


@dataclass(frozen=True, slots=True, eq=False)
class _FilledLevel:
    """Nodes of one depth that are expanded together.

    Args:
        nodes: Indices of the nodes, all of which have children.
        parents: Index of the parent of each among `nodes` of the level before.
        children: Indices of their children.
        sources: Index of the parent of each child among `nodes`.
        ranks: Rank of the candidate that each child takes below its parent.
        num_ranks: Number of candidates needed below each node.
    """

    nodes: Int[Tensor, " width"]
    parents: Int[Tensor, " width"]
    children: Int[Tensor, " children"]
    sources: Int[Tensor, " children"]
    ranks: Int[Tensor, " children"]
    num_ranks: int


class FilledTree:
    """A tree of one shape for all rows, filled with tokens level by level.

    `fill` takes candidates for the children of the current level's nodes. `expanded_tokens` and
    `expanded_parents` are then what to feed next, until `is_full`.

    Example:
        >>> tree = FilledTree(((0,), (1,), (0, 0)), roots=torch.tensor([7]))
        >>> tree.fill(torch.tensor([[[5, 6]]]))  # the two best tokens after the root
        >>> tree.expanded_tokens  # only node 1 has children
        tensor([[5]])
    """

    def __init__(
        self, paths: RankPaths, *, roots: Int[Tensor, " batch"], are_drawn: bool = False
    ) -> None:
        """Start at the root.

        Args:
            paths: The tree, parents before children.
            roots: Token at the root of each row.
            are_drawn: Whether candidates are drawn, not ranked: child j then takes candidate j.
        """
        self._levels, self._expansions = _levels_of(paths, are_drawn=are_drawn, device=roots.device)
        self._num_filled = 0
        self.topology: TreeTopology = static_tree(paths, device=roots.device).topology
        self.tokens: Int[Tensor, "batch nodes"] = roots[:, None].repeat(1, self.topology.num_nodes)
        """Token at each node; meaningless at nodes that are not filled yet."""

    @property
    def depth(self) -> int:
        """Levels filled so far."""
        return self._num_filled

    @property
    def is_full(self) -> bool:
        """Whether all nodes have their token."""
        return self._num_filled == len(self._levels)

    @property
    def widths(self) -> list[int]:
        """Number of nodes expanded at each level, that of the root included."""
        return [len(level.nodes) for level in self._levels]

    @property
    def num_ranks(self) -> int:
        """Number of candidates that the next `fill` needs below each node."""
        return self._levels[self._num_filled].num_ranks

    @property
    def expanded_nodes(self) -> Int[Tensor, " width"]:
        """Nodes whose children are filled next."""
        return self._levels[self._num_filled].nodes

    @property
    def expanded_tokens(self) -> Int[Tensor, "batch width"]:
        """Tokens of those nodes."""
        return self.tokens.index_select(1, self.expanded_nodes)

    @property
    def expanded_parents(self) -> Int[Tensor, "batch width"]:
        """Index of the parent of each of these among the nodes expanded before."""
        return self._levels[self._num_filled].parents.expand(len(self.tokens), -1)

    @property
    def expansions(self) -> list[tuple[int, int] | None]:
        """Level at which each node but the root was expanded and its index there; None for leaves.

        Nodes just below the root are expanded at level 0.
        """
        return list(self._expansions)

    def fill(self, candidates: Int[Tensor, "batch width ranks"]) -> None:
        """Give the expanded nodes their children.

        Args:
            candidates: Tokens after each node, at least `num_ranks`, best first or as drawn.
        """
        level = self._levels[self._num_filled]
        chosen = candidates[:, level.sources, level.ranks]  # [batch, children]
        self.tokens.index_copy_(1, level.children, chosen)
        self._num_filled += 1


@lru_cache(maxsize=64)
def _levels_of(
    paths: RankPaths, *, are_drawn: bool, device: torch.device
) -> tuple[tuple[_FilledLevel, ...], tuple[tuple[int, int] | None, ...]]:
    """Return the levels of a tree, and the `expansions` of its nodes."""
    families: dict[RankPath, list[RankPath]] = {}
    for path in paths:
        families.setdefault(path[:-1], []).append(path)
    node_of = {(): 0} | {path: node for node, path in enumerate(paths, start=1)}
    levels: list[_FilledLevel] = []
    expansions: list[tuple[int, int] | None] = [None] * (len(paths) + 1)
    before: dict[RankPath, int] = {}
    expanded: list[RankPath] = [()]

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, device=device, dtype=torch.long)

    while expanded:
        indices = {path: index for index, path in enumerate(expanded)}
        for path, index in indices.items():
            expansions[node_of[path]] = (len(levels) - 1, index)
        children = [path for parent in expanded for path in families[parent]]
        order = [rank for parent in expanded for rank in range(len(families[parent]))]
        ranks = order if are_drawn else [path[-1] for path in children]
        levels.append(
            _FilledLevel(
                nodes=tensor([node_of[path] for path in expanded]),
                parents=tensor([before.get(path[:-1], 0) for path in expanded]),
                children=tensor([node_of[path] for path in children]),
                sources=tensor([indices[path[:-1]] for path in children]),
                ranks=tensor(ranks),
                num_ranks=max(ranks) + 1,
            )
        )
        before, expanded = indices, [path for path in children if path in families]
    return tuple(levels), tuple(expansions[1:])
