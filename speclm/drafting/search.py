"""Searches for the likeliest paths of a draft, level by level, on the host or on the device."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from heapq import nlargest
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from speclm.devices import is_host
from speclm.drafting.levels import GrownTreeConfig
from speclm.drafting.ranking import Nodes
from speclm.tree.dynamic import GrowingTree, GrownRow

Candidates = Callable[[Nodes, int], tuple[Tensor, Tensor]]
"""Log-probabilities and tokens, ``[batch, width, ranks]`` and best first, below the nodes of a
level, counted from 0. To be asked level by level."""


def search(
    candidates: Candidates,
    roots: Int[Tensor, " batch"],
    *,
    config: GrownTreeConfig,
    bounds: Sequence[int],
    leaf_tokens: frozenset[int],
    min_growing: float | None = None,
) -> list[GrownRow]:
    """Return the likeliest paths of each row.

    Args:
        candidates: What may follow some nodes.
        roots: Token at the root of each row.
        config: Size of the trees.
        bounds: Maximum levels of each row; 0 for a row that has ended.
        leaf_tokens: Tokens after which nothing follows.
        min_growing: If each level costs a run of a network: no level is added when a smaller share
            of the rows still grows.
    """
    # A host chooses faster, and stops when the tree is complete: a level costs more than a wait.
    if min_growing is not None or is_host(roots.device):
        return search_on_host(
            candidates,
            roots,
            config=config,
            bounds=bounds,
            leaf_tokens=leaf_tokens,
            min_growing=min_growing or 0.0,
        )
    return search_on_device(
        candidates, roots, config=config, bounds=bounds, leaf_tokens=leaf_tokens
    )


def search_on_device(
    candidates: Candidates,
    roots: Int[Tensor, " batch"],
    *,
    config: GrownTreeConfig,
    bounds: Sequence[int],
    leaf_tokens: frozenset[int],
) -> list[GrownRow]:
    """Search level by level, see `search`; the host reads the chosen nodes, and nothing before.

    Every level expands `width` nodes.
    """
    device = roots.device
    tree = GrowingTree(
        width=config.width,
        leaf_tokens=_leaves(leaf_tokens, device),
        is_idle=_are_over(bounds, 0, device),
    )
    nodes = roots[:, None], torch.zeros_like(roots)[:, None]
    for level in range(max(bounds)):
        if level:
            over = _are_over(bounds, level, device)
            if over is not None:
                tree.stop_rows(over)
            if config.min_confidence > config.min_probability:
                tree.stop_rows(tree.expanded_scores[:, 0] < log_of(config.min_confidence))
            nodes = tree.expanded_tokens, tree.expanded_parents
        tree.add(*candidates(nodes, level))
    return tree.best_nodes(config.num_draft_tokens, min_score=log_of(config.min_probability))


def search_on_host(
    candidates: Candidates,
    roots: Int[Tensor, " batch"],
    *,
    config: GrownTreeConfig,
    bounds: Sequence[int],
    leaf_tokens: frozenset[int],
    min_growing: float = 0.0,
) -> list[GrownRow]:
    """Return the same as `search_on_device`, and expand only what may lead to a chosen node.

    Reads the candidates of every level.
    """
    num_active = sum(bound > 0 for bound in bounds)
    rows = [_Row(expanded=[0] if bound > 0 else []) for bound in bounds]
    nodes = roots[:, None], torch.zeros_like(roots)[:, None]
    for level in range(max(bounds)):
        if level:
            width = max(len(row.expanded) for row in rows)
            num_growing = sum(bool(row.expanded) for row in rows)
            if width == 0 or num_growing < min_growing * num_active:
                break
            padded = [row.feed(level - 1, width) for row in rows]
            tokens, parents = torch.tensor(padded, device=roots.device, dtype=torch.long).unbind(1)
            nodes = tokens, parents
        scores, found = candidates(nodes, level)
        for row, values, ids, bound in zip(rows, *_read(scores, found), bounds, strict=True):
            row.grow(values, ids, config=config, leaf_tokens=leaf_tokens)
            if level + 1 >= bound:
                row.expanded = []
    return [row.best_nodes(config.num_draft_tokens) for row in rows]


def _read(scores: Tensor, tokens: Tensor) -> tuple[list[Any], list[Any]]:
    """Return candidates on the host, in one transfer where reading waits."""
    if is_host(scores.device):
        return scores.tolist(), tokens.tolist()
    values, ids = torch.stack([scores.float(), tokens.float()]).tolist()  # exact below 2^24
    return values, [[list(map(int, node)) for node in row] for row in ids]


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
    ) -> None:
        """Add the children of the expanded candidates, and choose which are expanded next."""
        first, floor = len(self.tokens), self._floor(config)
        for index, node in enumerate(self.expanded):
            reached = self.scores[node]
            for value, token in zip(values[index], ids[index], strict=True):
                score = reached + min(value, 0.0)  # rounding may exceed probability 1
                if not score >= floor:  # also true for NaN
                    break
                self.tokens.append(token)
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
        places = {0: 0} | {node: place for place, node in enumerate(chosen, start=1)}
        return GrownRow(
            tokens=[self.tokens[node] for node in chosen],
            parents=[places[self.parents[node]] for node in chosen],
            expansions=[self.expansions[node] for node in chosen],
            scores=[self.scores[node] for node in chosen],
        )

    def _floor(self, config: GrownTreeConfig) -> float:
        """Return the score below which a candidate is not chosen."""
        floor = log_of(config.min_probability)
        if len(self.scores) <= config.num_draft_tokens:
            return floor
        return max(floor, nlargest(config.num_draft_tokens, self.scores[1:])[-1])


def log_of(probability: float) -> float:
    """Return the logarithm of a threshold, which may be 0."""
    return math.log(max(probability, 1e-30))


@lru_cache(maxsize=16)
def _leaves(tokens: frozenset[int], device: torch.device) -> Tensor | None:
    return torch.tensor(sorted(tokens), device=device, dtype=torch.long) if tokens else None


def _are_over(bounds: Sequence[int], level: int, device: torch.device) -> Tensor | None:
    """Return which rows have no nodes at a level; None if all may have some."""
    if min(bounds) > level:
        return None
    return torch.tensor([bound <= level for bound in bounds], device=device, dtype=torch.bool)
