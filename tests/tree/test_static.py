import math
from collections import Counter
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speclm.config import MAX_NODES
from speclm.errors import TopologyError, UnknownNameError
from speclm.tree.static import (
    PRESETS,
    likeliest_paths,
    normalize_paths,
    paths_of_widths,
    static_tree,
    trim_paths,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "per_depth"),
    [
        ("mc_sim_7b_63", [10, 28, 23, 2]),
        ("vicuna_7b_stage2", [10, 23, 23, 7]),
        ("eagle_mc_sim_7b_63", [4, 8, 8, 3, 2]),
    ],
)
def test_presets_have_the_published_number_of_nodes_at_each_depth(name, per_depth):
    counts = Counter(map(len, normalize_paths(name)))
    assert [counts[depth] for depth in sorted(counts)] == per_depth


def test_widths_give_every_node_of_a_depth_as_many_children():
    assert normalize_paths([2, 1]) == ((0,), (1,), (0, 0), (1, 0))
    assert len(paths_of_widths([3, 2, 2])) == 3 + 6 + 12


def test_paths_are_sorted_by_depth_and_twins_dropped():
    paths = [[0, 0], [1], [0], [0, 0]]
    assert normalize_paths(paths) == ((0,), (1,), (0, 0))


def test_static_tree_holds_parents_depths_and_ranks():
    tree = static_tree(((0,), (2,), (2, 0), (2, 0, 1)), device=CPU)
    assert tree.topology.parents.tolist() == [[0, 0, 0, 2, 3]]
    assert tree.depth_indices.tolist() == [0, 0, 1, 2]
    assert tree.rank_indices.tolist() == [0, 2, 0, 1]
    assert (tree.max_depth, tree.max_rank) == (3, 2)


def test_trimming_leaves_what_is_no_deeper():
    for paths in PRESETS.values():
        assert max(map(len, trim_paths(paths, max_depth=2))) == 2
        static_tree(trim_paths(paths, max_depth=2), device=CPU)


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=20))
def test_paths_with_all_their_prefixes_are_a_tree_in_any_order(paths):
    whole = [path[:length] for path in paths for length in range(len(path), 0, -1)]
    paths = normalize_paths(whole)
    tree = static_tree(paths, device=CPU)
    assert tree.topology.num_nodes == len({tuple(path) for path in whole}) + 1
    for node, path in enumerate(paths, start=1):
        assert tree.topology.depths[0, node] == len(path)


@pytest.mark.parametrize(
    ("tree", "error", "words"),
    [
        ("mc_sim_8b", UnknownNameError, "mc_sim_7b_63"),
        ([[0], [1, 0]], TopologyError, "prefix"),
        ([[0], [-1]], TopologyError, "negative"),
        ([], TopologyError, "no paths"),
        ([[0], [0.5]], TopologyError, "expected a preset"),
        ([4, [0]], TopologyError, "expected a preset"),
        ([True], TopologyError, "expected a preset"),
        ([2.0, 1.0], TopologyError, "expected a preset"),
        (5, TopologyError, "tree is 5"),
        ([2, 0], TopologyError, "widths"),
        ([8, 8, 8], TopologyError, str(MAX_NODES)),
        ([[rank] for rank in range(MAX_NODES)], TopologyError, str(MAX_NODES)),
    ],
)
def test_what_is_no_tree_is_named(tree, error, words):
    with pytest.raises(error, match=words):
        normalize_paths(tree)


CLOSE = 1e-9  # sums of a few logarithms, in another order

LEVELS = st.lists(
    st.lists(st.floats(-6.0, -0.01), min_size=1, max_size=4).map(
        lambda level: sorted(level, reverse=True)
    ),
    min_size=1,
    max_size=4,
)


def paths_of(nodes):
    paths = [()]
    for node in nodes:
        paths.append((*paths[node.parent], node.rank))
        assert len(paths[-1]) == node.depth + 1
    return paths[1:]


def score(path, levels):
    return sum(level[rank] for level, rank in zip(levels, path, strict=False))


@given(LEVELS, st.integers(1, 12), st.floats(-12.0, -0.5))
def test_no_path_left_out_is_likelier_than_one_taken(levels, num_nodes, min_score):
    taken = paths_of(likeliest_paths(levels, num_nodes=num_nodes, min_score=min_score))
    every = [
        path
        for depth in range(1, len(levels) + 1)
        for path in product(*(range(len(level)) for level in levels[:depth]))
        if score(path, levels) >= min_score
    ]
    assert len(taken) == len(set(taken)) == min(num_nodes, len(every))
    left = set(every) - set(taken)
    if taken and left:
        worst = min(score(path, levels) for path in taken)
        assert max(score(path, levels) for path in left) <= worst + CLOSE


def test_paths_come_with_their_prefixes_and_in_order_of_probability():
    levels = [[math.log(0.6), math.log(0.3)], [math.log(0.9)]]
    nodes = likeliest_paths(levels, num_nodes=9, min_score=math.log(0.3))
    assert paths_of(nodes) == [(0,), (0, 0), (1,)]


def test_nothing_is_likely_enough():
    assert likeliest_paths([[-3.0]], num_nodes=4, min_score=-2.0) == []
