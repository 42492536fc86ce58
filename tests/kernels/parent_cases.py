"""Parents of trees, and bits and depths from paths that go up from each node by itself."""

import random

from hypothesis import strategies as st
from torch import Tensor

SIZES = (1, 2, 17, 33, 63, 64, 65, 127, 128, 129, 256)


def walk(parents: list[int], node: int) -> list[int]:
    """A node and what lies above it, in this order; padding has nothing above it."""
    path = [node]
    while parents[path[-1]] != path[-1]:
        path.append(parents[path[-1]])
    return path


def assert_right(found: tuple[Tensor, Tensor], parents: list[list[int]]) -> None:
    """Hold words and depths against paths, word by word."""
    words, depths = (part.tolist() for part in found)
    for row, tree in enumerate(parents):
        paths = [walk(tree, node) for node in range(len(tree))]
        assert depths[row] == [len(path) - 1 for path in paths]
        bits = [sum(word % 2**64 << 64 * i for i, word in enumerate(row)) for row in words[row]]
        assert bits == [sum(1 << node for node in path) for path in paths]


def chain(nodes: int) -> list[int]:
    """Parents of one path."""
    return [0, *range(nodes - 1)]


def star(nodes: int) -> list[int]:
    """Parents of a root with children."""
    return [0] * nodes


def scattered(nodes: int, seed: int = 0) -> list[int]:
    """Parents of a random tree with padding in its midst."""
    rng, parents, inside = random.Random(seed), [0], [0]
    for node in range(1, nodes):
        if rng.random() < 0.1:
            parents.append(node)
        else:
            parents.append(rng.choice(inside[-8:]))
            inside.append(node)
    return parents


@st.composite
def trees(draw: st.DrawFn, *, most_nodes: int = 70) -> list[list[int]]:
    """Rows of equal size, of any shape, with padding anywhere."""
    nodes = draw(st.sampled_from([n for n in SIZES if n <= most_nodes]) | st.integers(1, 12))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        parents, inside = [0], [0]
        for node in range(1, nodes):
            parent = draw(st.sampled_from([node, *inside[-5:], inside[0]]))
            parents.append(parent)
            if parent != node:
                inside.append(node)
        rows.append(parents)
    return rows
