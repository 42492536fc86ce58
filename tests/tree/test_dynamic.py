"""Grown trees against a search over all paths, and filled trees level by level."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from speclm.tree.dynamic import FilledTree, GrowingTree
from speclm.tree.static import PRESETS, normalize_paths

VOCAB = 4
PENALTY = 1e-4  # of a whole path at most: every step is charged a little


def distributions(seed: int, batch: int, depth: int) -> list[list[dict[tuple[int, ...], Tensor]]]:
    """Return for each row and level the distribution after every path, a function of the path."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(batch, depth, VOCAB, VOCAB, VOCAB, generator=generator).log_softmax(-1)
    return [[table[row, level] for level in range(depth)] for row in range(batch)]


def distribution_after(tables: list[Tensor], path: tuple[int, ...]) -> Tensor:
    last_two = [0, 0, *path][-2:]
    return tables[len(path)][last_two[0], last_two[1]]


def grow(tables: list[list[Tensor]], *, width: int, branches: int, depth: int) -> GrowingTree:
    tree = GrowingTree(width=width)
    paths: list[list[tuple[int, ...]]] = [[()] for _ in tables]
    for level in range(depth):
        if level:
            tokens, parents = tree.expanded_tokens.tolist(), tree.expanded_parents.tolist()
            paths = [
                [(*old[parent], token) for token, parent in zip(row, above, strict=True)]
                for old, row, above in zip(paths, tokens, parents, strict=True)
            ]
        log_probs = [
            torch.stack([distribution_after(tables[row], path) for path in row_paths])
            for row, row_paths in enumerate(paths)
        ]
        tree.add(*torch.stack(log_probs).topk(branches))
    return tree


def brute_force(
    tables: list[Tensor], *, width: int, branches: int, depth: int
) -> dict[tuple[int, ...], float]:
    """Return the score of every candidate, expanding the `width` best of each level."""
    candidates: dict[tuple[int, ...], float] = {}
    expanded: dict[tuple[int, ...], float] = {(): 0.0}
    for _ in range(depth):
        level = {}
        for path, score in expanded.items():
            distribution = distribution_after(tables, path)
            for token in distribution.argsort(descending=True)[:branches].tolist():
                level[(*path, token)] = score + float(distribution[token])
        candidates |= level
        best = sorted(level, key=level.__getitem__, reverse=True)[:width]
        expanded = {path: level[path] for path in best}
    return candidates


@given(
    seed=st.integers(0, 10**6),
    width=st.integers(1, 4),
    branches=st.integers(1, VOCAB),
    depth=st.integers(1, 4),
    num_nodes=st.integers(1, 12),
)
def test_best_nodes_are_those_of_a_search_over_all_paths(seed, width, branches, depth, num_nodes):
    tables = distributions(seed, 2, depth)
    tree = grow(tables, width=width, branches=branches, depth=depth)
    assert tree.depth == depth
    for row, grown in enumerate(tree.best_nodes(num_nodes, min_score=-math.inf)):
        expected = brute_force(tables[row], width=width, branches=branches, depth=depth)
        best = sorted(expected.values(), reverse=True)[:num_nodes]
        paths = paths_of(grown.tokens, grown.parents)
        assert len(set(paths)) == len(paths) == len(best)
        for path, score in zip(paths, grown.scores, strict=True):
            assert score == pytest.approx(expected[path], abs=PENALTY)
        assert sorted(grown.scores, reverse=True) == pytest.approx(best, abs=PENALTY)


def paths_of(tokens: list[int], parents: list[int]) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = [()]
    for node, (token, parent) in enumerate(zip(tokens, parents, strict=True), start=1):
        assert parent < node, "a parent comes before its children"
        paths.append((*paths[parent], token))
    return paths[1:]


def test_expansions_say_where_a_node_was_fed():
    tables = distributions(3, 1, 3)
    tree = grow(tables, width=2, branches=2, depth=3)
    fed = tree.expanded_tokens  # of the last level: would be fed next
    (grown,) = tree.best_nodes(50, min_score=-math.inf)
    depths = [len(path) for path in paths_of(grown.tokens, grown.parents)]
    for token, depth, place in zip(grown.tokens, depths, grown.expansions, strict=True):
        if place is not None:
            assert place[0] == depth - 1
            if depth == 3:
                assert int(fed[0, place[1]]) == token
    assert sum(place is not None for place in grown.expansions) == 6


@pytest.mark.parametrize("where", [(0, slice(None)), (2, slice(None)), (1, 3), (2, 0)], ids=str)
def test_nodes_whose_probability_is_no_number_are_left_out(where):
    tables = distributions(4, batch=1, depth=3)
    level, token = where
    tables[0][level][..., token] = math.nan  # an overflow in the proposer's network

    tree = grow(tables, width=3, branches=3, depth=3)

    for num_nodes in (4, 12):
        (row,) = tree.best_nodes(num_nodes, min_score=math.log(1e-30))
        depths = [0]
        for parent in row.parents:
            depths.append(depths[parent] + 1)
        assert not any(map(math.isnan, row.scores))
        if token == slice(None):
            assert max(depths) <= level
        else:
            assert (level + 1, token) not in zip(depths[1:], row.tokens, strict=True)


def test_min_score_leaves_unlikely_nodes_out():
    tables = distributions(5, 2, 3)
    tree = grow(tables, width=3, branches=3, depth=3)
    everything = tree.best_nodes(50, min_score=-math.inf)
    for row, grown in enumerate(tree.best_nodes(50, min_score=-2.0)):
        assert grown.scores == [score for score in everything[row].scores if score >= -2.0]
    assert [row.tokens for row in tree.best_nodes(50, min_score=1.0)] == [[], []]


