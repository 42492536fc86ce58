"""Fills a tree whose shape is known before its tokens, a level at a time."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Int
from torch import Tensor

from speclm.tree.choices import Choices, static_tree
from speclm.tree.topology import TreeTopology


@dataclass(frozen=True, slots=True, eq=False)
class _Level:
    """Nodes that are expanded at once.

    Args:
        nodes: Which of them; they have one depth, and children.
        parents: Place of each one's parent among the nodes of the level above.
        children: Nodes below them.
        places: Place of each child's parent among `nodes`.
        ranks: Which of the guesses below its parent each child takes.
        num_guesses: Guesses wanted below each node.
    """

    nodes: Int[Tensor, " width"]
    parents: Int[Tensor, " width"]
    children: Int[Tensor, " children"]
    places: Int[Tensor, " children"]
    ranks: Int[Tensor, " children"]
    num_guesses: int


@dataclass(frozen=True, slots=True, eq=False)
class _Shape:
    """How a tree is filled; `expansions` as in `FilledTree`."""

    levels: tuple[_Level, ...]
    expansions: tuple[tuple[int, int] | None, ...]


class FilledTree:
    """A tree of one shape for all rows, of which nodes with children alone are expanded.

    Starts at the root: `fill` takes guesses below the nodes that were last expanded, after which
    `expanded_tokens` and `expanded_parents` tell what to feed next, until `is_full`.
    """

    def __init__(
        self, choices: Choices, *, roots: Int[Tensor, " batch"], are_drawn: bool = False
    ) -> None:
        """Start at the root.

        Args:
            choices: Paths of ranks, parents before children.
            roots: Token at the root of each row.
            are_drawn: Whether guesses have no rank: the j-th child then takes the j-th of them.
        """
        self._shape = _shape_of(choices, are_drawn=are_drawn, device=roots.device)
        self._num_filled = 0
        self.topology: TreeTopology = static_tree(choices, device=roots.device).topology
        self.tokens: Int[Tensor, "batch nodes"] = roots[:, None].repeat(1, self.topology.num_nodes)
        """Token at each node; of no meaning at nodes that are not filled yet."""

    @property
    def depth(self) -> int:
        """Levels filled so far."""
        return self._num_filled

    @property
    def is_full(self) -> bool:
        """Whether all nodes have their token."""
        return self._num_filled == len(self._shape.levels)

    @property
    def widths(self) -> list[int]:
        """Nodes expanded at each level, the root's among them."""
        return [len(level.nodes) for level in self._shape.levels]

    @property
    def num_guesses(self) -> int:
        """Guesses that the next `fill` takes below each node expanded."""
        return self._shape.levels[self._num_filled].num_guesses

    @property
    def expanded_nodes(self) -> Int[Tensor, " width"]:
        """Nodes whose children are filled next."""
        return self._shape.levels[self._num_filled].nodes

    @property
    def expanded_tokens(self) -> Int[Tensor, "batch width"]:
        """Tokens of those nodes."""
        return self.tokens.index_select(1, self.expanded_nodes)

    @property
    def expanded_parents(self) -> Int[Tensor, "batch width"]:
        """Place of each such node's parent among the nodes expanded before."""
        parents = self._shape.levels[self._num_filled].parents
        return parents.expand(len(self.tokens), -1)

    @property
    def expansions(self) -> list[tuple[int, int] | None]:
        """Level and place at which each node was expanded, the root left out; None for leaves.

        Nodes just below the root are expanded at level 0.
        """
        return list(self._shape.expansions)

    def fill(self, guesses: Int[Tensor, "batch width ranks"]) -> None:
        """Give the nodes expanded their children.

        Args:
            guesses: Tokens below each node, at least `num_guesses`, best first or as drawn.
        """
        level = self._shape.levels[self._num_filled]
        chosen = guesses[:, level.places, level.ranks]  # [batch, children]
        self.tokens.index_copy_(1, level.children, chosen)
        self._num_filled += 1


@lru_cache(maxsize=64)
def _shape_of(choices: Choices, *, are_drawn: bool, device: torch.device) -> _Shape:
    families: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for path in choices:
        families.setdefault(path[:-1], []).append(path)
    index = {(): 0} | {path: node for node, path in enumerate(choices, start=1)}
    above: dict[tuple[int, ...], int] = {}
    levels: list[_Level] = []
    expansions: list[tuple[int, int] | None] = [None] * (len(choices) + 1)
    expanded: list[tuple[int, ...]] = [()]
    while expanded:
        children = [path for node in expanded for path in families[node]]
        places = {node: place for place, node in enumerate(expanded)}
        ranks = [
            rank if are_drawn else path[-1]
            for node in expanded
            for rank, path in enumerate(families[node])
        ]
        nodes = [index[node] for node in expanded]
        for place, node in enumerate(nodes):
            expansions[node] = (len(levels) - 1, place)
        parents = [above.get(node[:-1], 0) for node in expanded]
        filled = [index[path] for path in children]
        beside = [places[path[:-1]] for path in children]
        levels.append(
            _Level(
                nodes=torch.tensor(nodes, device=device, dtype=torch.long),
                parents=torch.tensor(parents, device=device, dtype=torch.long),
                children=torch.tensor(filled, device=device, dtype=torch.long),
                places=torch.tensor(beside, device=device, dtype=torch.long),
                ranks=torch.tensor(ranks, device=device, dtype=torch.long),
                num_guesses=max(ranks) + 1,
            )
        )
        above = places
        expanded = [path for path in children if path in families]
    return _Shape(tuple(levels), tuple(expansions[1:]))
