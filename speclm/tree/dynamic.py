"""Grows a tree level by level and keeps its best nodes."""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from speclm.tree.static import Choices, static_tree
from speclm.tree.topology import TreeTopology

_DRAWN_PROBABILITY = 0.65  # a usual overlap of the distributions of a draft model and its target


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
        # What is no number would break the order of parents and children: nothing is so unlikely.
        scores = best.values.nan_to_num(nan=-torch.inf, posinf=0.0, neginf=-torch.inf)
        scores = scores.clamp(max=0)  # rounding may make a sure child likelier than that
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
            self._has_stopped = torch.tensor(
                stopped, device=self._levels[-1].scores.device, dtype=torch.bool
            )
        self._stopped = stopped
        num_idle = sum(self._is_idle or ())
        return stopped.count(False) / max(len(stopped) - num_idle, 1)

    def best_nodes(self, num_nodes: int, *, min_score: float) -> list[GrownRow]:
        """Return the `num_nodes` best candidates of each row with a score of at least `min_score`.

        Nodes are chosen on the device, and read by the host in one transfer.
        """
        scores = torch.cat([level.scores for level in self._levels], dim=1)
        num_candidates = scores.shape[1]
        # No child scores above its parent, and of equals a stable sort takes the parent first: so
        # the best are a tree.
        best = scores.sort(dim=1, descending=True, stable=True)
        values, order = best.values[:, :num_nodes], best.indices[:, :num_nodes]
        kept = order.masked_fill(values < min_score, num_candidates).sort(dim=1).values
        chosen = kept.clamp(max=num_candidates - 1)  # what is left out comes last
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
    """Return a row from what the device chose.

    Args:
        kept: Candidates, counted over all levels, ascending; beyond all where none is left.
        tokens: Of each.
        scores: Of each.
        expanded: Candidates of every level that the next one starts from, counted within it.
        ends: Candidates up to each level and in it.
        branches: Children considered for each expanded node.
    """
    num = bisect_left(kept, ends[-1])
    grown = GrownRow(tokens[:num], [], [], scores[:num])
    nodes: list[dict[int, int]] = [{} for _ in ends]  # from the place in a level to the node
    for node, candidate in enumerate(kept[:num], start=1):
        depth = bisect_right(ends, candidate)
        place = candidate - (ends[depth - 1] if depth else 0)
        nodes[depth][place] = node
        above = expanded[depth - 1][place // branches] if depth else -1
        grown.parents.append(nodes[depth - 1][above] if depth else 0)
        at_level = expanded[depth]
        grown.expansions.append((depth, at_level.index(place)) if place in at_level else None)
    return grown


@lru_cache(maxsize=64)
def drawn_choices(
    *, width: int, branches: int, depth: int, num_nodes: int
) -> tuple[tuple[int, ...], ...]:
    """Return the shape of a tree whose tokens are drawn, and so may not shape it.

    The places that are likeliest to be reached are kept, if the first child drawn were accepted
    with one probability at every node, and each further one with that probability of what is left.

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
            (score * _DRAWN_PROBABILITY * (1 - _DRAWN_PROBABILITY) ** rank, (*path, rank))
            for score, path in expanded
            for rank in range(branches)
        ]
        level.sort(key=lambda entry: (-entry[0], entry[1]))
        expanded = level[:width]
        scored += level
    scored.sort(key=lambda entry: (-entry[0], len(entry[1]), entry[1]))
    kept = [path for _, path in scored[:num_nodes]]
    return tuple(sorted(kept, key=lambda path: (len(path), path)))


@dataclass(frozen=True, slots=True, eq=False)
class _FilledLevel:
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

    levels: tuple[_FilledLevel, ...]
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
    levels: list[_FilledLevel] = []
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
        indices = [places[path[:-1]] for path in children]
        levels.append(
            _FilledLevel(
                nodes=torch.tensor(nodes, device=device, dtype=torch.long),
                parents=torch.tensor(parents, device=device, dtype=torch.long),
                children=torch.tensor(filled, device=device, dtype=torch.long),
                places=torch.tensor(indices, device=device, dtype=torch.long),
                ranks=torch.tensor(ranks, device=device, dtype=torch.long),
                num_guesses=max(ranks) + 1,
            )
        )
        above = places
        expanded = [path for path in children if path in families]
    return _Shape(tuple(levels), tuple(expansions[1:]))