def test_certain_children_come_after_their_parent():
    distribution = torch.full((1, 1, VOCAB), -math.inf)
    distribution[..., 2] = 0.0
    tree = GrowingTree(width=1)
    for _ in range(3):
        tree.add(*distribution.topk(1))
    (grown,) = tree.best_nodes(2, min_score=-1.0)
    assert (grown.tokens, grown.parents) == ([2, 2], [0, 1])


@given(
    steps=st.lists(
        st.lists(st.sampled_from([0.0, -0.5, -20.0]), min_size=9, max_size=9), max_size=5
    ),
    num_nodes=st.integers(1, 12),
)
def test_best_nodes_are_a_tree_however_many_score_the_same(steps, num_nodes):
    """Sure children score as their parents do, and far below others a small step is lost."""
    tree = GrowingTree(width=3)
    tree.add(*torch.tensor([[[-30.0, -30.0, 1e-7]]]).topk(3))
    for step in steps:
        tree.add(*torch.tensor(step).view(1, 3, 3).topk(3))
    (grown,) = tree.best_nodes(num_nodes, min_score=-math.inf)
    paths_of(grown.tokens, grown.parents)  # which checks the order
    above = [0.0, *grown.scores]
    assert all(
        score <= above[parent] for score, parent in zip(grown.scores, grown.parents, strict=True)
    )
    assert len(grown.tokens) == min(num_nodes, 3 + 9 * len(steps))
    for node, place in enumerate(grown.expansions, start=1):
        assert place is not None or node not in grown.parents


def test_leaf_tokens_stay_in_the_tree_and_are_not_expanded():
    distribution = torch.log(torch.tensor([[[0.5, 0.3, 0.15, 0.05]]]))
    tree = GrowingTree(width=2, leaf_tokens=torch.tensor([0]))
    tree.add(*distribution.topk(3))
    assert tree.expanded_tokens.tolist() == [[1, 2]]
    tree.add(*distribution.expand(1, 2, -1).topk(3))
    (grown,) = tree.best_nodes(99, min_score=-100.0)
    paths = paths_of(grown.tokens, grown.parents)
    assert (0,) in paths
    assert (1, 0) in paths
    assert not any(0 in path[:-1] for path in paths)


def test_rows_that_are_stopped_keep_their_nodes_and_get_no_more():
    tree = GrowingTree(width=1)
    level = torch.tensor([[[0.9, 0.1]], [[0.9, 0.1]]]).log()
    tree.add(*level.topk(2))
    tree.stop_rows(torch.tensor([False, True]))
    tree.add(*level[:, :1].topk(2))
    going, stopped = tree.best_nodes(9, min_score=-10.0)
    assert len(going.tokens) == 4
    assert stopped.tokens == [0, 1]


def test_idle_rows_get_no_nodes():
    distribution = torch.log(torch.tensor([[[0.9, 0.05, 0.03, 0.02]]] * 3))
    tree = GrowingTree(width=1, is_idle=torch.tensor([False, True, False]))
    for _ in range(2):
        tree.add(*distribution.topk(1))
    assert [len(row.tokens) for row in tree.best_nodes(9, min_score=-100.0)] == [2, 0, 2]


SKEWED = ((0,), (2,), (0, 1), (2, 0), (2, 3), (2, 3, 0))


def fill(paths, roots, *, are_drawn=False):
    """Fill a tree with tokens that spell out the path to a node: ``10 * parent + rank + 1``."""
    tree = FilledTree(paths, roots=torch.tensor(roots), are_drawn=are_drawn)
    while not tree.is_full:
        ranks = torch.arange(1, tree.num_ranks + 1)
        tree.fill(10 * tree.expanded_tokens[:, :, None] + ranks)
    return tree


def test_children_take_the_candidate_of_their_rank_below_their_own_parent():
    tree = fill(SKEWED, [0, 7])
    assert tree.tokens.tolist() == [
        [0, 1, 3, 12, 31, 34, 341],
        [7, 71, 73, 712, 731, 734, 7341],
    ]
    assert tree.topology.parents.tolist() == [[0, 0, 0, 1, 2, 2, 5]]


def test_drawn_children_take_candidates_in_the_order_of_their_nodes():
    assert fill(SKEWED, [0], are_drawn=True).tokens.tolist() == [[0, 1, 2, 11, 21, 22, 221]]


def test_nodes_without_children_are_not_expanded():
    tree = FilledTree(SKEWED, roots=torch.tensor([5]))
    seen = []
    while not tree.is_full:
        seen.append((tree.expanded_nodes.tolist(), tree.expanded_parents.tolist(), tree.num_ranks))
        tree.fill(torch.zeros(1, len(tree.expanded_nodes), tree.num_ranks, dtype=torch.long))
    assert seen == [([0], [[0]], 3), ([1, 2], [[0, 0]], 4), ([5], [[1]], 1)]
    assert tree.depth == 3
    assert tree.expansions == [(0, 0), (0, 1), None, None, (1, 0), None]


@given(
    st.one_of(
        st.sampled_from(sorted(PRESETS)),
        st.lists(st.integers(1, 3), min_size=1, max_size=4),
    )
)
def test_every_node_is_the_candidate_that_its_path_names(tree):
    paths = normalize_paths(tree)
    filled = fill(paths, [0])
    for path, token in zip(paths, filled.tokens[0, 1:].tolist(), strict=True):
        expected = 0
        for rank in path:
            expected = 10 * expected + rank + 1
        assert token == expected
