"""Searches for the likeliest paths, on the host and on the device, against one over all paths."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from speclm.drafting.levels import GrownTreeConfig
from speclm.drafting.search import product_trees, search_on_host

VOCAB = 4
DEPTH = 4
ROOTS = torch.tensor([2, 0])


class Table:
    """Distributions that depend on the last two tokens and the level, and paths asked for."""

    def __init__(self, seed: int, *, branches: int = VOCAB) -> None:
        generator = torch.Generator().manual_seed(seed)
        size = (len(ROOTS), DEPTH, VOCAB, VOCAB, VOCAB)
        self.log_probs = (2 * torch.randn(size, generator=generator)).log_softmax(-1)
        self.branches = branches
        self.paths: list[list[tuple[int, ...]]] = []

    def __call__(self, nodes: tuple[Tensor, Tensor], level: int) -> tuple[Tensor, Tensor]:
        before = [[()]] * len(ROOTS) if level == 0 else self.paths
        self.paths = [
            [(*old[parent], token) for token, parent in zip(tokens, parents, strict=True)]
            for old, tokens, parents in zip(before, *(n.tolist() for n in nodes), strict=True)
        ]
        found = [[self.after(row, path) for path in own] for row, own in enumerate(self.paths)]
        best = torch.stack([torch.stack(row) for row in found]).topk(self.branches)
        return best.values, best.indices

    def after(self, row: int, path: tuple[int, ...]) -> Tensor:
        """Return the distribution after a path, which begins with the root."""
        last_two = (0, *path)[-2:]
        return self.log_probs[row, len(path) - 1][last_two]

    def scores(
        self, row: int, *, levels: int, leaves: frozenset[int]
    ) -> dict[tuple[int, ...], float]:
        """Return the log-probability of every path below the root."""
        root = (int(ROOTS[row]),)
        scored, last = {root: 0.0}, [root]
        for _ in range(levels):
            last = [
                (*path, token)
                for path in last
                if path == root or path[-1] not in leaves
                for token in range(VOCAB)
            ]
            for path in last:
                scored[path] = scored[path[:-1]] + float(self.after(row, path[:-1])[path[-1]])
        del scored[root]
        return scored


def paths_of(row, root: int) -> list[tuple[int, ...]]:
    paths = [(root,)]
    for token, parent in zip(row.tokens, row.parents, strict=True):
        paths.append((*paths[parent], token))
    return paths[1:]


@given(
    seed=st.integers(0, 10**6),
    num_nodes=st.integers(1, 12),
    least=st.sampled_from([0.0, 0.03, 0.2, 0.9]),
    bounds=st.tuples(st.integers(0, DEPTH), st.integers(1, DEPTH)),
    leaves=st.sampled_from([frozenset(), frozenset({1}), frozenset({1, 3})]),
)
def test_the_best_paths_of_all_are_found(seed, num_nodes, least, bounds, leaves):
    config = GrownTreeConfig(
        width=200, num_draft_tokens=num_nodes, min_probability=least, min_confidence=0.0
    )
    table = Table(seed)
    rows = search_on_host(table, ROOTS, config=config, bounds=bounds, leaf_tokens=leaves)
    for row, found in enumerate(rows):
        scores = table.scores(row, levels=bounds[row], leaves=leaves)
        best = sorted(scores, key=lambda path: -scores[path])[:num_nodes]
        expected = {path for path in best if scores[path] >= math.log(max(least, 1e-30))}
        paths = paths_of(found, int(ROOTS[row]))
        assert set(paths) == expected
        assert found.scores == pytest.approx([scores[path] for path in paths], abs=1e-5)


def test_expansions_say_where_the_children_of_a_node_were_asked_for():
    asked: list[list[list[tuple[int, ...]]]] = []
    table = Table(3, branches=2)

    def watched(nodes, level):
        found = table(nodes, level)
        asked.append(table.paths)
        return found

    config = GrownTreeConfig(width=2, num_draft_tokens=14, min_probability=0.0, min_confidence=0.0)
    rows = search_on_host(watched, ROOTS, config=config, bounds=[DEPTH, 2], leaf_tokens=frozenset())
    for row, found in enumerate(rows):
        paths, root = paths_of(found, int(ROOTS[row])), int(ROOTS[row])
        parents = {path[:-1] for path in paths} - {(root,)}
        for path, expansion in zip(paths, found.expansions, strict=True):
            if path in parents:
                level, index = expansion
                assert asked[level + 1][row][index] == path


def test_candidates_whose_probability_is_no_number_are_left_out():
    def candidates(nodes, level):
        values = torch.tensor([[[-0.5, -1.0]], [[math.nan, math.nan]]]).expand(
            -1, nodes[0].shape[1], -1
        )
        return values, torch.zeros_like(values, dtype=torch.long)

    config = GrownTreeConfig(width=1, num_draft_tokens=8, min_probability=0.0, min_confidence=0.0)
    good, bad = search_on_host(
        candidates, ROOTS, config=config, bounds=[2, 2], leaf_tokens=frozenset()
    )
    assert len(good.tokens) == 4
    assert bad.tokens == []


def test_a_single_node_below_a_level_of_one_has_the_parent_0():
    parents = []

    def candidates(nodes, level):
        parents.append(nodes[1].tolist())
        width = nodes[0].shape[1]
        values = torch.full((1, width, 2), -1.0)
        if level == 1:  # only the second node goes on, with one child
            values = torch.tensor([[[-9.0, -9.0], [-0.1, -9.0]]])
        elif level > 1:
            values[..., 1] = -9.0
        return values, torch.arange(2).expand(1, width, 2)

    config = GrownTreeConfig(width=2, min_probability=0.01, min_confidence=0.0)
    search_on_host(candidates, ROOTS[:1], config=config, bounds=[4], leaf_tokens=frozenset())
    assert parents == [[[0]], [[0, 0]], [[1]], [[0]]]


def test_a_level_is_added_only_while_enough_rows_grow():
    config = GrownTreeConfig(
        width=1, branches=1, num_draft_tokens=8, min_probability=0.0, min_confidence=0.0
    )
    bounds, asked = (4, 1), []

    def candidates(nodes, level):
        asked.append(level)
        return torch.zeros(2, 1, 1), torch.ones(2, 1, 1, dtype=torch.long)

    options = {"config": config, "bounds": bounds, "leaf_tokens": frozenset()}
    half = search_on_host(candidates, ROOTS, min_growing=0.5, **options)
    assert [len(row.tokens) for row in half] == [4, 1]
    most = search_on_host(candidates, ROOTS, min_growing=0.75, **options)
    assert [len(row.tokens) for row in most] == [1, 1]
    assert asked == [0, 1, 2, 3, 0]


def test_only_nodes_that_were_fed_count_as_expanded():
    """A row that ends above the others is fed padding, which is no node of it."""
    config = GrownTreeConfig(
        width=1, branches=1, num_draft_tokens=8, min_probability=0.0, min_confidence=0.0
    )

    def candidates(nodes, level):
        return torch.zeros(2, 1, 1), torch.ones(2, 1, 1, dtype=torch.long)

    long, short = search_on_host(
        candidates, ROOTS, config=config, bounds=(3, 1), leaf_tokens=frozenset()
    )
    assert long.expansions == [(0, 0), (1, 0), None]
    assert short.expansions == [None]


def test_products_are_searched_best_first_within_the_levels_of_each_row():
    scores = torch.tensor([[[0.6, 0.32], [0.5, 0.4], [0.9, 0.05]]]).log().expand(2, -1, -1)
    tokens = torch.tensor([[[7, 5], [3, 4], [9, 2]]]).expand(2, -1, -1)
    limits = {"num_nodes": 6, "min_score": -10.0, "min_best": -9.0}
    whole, short = product_trees(scores, tokens, levels=[3, 1], **limits)
    assert whole.tokens == [7, 5, 3, 9, 4, 9]
    assert whole.parents == [0, 0, 1, 3, 1, 5]
    expected = [0.6, 0.32, 0.3, 0.27, 0.24, 0.216]
    assert [math.exp(score) for score in whole.scores] == pytest.approx(expected)
    assert whole.expansions[2:4] == [(1, 0), (2, 0)]
    assert short.tokens == [7, 5]
    limits = {"num_nodes": 6, "min_score": math.log(0.28), "min_best": -9.0}
    (few,) = product_trees(scores[:1], tokens[:1], levels=[3], **limits)
    assert few.tokens == [7, 5, 3]


def test_products_end_with_the_level_whose_best_path_is_too_unlikely():
    scores = torch.tensor([[[0.6, 0.32], [0.5, 0.4], [0.9, 0.05]]]).log()
    tokens = torch.tensor([[[7, 5], [3, 4], [9, 2]]])
    for least, depth in ((0.7, 1), (0.5, 2), (0.2, 3)):
        limits = {"num_nodes": 6, "min_score": -10.0, "min_best": math.log(least)}
        (row,) = product_trees(scores, tokens, levels=[3], **limits)
        assert max(level for level, _ in row.expansions) == depth - 1
