"""Trees that are grown or filled level by level."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from speclm.tree.static import RankPath, RankPaths, sorted_paths, static_tree
from speclm.tree.topology import TreeTopology

_DRAWN_PROBABILITY = 0.65  # typical overlap of the distributions of a draft model and its target


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
