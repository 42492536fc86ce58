import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speclm.config import MAX_DEPTH, MAX_NODES
from speclm.errors import TopologyError, TreeBudgetError
from speclm.tree import chain, from_parents
from speclm.tree.topology import on_device
from speclm.tree.words import pack_words

CPU = torch.device("cpu")


@st.composite
def parent_rows(draw, max_nodes=80):
    """One list of parents per row, with padding nodes in the midst of trees."""
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        parents, in_tree = [0], [0]
        for node in range(1, draw(st.integers(1, max_nodes))):
            earlier = draw(st.sampled_from([*in_tree[-8:], None]))
            parents.append(node if earlier is None else earlier)
            if earlier is not None:
                in_tree.append(node)
        rows.append(parents)
    return rows


def path_to(parents, node):
    """Nodes from the root to `node`; empty for padding."""
    path = [node]
    while path[0] != 0:
        if parents[path[0]] == path[0]:
            return []
        path.insert(0, parents[path[0]])
    return path


@given(parent_rows(max_nodes=64))
def test_trees_that_the_host_does_not_know_have_the_same_fields(rows):
    known = from_parents(rows, device=CPU)
    found = on_device(known.parents, max_depth=known.max_depth)
    assert not found.is_on_host
    for field in ("depths", "ancestor_mask", "ancestor_words", "deepest_first", "inner_mask"):
        assert torch.equal(getattr(found, field), getattr(known, field)), field
    is_node = ~known.is_padding
    assert torch.equal(found.path_ends[is_node], known.path_ends[is_node])
    assert torch.equal(found.path_indices, known.path_indices)
    assert found.host_node_depths == known.host_node_depths
    assert found.is_on_host


def test_a_depth_that_is_not_reached_is_only_a_bound():
    found = on_device(torch.tensor([[0, 0, 1, 3]]), max_depth=7)
    assert found.path_indices[0, 2].tolist() == [0, 1, 2, -1]
    assert found.path_indices[0, 3].tolist() == [-1] * 4  # padding
    assert found.host_depths == [2]


@pytest.mark.parametrize(("nodes", "depth"), [(MAX_NODES + 1, 3), (8, MAX_DEPTH + 1)])
def test_trees_of_the_device_keep_within_the_budget(nodes, depth):
    with pytest.raises(TreeBudgetError, match=rf"{nodes} nodes on {depth} levels"):
        on_device(torch.zeros(1, nodes, dtype=torch.long), max_depth=depth)


@given(parent_rows())
def test_fields_agree_with_paths_over_the_parents_and_host_views_with_fields(rows):
    topology = from_parents(rows, device=CPU)
    width = max(map(len, rows))
    assert topology.num_nodes == width
    columns = torch.arange(width)
    depths = []
    for row, parents in enumerate(rows):
        padded = [*parents, *range(len(parents), width)]
        paths = [path_to(padded, node) for node in range(width)]
        depths.append([max(len(path) - 1, 0) for path in paths])
        assert topology.parents[row].tolist() == padded
        assert topology.depths[row].tolist() == depths[-1]
        assert topology.is_padding[row].tolist() == [not path for path in paths]
        levels = topology.path_indices.shape[2]
        found = topology.path_indices[row].tolist()
        assert found == [path + [-1] * (levels - len(path)) for path in paths]
        seen = [columns[mask].tolist() for mask in topology.ancestor_mask[row]]
        assert seen == [path or [node] for node, path in enumerate(paths)]
    assert topology.max_depth == max(map(max, depths))
    assert topology.path_indices.shape[2] == topology.max_depth + 1
    assert torch.equal(topology.ancestor_mask.sum(2), topology.depths + 1)
    assert topology.host_parents == topology.parents.tolist()
    assert topology.host_node_depths == topology.depths.tolist()
    assert topology.host_sizes == (~topology.is_padding).sum(1).tolist()
    assert topology.host_depths == topology.depths.max(1).values.tolist()


def test_ancestor_words_hold_the_sign_bit_and_further_words():
    topology = from_parents([[0] * 130], device=CPU)
    assert topology.ancestor_words.shape == (1, 130, 3)
    assert topology.ancestor_words[0, 63].tolist() == [-(2**63) + 1, 0, 0]
    assert topology.ancestor_words[0, 64].tolist() == [1, 1, 0]
    assert topology.ancestor_words[0, 129].tolist() == [1, 0, 2]


def test_chain_is_one_path_and_cached():
    topology = chain(3)
    assert topology.parents.tolist() == [[0, 0, 1, 2]]
    assert topology.depths.tolist() == [[0, 1, 2, 3]]
    assert topology.path_indices[0, -1].tolist() == [0, 1, 2, 3]
    assert chain(3) is topology
    assert chain(0).num_nodes == 1


def test_paths_lead_to_one_node_of_each_row():
    topology = from_parents([[0, 0, 1, 0], [0, 0, 1, 2]], device=CPU)
    assert topology.paths_to(torch.tensor([3, 2])).tolist() == [[0, 3, -1, -1], [0, 1, 2, -1]]
    assert chain(2).paths_to(torch.tensor([0, 2])).tolist() == [[0, -1, -1], [0, 1, 2]]


@pytest.mark.parametrize("parents", [[], [1, 0]])
def test_row_without_a_root_is_refused(parents):
    with pytest.raises(TopologyError, match="expected node 0 to be the root"):
        from_parents([[0], parents], device=CPU)


@pytest.mark.parametrize("parents", [[0, 2, 0], [0, -1], [0, 1, 1]])
def test_node_before_its_parent_or_below_padding_is_refused(parents):
    with pytest.raises(TopologyError, match="expected an earlier node of the tree"):
        from_parents([parents], device=CPU)


def test_trees_beyond_the_budget_are_refused():
    assert from_parents([[0] * MAX_NODES], device=CPU).num_nodes == MAX_NODES
    with pytest.raises(TreeBudgetError, match=f"{MAX_NODES + 1} nodes"):
        from_parents([[0] * (MAX_NODES + 1)], device=CPU)
    with pytest.raises(TreeBudgetError, match=f"{MAX_DEPTH + 1} levels deep"):
        chain(MAX_DEPTH + 1)


def test_packed_masks_are_the_words_of_the_topology():
    topology = from_parents([[0, *range(63)], [0] * 80], device=CPU)
    assert torch.equal(pack_words(topology.ancestor_mask), topology.ancestor_words)
