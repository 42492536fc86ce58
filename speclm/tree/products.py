"""Grows the tree of the likeliest paths when the guesses at each depth are independent."""

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import NamedTuple


class ProductNode(NamedTuple):
    """A guess below the root.

    Args:
        parent: Index of the parent in the tree, where the root is node 0.
        depth: Distance from the root, counted from 0.
        rank: Which of the guesses at its depth.
    """

    parent: int
    depth: int
    rank: int


def likeliest_paths(
    log_probs: Sequence[Sequence[float]], *, num_nodes: int, min_score: float
) -> list[ProductNode]:
    """Return the paths with the largest products of probabilities, parents before children.

    Args:
        log_probs: For each depth the log-probabilities of its guesses, largest first.
        num_nodes: Most nodes, the root left out.
        min_score: Log-probability below which a path is left out.
    """
    nodes: list[ProductNode] = []
    # Entries: minus the score, depth, rank, parent, score of the parent. A node's next sibling
    # and its first child are no likelier than itself, so that they come after it.
    frontier: list[tuple[float, int, int, int, float]] = []

    def push(depth: int, rank: int, parent: int, above: float) -> None:
        if depth < len(log_probs) and rank < len(log_probs[depth]):
            score = above + log_probs[depth][rank]
            if score >= min_score:
                heappush(frontier, (-score, depth, rank, parent, above))

    push(0, 0, 0, 0.0)
    while frontier and len(nodes) < num_nodes:
        cost, depth, rank, parent, above = heappop(frontier)
        nodes.append(ProductNode(parent, depth, rank))
        push(depth, rank + 1, parent, above)
        push(depth + 1, 0, len(nodes), -cost)
    return nodes
