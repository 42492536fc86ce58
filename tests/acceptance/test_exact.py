import torch
from hypothesis import given
from hypothesis import strategies as st

from speclm.acceptance import accept_exact
from speclm.tree import chain, from_parents

CPU = torch.device("cpu")


@st.composite
def rounds(draw):
    """Parents, tokens and choices of a batch; few tokens, so that siblings repeat and agree."""
    batch, nodes = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    shares_tree = draw(st.booleans())
    parents = []
    for _ in range(1 if shares_tree else batch):
        row, in_tree = [0], [0]
        for node in range(1, nodes):
            parent = draw(st.sampled_from([*in_tree, node]))
            row.append(parent)
            if parent != node:
                in_tree.append(node)
        parents.append(row)
    matrix = st.lists(
        st.lists(st.integers(0, 2), min_size=nodes, max_size=nodes),
        min_size=batch,
        max_size=batch,
    )
    return parents, draw(matrix), draw(matrix)


def walk(parents, tokens, choices):
    """Every deepest path that the choices allow; the accepted one has to be among them."""
    children = [n for n in range(1, len(parents)) if parents[n] == 0]
    ends, lockstep = [[0]], [([0], children)]
    while lockstep:
        path, children = lockstep.pop()
        for child in children:
            if tokens[child] == choices[path[-1]]:
                longer = [*path, child]
                ends.append(longer)
                below = [n for n in range(child + 1, len(parents)) if parents[n] == child]
                lockstep.append((longer, below))
    deepest = max(map(len, ends))
    return [path for path in ends if len(path) == deepest]


@given(rounds())
def test_it_takes_a_deepest_path_that_the_choices_allow(drawn):
    parents, tokens, choices = drawn
    accepted = accept_exact(
        torch.tensor(tokens), torch.tensor(choices), from_parents(parents, device=CPU)
    )
    for row, (row_tokens, row_choices) in enumerate(zip(tokens, choices, strict=True)):
        row_parents = parents[row if len(parents) > 1 else 0]
        path = accepted.paths[row]
        assert path in walk(row_parents, row_tokens, row_choices)
        assert accepted.emitted[row] == [row_choices[node] for node in path]
        assert accepted.emitted[row][:-1] == [row_tokens[node] for node in path[1:]]


@given(rounds())
def test_choices_at_nodes_that_no_walk_reaches_do_not_matter(drawn):
    parents, tokens, choices = drawn
    topology = from_parents(parents, device=CPU)
    accepted = accept_exact(torch.tensor(tokens), torch.tensor(choices), topology)
    reached = torch.zeros(len(tokens), topology.num_nodes, dtype=torch.bool)
    for row, row_tokens in enumerate(tokens):
        row_parents = parents[row if len(parents) > 1 else 0]
        is_reached = [True]
        for node in range(1, len(row_parents)):
            parent = row_parents[node]
            is_reached.append(
                parent != node and is_reached[parent] and choices[row][parent] == row_tokens[node]
            )
        reached[row] = torch.tensor(is_reached)
    unvisited = torch.tensor(choices).masked_fill(~reached, -1)
    again = accept_exact(torch.tensor(tokens), unvisited, topology)
    assert again.paths == accepted.paths
    assert again.emitted == accepted.emitted


def test_whole_chain_and_bonus_are_emitted():
    tokens = torch.tensor([[1, 2, 3], [1, 2, 3]])
    choices = torch.tensor([[2, 3, 9], [5, 3, 9]])
    accepted = accept_exact(tokens, choices, chain(2))
    assert accepted.path.tolist() == [[0, 1, 2], [0, -1, -1]]
    assert accepted.tokens.tolist() == [[2, 3, 9], [5, -1, -1]]


def test_of_equal_siblings_the_deeper_branch_wins_and_then_the_first():
    topology = from_parents([[0, 0, 0, 2, 2]], device=CPU)
    tokens = torch.tensor([[7, 1, 1, 2, 2]])
    choices = torch.tensor([[1, 5, 2, 8, 9]])
    accepted = accept_exact(tokens, choices, topology)
    assert accepted.paths == [[0, 2, 3]]
    assert accepted.emitted == [[1, 2, 8]]


def test_padding_node_is_never_accepted():
    topology = from_parents([[0, 1]], device=CPU)
    accepted = accept_exact(torch.tensor([[3, 3]]), torch.tensor([[3, 3]]), topology)
    assert accepted.paths == [[0]]


def test_root_alone_emits_one_token():
    accepted = accept_exact(torch.tensor([[3]]), torch.tensor([[4]]), chain(0))
    assert accepted.emitted == [[4]]
