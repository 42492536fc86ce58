"""Trees that are filled level by level."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from speclm.tree.dynamic import FilledTree
from speclm.tree.static import PRESETS, normalize_paths

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
