"""Searches for the likeliest paths of a draft, level by level, on the host."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import nlargest
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from speclm.devices import is_host, upload
from speclm.drafting.levels import GrownTreeConfig
from speclm.drafting.ranking import Nodes
from speclm.tree.dynamic import GrownRow
from speclm.tree.static import likeliest_paths

Candidates = Callable[[Nodes, int], tuple[Tensor, Tensor]]
"""Log-probabilities and columns, ``[batch, width, ranks]`` and best first, below the nodes of a
level, counted from 0. To be asked level by level."""


@runtime_checkable
class Vocabulary(Protocol):
    """Which token of the target each column of a draft's logits is."""

    @property
    def host_columns(self) -> list[int] | None:
        """The tokens; None if the columns are the target's."""

    def target_ids(self, draft_ids: Int[Tensor, "*rows"]) -> Int[Tensor, "*rows"]:
        """Return the tokens of some columns."""


def search_on_host(
    candidates: Candidates,
    roots: Int[Tensor, " batch"],
    *,
    config: GrownTreeConfig,
    bounds: Sequence[int],
    leaf_tokens: frozenset[int],
    vocabulary: Vocabulary | None = None,
    min_growing: float = 0.0,
) -> list[GrownRow]:
    """Return the likeliest paths of each row; the host reads the candidates of every level.

    Only what may lead to a chosen node is expanded.

    Args:
        candidates: What may follow some nodes.
        roots: Token at the root of each row.
        config: Size of the trees.
        bounds: Maximum levels of each row; 0 for a row that has ended.
        leaf_tokens: Tokens after which nothing follows.
        vocabulary: Tokens of the columns; None if they are the target's.
        min_growing: No level is added when a smaller share of the rows still grows.
    """
    num_active = sum(bound > 0 for bound in bounds)
    rows = [_Row(expanded=[0] if bound > 0 else []) for bound in bounds]
    columns = None if vocabulary is None else vocabulary.host_columns
    below_first = roots.new_zeros(len(roots), 1)
    nodes = roots[:, None], below_first
    for level in range(max(bounds)):
        if level:
            width = max(len(row.expanded) for row in rows)
            num_growing = sum(bool(row.expanded) for row in rows)
            if width == 0 or num_growing < min_growing * num_active:
                break
            fed = [row.feed(level - 1, width) for row in rows]
            nodes = _sent(fed, below_first=below_first)
        scores, found = candidates(nodes, level)
        for row, values, ids, bound in zip(
            rows, *read_candidates(scores, found), bounds, strict=True
        ):
            row.grow(values, ids, config=config, leaf_tokens=leaf_tokens, columns=columns)
            if level + 1 >= bound:
                row.expanded = []
    return [row.best_nodes(config.num_draft_tokens) for row in rows]


def product_trees(
    scores: Float[Tensor, "batch levels ranks"],
    tokens: Int[Tensor, "batch levels ranks"],
    *,
    num_nodes: int,
    min_score: float,
    min_best: float,
    levels: Sequence[int],
) -> list[GrownRow]:
    """Return the likeliest paths if the tokens of a block do not depend on each other.

    Args:
        scores: Log-probabilities of the best candidates of each level, best first.
        tokens: The candidates.
        num_nodes: Maximum nodes of a row.
        min_score: Log-probability below which a path is left out.
        min_best: A row ends with the level whose likeliest path is below this.
        levels: Maximum levels of each row.

    Source: Ringel et al. 2026 (DDTree).
    """
    found = scores.nan_to_num(nan=-torch.inf, posinf=0.0, neginf=-torch.inf).clamp_(max=0)
    rows = zip(*read_candidates(found, tokens), levels, strict=True)  # the host builds the tree
    return [
        _product_row(
            row[: _num_levels(row[:depth], min_best)],
            ids,
            num_nodes=num_nodes,
            min_score=min_score,
        )
        for row, ids, depth in rows
    ]


def _num_levels(scores: list[list[float]], min_best: float) -> int:
    best = 0.0
    for level, ranks in enumerate(scores, start=1):
        best += ranks[0]
        if best < min_best:
            return level
    return len(scores)


def read_candidates(scores: Tensor, tokens: Tensor) -> tuple[list[Any], list[Any]]:
    """Return candidates on the host, in one transfer where reading waits."""
    if is_host(scores.device):
        return scores.tolist(), tokens.tolist()
    values, ids = torch.stack([scores.float(), tokens]).tolist()  # float32: exact below 2^24
    return values, [[list(map(int, node)) for node in row] for row in ids]


