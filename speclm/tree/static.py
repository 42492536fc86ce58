"""Static trees, written as paths of ranks: which of the best candidates follow which."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heappop, heappush
from itertools import product
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from speclm.config import MAX_DEPTH, MAX_NODES
from speclm.errors import TopologyError, TreeBudgetError, UnknownNameError, shown
from speclm.tree.topology import TreeTopology, from_parents

RankPath = tuple[int, ...]
"""Ranks from the root to a node: ``(0, 2)`` is the third best child of the best child."""

RankPaths = tuple[RankPath, ...]
"""A static tree: the path of each node but the root, parents before children."""

_MAX_RANK = 2**31 - 1  # beyond any vocabulary
_EXPECTED = "expected a preset's name, widths such as [4, 2, 1] or paths such as [[0], [0, 0]]"


@dataclass(frozen=True, slots=True, eq=False)
class StaticTree:
    """A tree of the same shape in every round.

    Args:
        paths: Path of each node but the root.
        topology: Shape of the tree, one row.
        depth_indices: Depth of each node except the root, counted from 0.
        rank_indices: Rank of each node except the root.
    """

    paths: RankPaths
    topology: TreeTopology
    depth_indices: Int[Tensor, " paths"]
    rank_indices: Int[Tensor, " paths"]

    @property
    def max_depth(self) -> int:
        """Levels below the root."""
        return self.topology.max_depth

    @property
    def max_rank(self) -> int:
        """Largest rank of any node."""
        return max(path[-1] for path in self.paths)


def normalize_paths(tree: Any) -> RankPaths:
    """Return the paths of a static tree that a user described.

    Args:
        tree: Name of a preset, the number of children of every node at each depth, or paths of
            ranks in any order.

    Raises:
        UnknownNameError: If no preset has that name.
        TopologyError: If the paths do not form a tree, or there are none.
        TreeBudgetError: If the tree is deeper than `MAX_DEPTH`.
    """
    if isinstance(tree, str):
        if tree not in PRESETS:
            raise UnknownNameError(
                f"tree {shown(tree)} is no preset; known are {sorted(PRESETS)!r}, and widths "
                "such as [4, 2, 1] or paths of ranks are taken too"
            )
        return PRESETS[tree]
    if not isinstance(tree, Sequence):
        raise TopologyError(f"tree is {shown(tree)}, {_EXPECTED}")
    widths = [width for width in tree if type(width) is int]  # True is not a width
    if widths and len(widths) == len(tree):
        return paths_of_widths(widths)
    found: list[RankPath] = [tuple(path) for path in tree if isinstance(path, Sequence)]
    if len(found) < len(tree) or any(type(rank) is not int for path in found for rank in path):
        raise TopologyError(f"tree is {shown(tree)}, {_EXPECTED}")
    paths = sorted_paths(set(found))
    _require_tree(paths)
    return paths


def sorted_paths(paths: Iterable[RankPath]) -> RankPaths:
    """Return paths in the order of nodes: by depth, then by ranks."""
    return tuple(sorted(paths, key=lambda path: (len(path), path)))


def paths_of_widths(widths: Sequence[int]) -> RankPaths:
    """Return the tree in which every node of depth d has ``widths[d]`` children.

    Raises:
        TopologyError: If a width is below 1, none is given, or the tree exceeds `MAX_NODES`.
        TreeBudgetError: If the tree is deeper than `MAX_DEPTH`.
    """
    if not widths or min(widths) < 1:
        raise TopologyError(
            f"tree widths are {shown(list(widths))}, expected at least one, each 1 or more; "
            "for example [4, 2, 1]"
        )
    _require_levels(len(widths))
    num_nodes, level = 1, 1
    for width in widths:
        level *= width
        num_nodes += level
        if num_nodes > MAX_NODES:
            raise TopologyError(
                f"tree widths {shown(list(widths))} make more than {MAX_NODES} nodes; lower them"
            )
    paths: list[tuple[int, ...]] = []
    for depth in range(1, len(widths) + 1):
        paths += product(*(range(width) for width in widths[:depth]))
    return tuple(paths)


def trim_paths(paths: RankPaths, *, max_depth: int) -> RankPaths:
    """Return the nodes that are at most `max_depth` deep."""
    return tuple(path for path in paths if len(path) <= max_depth)


@lru_cache(maxsize=64)
def static_tree(paths: RankPaths, *, device: torch.device) -> StaticTree:
    """Build the tensors of a static tree from paths as `normalize_paths` returns them."""
    node_of = {(): 0} | {path: node for node, path in enumerate(paths, start=1)}
    depths, ranks = [len(path) - 1 for path in paths], [path[-1] for path in paths]
    return StaticTree(
        paths=paths,
        topology=from_parents([[0, *(node_of[path[:-1]] for path in paths)]], device=device),
        depth_indices=torch.tensor(depths, device=device, dtype=torch.long),
        rank_indices=torch.tensor(ranks, device=device, dtype=torch.long),
    )


def _require_tree(paths: RankPaths) -> None:
    if not paths:
        raise TopologyError("tree has no paths, expected at least (0,); pass None for no drafting")
    if len(paths) >= MAX_NODES:
        raise TopologyError(
            f"tree has {len(paths)} nodes below the root, a round holds at most {MAX_NODES} with "
            "it; drop the least likely"
        )
    _require_levels(max(map(len, paths)))
    known = {(), *paths}
    for path in paths:
        if not path or min(path) < 0 or max(path) > _MAX_RANK:
            raise TopologyError(
                f"path {shown(path)} of the tree is empty, has a negative rank or one beyond any "
                "vocabulary; ranks count from 0"
            )
        if path[:-1] not in known:
            raise TopologyError(
                f"path {path!r} of the tree hangs in the air, its prefix {path[:-1]!r} is missing; "
                "list every prefix too"
            )


def _require_levels(depth: int) -> None:
    if depth > MAX_DEPTH:
        raise TreeBudgetError(
            f"tree is {depth} levels deep, a round holds at most {MAX_DEPTH}; shorten its paths"
        )


def _parse(text: str) -> RankPaths:
    """Read paths of one-digit ranks."""
    return sorted_paths(tuple(int(rank) for rank in path) for path in text.split())


PRESETS: dict[str, RankPaths] = {
    # Source: FasterDecoding/Medusa, medusa/model/medusa_choices.py (Apache-2.0), 63 nodes.
    "mc_sim_7b_63": _parse(
        "0 00 1 01 2 000 10 02 3 03 4 04 20 05 001 5 06 6 07 010 11 7 08 002 30 09 8 9 100 020 12 "
        "003 40 21 004 005 0000 011 006 030 50 13 007 008 009 60 040 14 70 012 200 31 22 80 050 15 "
        "101 021 90 060 0001 16 070"
    ),
    # Source: the same file; measured on Vicuna-7B with Medusa-2 heads, 63 nodes.
    "vicuna_7b_stage2": _parse(
        "0 00 1 01 000 10 2 02 001 03 3 010 20 4 002 04 11 100 0000 5 003 05 020 30 011 06 6 07 "
        "004 40 12 08 7 030 0001 005 21 006 101 0010 200 50 09 012 8 040 021 13 007 0002 008 110 "
        "0100 60 9 013 0003 102 050 31 0020 70 14"
    ),
    # Source: SafeAILab/EAGLE, eagle/model/choices.py (Apache-2.0), 25 nodes.
    "eagle_mc_sim_7b_63": _parse(
        "0 1 2 3 00 01 02 10 11 20 21 30 000 001 002 010 011 020 021 100 0000 0001 0002 00000 00001"
    ),
}
"""Published trees by the names of their sources."""


class ProductNode(NamedTuple):
    """A node but the root.

    Args:
        parent: Index of its parent, where the root is node 0.
        depth: Distance from the root, counted from 0.
        rank: Rank of its token among the candidates at its depth.
    """

    parent: int
    depth: int
    rank: int


def likeliest_paths(
    log_probs: Sequence[Sequence[float]], *, num_nodes: int, min_score: float
) -> list[ProductNode]:
    """Return the paths with the largest products of probabilities, parents before children.

    Args:
        log_probs: For each depth the log-probabilities of its candidates, largest first.
        num_nodes: Maximum nodes, root excluded.
        min_score: Log-probability below which a path is left out.
    """
    nodes: list[ProductNode] = []
    # Entries: minus the score, depth, rank, parent, score of the parent. A node's next sibling
    # and its first child are at most as likely as the node, so they come after it.
    candidates: list[tuple[float, int, int, int, float]] = []

    def push(depth: int, rank: int, parent: int, parent_score: float) -> None:
        if depth < len(log_probs) and rank < len(log_probs[depth]):
            score = parent_score + log_probs[depth][rank]
            if score >= min_score:
                heappush(candidates, (-score, depth, rank, parent, parent_score))

    push(0, 0, 0, 0.0)
    while candidates and len(nodes) < num_nodes:
        cost, depth, rank, parent, parent_score = heappop(candidates)
        nodes.append(ProductNode(parent, depth, rank))
        push(depth, rank + 1, parent, parent_score)
        push(depth + 1, 0, len(nodes), -cost)
    return nodes
