"""Trees whose nodes a device chooses from a larger tree of fixed shape."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from speclm.tree.static import RankPath
from speclm.tree.topology import TreeTopology

_LEAST_LOG_PROB = -50.0
"""Sums of log-probabilities that are not smaller are exact enough."""
_LEVEL_COST = 0.01
"""What a level costs a node: more than sums are rounded by, so that no child ties its parent."""


class ChosenNodes(NamedTuple):
    """The nodes that every row takes from an enclosing tree, root included, parents first.

    Args:
        tokens: Token at each node.
        nodes: Its index in the enclosing tree.
        values: See `EnclosingTree.values`.
        lines: Its parent, the path to it, padded with 0, and the node itself.
        masks: See `EnclosingTree.masks`.
    """

    tokens: Int[Tensor, "batch nodes"]
    nodes: Int[Tensor, "batch nodes"]
    values: Int[Tensor, "batch nodes three"]
    lines: Int[Tensor, "batch nodes line"]
    masks: Bool[Tensor, "batch nodes nodes two"]

    def topology(self, *, is_labelled: bool = False) -> TreeTopology:
        """Return the shape of the trees, which the host does not know.

        Args:
            is_labelled: Whether the host will need to know `nodes`.
        """
        _, depths, deepest_first = self.values.unbind(2)
        mask, inner_mask = self.masks.unbind(3)
        return TreeTopology(
            self.lines[:, :, 0],
            depths,
            max_depth=self.lines.shape[2] - 3,
            labels=self.nodes if is_labelled else None,
            ancestor_mask=mask,
            inner_mask=inner_mask,
            path_ends=self.lines[:, :, 1:],
            deepest_first=deepest_first,
        )


@dataclass(frozen=True, slots=True, eq=False)
class EnclosingTree:
    """A tree with the likeliest ranks at each level, from which rows take their likeliest nodes.

    Choosing makes the same tensor calls for every depth, and reads nothing on the host.

    Args:
        num_nodes: Nodes, root included.
        expansions: For each node but the root the level below it and its index among the nodes that
            are expanded there, as `FilledTree.expansions` has it; None if it has no children.
        expanded: For each level but the first the nodes whose children are candidates there, as
            indices among the candidates of the level before.
        parents: For each level but the first, the index of the parent of each of these among the
            nodes that were expanded before.
        steps: Indices of the log-probabilities along the path to each node; the number of all
            log-probabilities stands for none.
        values: For each node the index of its token, its depth, and `TreeTopology.deepest_first`.
        lines: See `ChosenNodes`.
        masks: At ``[i, j]`` whether node j is node i or one of its ancestors, and the same without
            the root.
        least: Log-probability that smaller ones, and NaN, count as.
    """

    num_nodes: int
    expansions: tuple[tuple[int, int] | None, ...]
    expanded: tuple[Int[Tensor, " _"], ...]
    parents: tuple[Int[Tensor, "1 _"], ...]
    steps: Int[Tensor, "nodes depth"]
    values: Int[Tensor, "nodes three"]
    lines: Int[Tensor, "nodes line"]
    masks: Bool[Tensor, "nodes nodes two"]
    least: Float[Tensor, ""]

    def choose(
        self,
        log_probs: Float[Tensor, "batch candidates"],
        tokens: Int[Tensor, "batch root_and_candidates"],
        *,
        num_nodes: int,
    ) -> ChosenNodes:
        """Return the likeliest nodes of each row.

        Args:
            log_probs: Log-probability of each candidate after its parent, level by level, in
                float32.
            tokens: Token at the root, and of each candidate.
            num_nodes: Nodes to choose, root included, if there are as many.
        """
        # A level that a node does not reach adds to its score.
        known = F.pad(torch.fmax(log_probs, self.least), (0, 1), value=_LEVEL_COST)
        scores = known[:, self.steps].sum(2)  # [batch, nodes of this tree]
        # No child scores as much as its parent, so the best nodes form a tree.
        nodes = scores.topk(min(num_nodes, self.num_nodes), dim=1).indices.sort(dim=1).values
        values, lines = self.values[nodes], self.lines[nodes]
        return ChosenNodes(
            tokens=tokens.gather(1, values[:, :, 0]),
            nodes=nodes,
            values=values,
            lines=torch.searchsorted(nodes, lines.flatten(1)).view(lines.shape),
            masks=self.masks[nodes[:, :, None], nodes[:, None]],
        )


@lru_cache(maxsize=64)
def enclosing_tree(
    *, depth: int, width: int, num_ranks: int, is_chained: bool, device: torch.device
) -> EnclosingTree:
    """Return the tree over some levels of candidates.

    Args:
        depth: Levels.
        width: Maximum nodes of a level that have children: those of the lowest ranks.
        num_ranks: Children of each of them, best first.
        is_chained: Whether the candidates of a level depend on the node that they follow. Each
            expanded node has `num_ranks` of its own then; otherwise each level has.
        device: Where the tensors are put.
    """
    levels = _expanded_paths(depth, width, num_ranks)
    candidates: dict[RankPath, int] = {}  # index of each among those of its level
    first = [0]  # number of candidates before each level
    for expanded in levels:
        for index, path in enumerate(expanded):
            for rank in range(num_ranks):
                candidates[*path, rank] = index * is_chained * num_ranks + rank
        first.append(first[-1] + num_ranks * (len(expanded) if is_chained else 1))
    nodes = {path: node for node, path in enumerate([(), *candidates])}
    index_of = {path: index for expanded in levels for index, path in enumerate(expanded)}
    steps, values, lines = [], [], []
    masks = torch.zeros(len(nodes), len(nodes), 2, device="cpu", dtype=torch.bool)
    for node, path in enumerate(nodes):
        above = [path[:length] for length in range(1, len(path) + 1)]
        on_path = [first[len(own) - 1] + candidates[own] for own in above]
        line = [0, *(nodes[own] for own in above)]
        steps.append(on_path + [first[-1]] * (depth - len(path)))
        values.append(
            [on_path[-1] + 1 if path else 0, len(path), (len(path) + 1) * len(nodes) - node]
        )
        lines.append([line[max(len(path) - 1, 0)], *line, *[0] * (depth - len(path)), node])
        masks[node, line, 0] = True
        masks[node, line[1:], 1] = True

    def tensor(rows: list[list[int]] | list[int]) -> Tensor:
        return torch.tensor(rows, device=device, dtype=torch.long)

    return EnclosingTree(
        num_nodes=len(nodes),
        expansions=tuple(
            (len(path) - 1, index_of[path]) if path in index_of else None for path in candidates
        ),
        expanded=tuple(tensor([candidates[path] for path in level]) for level in levels[1:]),
        parents=tuple(tensor([[index_of[path[:-1]] for path in level]]) for level in levels[1:]),
        steps=tensor(steps),
        values=tensor(values),
        lines=tensor(lines),
        masks=masks.to(device),
        least=torch.tensor(_LEAST_LOG_PROB, device=device, dtype=torch.float32),
    )


def _expanded_paths(depth: int, width: int, num_ranks: int) -> list[list[RankPath]]:
    """Return the nodes with children at each level, as paths of ranks."""
    levels: list[list[RankPath]] = [[()]]
    costs: dict[RankPath, float] = {(): 1.0}
    for _ in range(1, depth):
        # Probabilities fall about with the square of the rank.
        costs = {
            (*path, rank): costs[path] * (2 + rank)
            for path in levels[-1]
            for rank in range(num_ranks)
        }
        levels.append(sorted(sorted(costs, key=lambda path: (costs[path], path))[:width]))
    return levels