def _sent(fed: list[tuple[list[int], list[int]]], *, below_first: Int[Tensor, "batch 1"]) -> Nodes:
    """Return the nodes of a level on the device.

    Args:
        fed: For each row the tokens, and the indices of their parents.
        below_first: Parents of a level with one node a row, below the first node of the last one.
    """
    tokens, parents = (list(part) for part in zip(*fed, strict=True))
    if len(tokens[0]) == 1 and not any(map(any, parents)):
        return upload(tokens, below_first.device), below_first
    both = upload([tokens, parents], below_first.device)
    return both[0], both[1]


@dataclass(slots=True)
class _Row:
    """Candidates of one row, parents first; candidate 0 is the root.

    Args:
        expanded: Candidates that the next level starts from.
        tokens: Token of each candidate.
        parents: Its parent.
        scores: Log-probability of its path.
        expansions: Its level, counted from 0, and its index among the candidates of that level that
            were expanded; None if it was not.
    """

    expanded: list[int]
    tokens: list[int] = field(default_factory=lambda: [0])
    parents: list[int] = field(default_factory=lambda: [0])
    scores: list[float] = field(default_factory=lambda: [0.0])
    expansions: list[tuple[int, int] | None] = field(default_factory=lambda: [None])

    def feed(self, level: int, width: int) -> tuple[list[int], list[int]]:
        """Return tokens of the expanded candidates, and the index of the parent of each."""
        for index, node in enumerate(self.expanded):
            self.expansions[node] = level, index
        padding = [0] * (width - len(self.expanded))
        above = [self.expansions[self.parents[node]] for node in self.expanded]
        indices = [0 if at is None else at[1] for at in above]  # the root has index 0
        return [self.tokens[node] for node in self.expanded] + padding, indices + padding

    def grow(
        self,
        values: list[list[float]],
        ids: list[list[int]],
        *,
        config: GrownTreeConfig,
        leaf_tokens: frozenset[int],
        columns: list[int] | None,
    ) -> None:
        """Add the children of the expanded candidates, and choose which are expanded next."""
        first, floor = len(self.tokens), self._floor(config)
        for index, node in enumerate(self.expanded):
            reached = self.scores[node]
            for value, token in zip(values[index], ids[index], strict=True):
                score = reached + min(value, 0.0)  # rounding may exceed probability 1
                if not score >= floor:  # also true for NaN
                    break
                self.tokens.append(token if columns is None else columns[token])
                self.parents.append(node)
                self.scores.append(score)
                self.expansions.append(None)
        floor, scores = self._floor(config), self.scores
        going = [
            node
            for node in range(first, len(scores))
            if scores[node] >= floor and self.tokens[node] not in leaf_tokens
        ]
        going.sort(key=lambda node: -scores[node])
        if going and scores[going[0]] < log_of(config.min_confidence):
            going = []
        self.expanded = going[: config.width]

    def best_nodes(self, num_nodes: int) -> GrownRow:
        """Return the best candidates."""
        order = sorted(range(1, len(self.scores)), key=lambda node: -self.scores[node])
        chosen = sorted(order[:num_nodes])
        indices = {0: 0} | {node: index for index, node in enumerate(chosen, start=1)}
        return GrownRow(
            tokens=[self.tokens[node] for node in chosen],
            parents=[indices[self.parents[node]] for node in chosen],
            expansions=[self.expansions[node] for node in chosen],
            scores=[self.scores[node] for node in chosen],
        )

    def _floor(self, config: GrownTreeConfig) -> float:
        """Return the score below which a candidate is not chosen."""
        floor = log_of(config.min_probability)
        if len(self.scores) <= config.num_draft_tokens:
            return floor
        return max(floor, nlargest(config.num_draft_tokens, self.scores[1:])[-1])


def _product_row(
    scores: list[list[float]], tokens: list[list[int]], *, num_nodes: int, min_score: float
) -> GrownRow:
    nodes = likeliest_paths(scores, num_nodes=num_nodes, min_score=min_score)
    reached = [0.0]
    for node in nodes:
        reached.append(reached[node.parent] + scores[node.depth][node.rank])
    return GrownRow(
        tokens=[tokens[node.depth][node.rank] for node in nodes],
        parents=[node.parent for node in nodes],
        expansions=[(node.depth, 0) for node in nodes],
        scores=reached[1:],
    )


def log_of(probability: float) -> float:
    """Return the logarithm of a threshold, which may be 0."""
    return math.log(max(probability, 1e-30))
