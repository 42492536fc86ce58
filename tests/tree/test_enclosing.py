"""Nodes that a device chooses from an enclosing tree, against a search on the host."""

import math

import pytest
import torch
from torch import Tensor

from speclm.tree.enclosing import EnclosingTree, enclosing_tree
from speclm.tree.topology import from_parents

CPU = torch.device("cpu")
LEVEL_COST = 0.01


def build(*, is_chained: bool, depth: int = 3, width: int = 4, num_ranks: int = 3) -> EnclosingTree:
    return enclosing_tree(
        depth=depth, width=width, num_ranks=num_ranks, is_chained=is_chained, device=CPU
    )


def sorted_log_probs(tree: EnclosingTree, *, batch: int, num_ranks: int = 3) -> Tensor:
    count = int(tree.steps.max())
    drawn = torch.randn(
        batch, count // num_ranks, num_ranks, generator=torch.Generator().manual_seed(3)
    )
    return (2 * drawn).log_softmax(-1).sort(dim=-1, descending=True).values.flatten(1)


def parents_of(tree: EnclosingTree) -> list[int]:
    return tree.lines[:, 0].tolist()


@pytest.mark.parametrize("is_chained", [False, True])
def test_the_tokens_and_steps_of_nodes_are_those_of_a_loop_over_levels(is_chained):
    tree, num_ranks = build(is_chained=is_chained), 3
    parents = parents_of(tree)
    candidate = [0] * tree.num_nodes  # index of each node's token, over all levels
    expanded, first = [0], 0
    for level in range(3):
        at_level = []
        for index, node in enumerate(expanded):
            children = [child for child in range(1, tree.num_nodes) if parents[child] == node]
            assert len(children) == num_ranks
            for rank, child in enumerate(children):
                candidate[child] = first + is_chained * index * num_ranks + rank
            at_level += children
        if level < 2:
            going = [node for node in at_level if tree.expansions[node - 1] is not None]
            places = [tree.expansions[node - 1] for node in going]
            assert places == [(level, index) for index in range(len(going))]
            assert tree.expanded[level].tolist() == [candidate[node] - first for node in going]
            above = [expanded.index(parents[node]) for node in going]
            assert tree.parents[level].tolist() == [above]
            expanded, first = going, first + num_ranks * (len(expanded) if is_chained else 1)
    count = first + num_ranks * (len(expanded) if is_chained else 1)
    for node in range(tree.num_nodes):
        path = [node] if node else []
        while path and parents[path[0]]:
            path.insert(0, parents[path[0]])
        steps = [candidate[own] for own in path] + [count] * (3 - len(path))
        assert tree.steps[node].tolist() == steps
        assert tree.values[node, :2].tolist() == [candidate[node] + 1 if node else 0, len(path)]


@pytest.mark.parametrize("is_chained", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_chosen_nodes_are_the_likeliest_and_their_topology_is_that_of_their_parents(
    is_chained, batch
):
    tree = build(is_chained=is_chained)
    log_probs = sorted_log_probs(tree, batch=batch)
    tokens = torch.arange(1 + log_probs.shape[1]).expand(batch, -1) + 5
    chosen = tree.choose(log_probs, tokens, num_nodes=9)
    known = torch.cat([log_probs, torch.full((batch, 1), LEVEL_COST)], dim=1)
    scores = known[:, tree.steps].sum(2)
    for row in range(batch):
        found = chosen.nodes[row].tolist()
        best = sorted(range(tree.num_nodes), key=lambda node: -float(scores[row, node]))[:9]
        assert found == sorted(best)
        assert found[0] == 0
        wanted = [tokens[row, tree.values[node, 0]].item() for node in found]
        assert chosen.tokens[row].tolist() == wanted
    topology = chosen.topology()
    rebuilt = from_parents(topology.parents.tolist(), device=CPU)
    assert not topology.is_on_host
    for name in ("depths", "ancestor_mask", "inner_mask", "ancestor_words", "path_indices"):
        found, expected = getattr(topology, name), getattr(rebuilt, name)
        if name == "path_indices":  # padded up to a bound
            assert (found[:, :, expected.shape[2] :] == -1).all()
            found = found[:, :, : expected.shape[2]]
        assert torch.equal(found, expected), name
    assert torch.equal(topology.path_ends[:, :, -1], rebuilt.path_ends[:, :, -1])
    order = topology.deepest_first.argsort(dim=1)
    assert torch.equal(order, rebuilt.deepest_first.argsort(dim=1))
    assert topology.max_depth == 3


@pytest.mark.parametrize("value", [math.nan, -math.inf, 0.0, -1e30, 1e-7])
def test_probabilities_of_any_kind_leave_every_node_with_its_parent(value):
    tree = build(is_chained=True)
    log_probs = sorted_log_probs(tree, batch=2)
    log_probs[0, ::2] = value
    log_probs[1] = value
    tokens = torch.zeros(2, 1 + log_probs.shape[1], dtype=torch.long)
    for num_nodes in (2, 9, 99):
        chosen = tree.choose(log_probs, tokens, num_nodes=num_nodes)
        parents = parents_of(tree)
        for found in chosen.nodes.tolist():
            assert {parents[node] for node in found} <= set(found)
            assert len(found) == min(num_nodes, tree.num_nodes)
        rebuilt = from_parents(chosen.topology().parents.tolist(), device=CPU)
        assert torch.equal(chosen.topology().depths, rebuilt.depths)


def test_a_tree_of_one_level_has_no_expanded_nodes():
    tree = build(is_chained=True, depth=1)
    assert (tree.num_nodes, tree.expanded, tree.parents) == (4, (), ())
    chosen = tree.choose(
        torch.tensor([[-0.5, -1.0, -2.0]]), torch.tensor([[7, 1, 2, 3]]), num_nodes=3
    )
    assert chosen.tokens.tolist() == [[7, 1, 2]]
    assert chosen.topology().parents.tolist() == [[0, 0, 0]]


def test_trees_are_built_once():
    assert build(is_chained=True) is build(is_chained=True)
