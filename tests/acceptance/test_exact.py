"""The exact rule on trees, at all nodes and along the accepted path."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from speclm.acceptance import Accepted, Verified, accept_exact
from speclm.acceptance.exact import accept_along_paths, choose_at_all_nodes
from speclm.devices import device_path
from speclm.sampling import PositionNoise, TokenChooser
from speclm.tree.topology import chain, from_parents

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


def deepest_paths(parents, tokens, choices):
    """Every deepest path that the choices allow; the accepted one has to be among them."""
    children = [n for n in range(1, len(parents)) if parents[n] == 0]
    ends, open_paths = [[0]], [([0], children)]
    while open_paths:
        path, children = open_paths.pop()
        for child in children:
            if tokens[child] == choices[path[-1]]:
                longer = [*path, child]
                ends.append(longer)
                below = [n for n in range(child + 1, len(parents)) if parents[n] == child]
                open_paths.append((longer, below))
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
        assert path in deepest_paths(row_parents, row_tokens, row_choices)
        assert accepted.emitted[row] == [row_choices[node] for node in path]
        assert accepted.emitted[row][:-1] == [row_tokens[node] for node in path[1:]]


@given(rounds())
def test_choices_at_nodes_that_no_path_reaches_do_not_matter(drawn):
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


VOCAB = 5
PATHS = st.sampled_from([nullcontext, device_path])  # of a CPU, and of an accelerator


def noise_at(steps: list[int], *, seed: int) -> PositionNoise:
    torch.manual_seed(seed)
    noise = PositionNoise(batch=len(steps), vocab_size=VOCAB, device=CPU)
    noise.seek(steps, live=[True] * len(steps))
    return noise


def verified(logits, tokens, topology, chooser, noise) -> Verified:
    is_live = [True] * len(tokens)
    return Verified(tokens, topology, logits, chooser, is_live, noise=noise)


def at_all_nodes(logits, tokens, topology, chooser, noise) -> Accepted:
    chosen = choose_at_all_nodes(verified(logits, tokens, topology, chooser, noise))
    return accept_exact(tokens, chosen, topology)


def along_path(*given) -> Accepted:
    return accept_along_paths(verified(*given))


@st.composite
def drafts(draw: st.DrawFn) -> tuple[list[list[int]], Tensor, list[int], int]:
    """Trees with padding in their midst, tokens whose siblings differ, ragged steps, a seed."""
    batch, shared = draw(st.integers(1, 3)), draw(st.booleans())
    rows, tokens = [], []
    width = draw(st.integers(1, 9))
    for _ in range(1 if shared else batch):
        parents = [0]
        for node in range(1, width):
            siblings = [p for p in range(node) if parents[p] != p or p == 0]
            room = [p for p in siblings if parents[1:].count(p) < VOCAB]
            parents.append(draw(st.sampled_from([*room, node])))
        rows.append(parents)
    for row in range(batch):
        parents = rows[0 if shared else row]
        order = {p: draw(st.permutations(range(VOCAB))) for p in sorted(set(parents))}
        used: dict[int, int] = {}
        row_tokens = [0]
        for node in range(1, width):
            place = used.get(parents[node], 0)
            used[parents[node]] = place + 1
            row_tokens.append(order[parents[node]][place])
        tokens.append(row_tokens)
    steps = draw(st.lists(st.integers(0, 4), min_size=batch, max_size=batch))
    return rows, torch.tensor(tokens), steps, draw(st.integers(0, 10**6))


@given(draft=drafts(), greedy=st.booleans(), warped=st.booleans(), path=PATHS)
def test_along_the_path_and_at_all_nodes_the_same_is_accepted(draft, greedy, warped, path):
    parents, tokens, steps, seed = draft
    topology = from_parents(parents, device=CPU)
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(*tokens.shape, VOCAB, generator=generator)
    warpers = [TemperatureLogitsWarper(0.8), TopKLogitsWarper(4), TopPLogitsWarper(0.9)]
    chooser = TokenChooser(warpers if warped else [], is_greedy=greedy)
    noise = None if greedy else noise_at(steps, seed=seed)
    expected = at_all_nodes(logits, tokens, topology, chooser, noise)
    noise = None if greedy else noise_at(steps, seed=seed)
    with path():
        found = along_path(logits, tokens, topology, chooser, noise)
    assert found.paths == expected.paths
    assert found.emitted == expected.emitted
    width = found.path.shape[1]  # along the path, no more columns than needed
    assert torch.equal(found.path, expected.path[:, :width])
    assert torch.equal(found.tokens, expected.tokens[:, :width])
    assert found.accepted_length.tolist() == expected.accepted_length.tolist()


@pytest.mark.parametrize("greedy", [True, False])
def test_repeated_siblings_emit_a_prefix_of_the_same_tokens(greedy):
    topology = from_parents([[0, 0, 0, 2]], device=CPU)
    tokens = torch.tensor([[0, 3, 3, 1]])
    logits = torch.full((1, 4, VOCAB), -50.0)
    logits[0, [0, 1, 2, 3], [3, 1, 1, 4]] = 50.0
    chooser = TokenChooser([], is_greedy=greedy)
    noise = None if greedy else noise_at([0], seed=1)
    deepest = at_all_nodes(logits, tokens, topology, chooser, noise)
    noise = None if greedy else noise_at([0], seed=1)
    found = along_path(logits, tokens, topology, chooser, noise)
    assert deepest.emitted == [[3, 1, 4]]
    assert found.emitted[0] == deepest.emitted[0][: len(found.emitted[0])]


def test_each_row_reads_the_noise_of_its_own_step():
    topology, tokens = chain(1), torch.tensor([[0, 9], [0, 9]])  # 9 is never chosen
    logits = torch.zeros(2, 2, VOCAB)
    chooser = TokenChooser([], is_greedy=False)
    torch.manual_seed(3)
    matrices = [torch.empty(2, VOCAB).exponential_() for _ in range(4)]
    noise = noise_at([0, 2], seed=3)
    chosen = choose_at_all_nodes(verified(logits, tokens, topology, chooser, noise))
    assert chosen.tolist() == [
        [int(matrices[0][0].argmin()), int(matrices[1][0].argmin())],
        [int(matrices[2][1].argmin()), int(matrices[3][1].argmin())],
    ]
    found = along_path(logits, tokens, topology, chooser, noise_at([0, 2], seed=3))
    assert found.emitted == [[chosen[0, 0].item()], [chosen[1, 0].item()]]


def test_no_noise_is_read_below_the_node_at_which_the_path_ends():
    logits = torch.full((1, 4, VOCAB), -50.0)
    logits[0, :, 2] = 50.0
    noise = noise_at([0], seed=0)
    before = torch.get_rng_state()
    torch.empty(1, VOCAB).exponential_()
    after_one = torch.get_rng_state()
    torch.set_rng_state(before)
    chooser = TokenChooser([], is_greedy=False)
    along_path(logits, torch.tensor([[0, 1, 1, 1]]), chain(3), chooser, noise)
    assert torch.equal(torch.get_rng_state(), after_one)


@pytest.mark.parametrize("greedy", [True, False])
def test_chosen_nan_is_reported_as_minus_one(greedy):
    logits, tokens = torch.zeros(1, 1, VOCAB), torch.tensor([[0]])
    logits[0, 0, 3] = torch.nan
    chooser = TokenChooser([], is_greedy=greedy)
    noise = None if greedy else noise_at([0], seed=0)
    assert along_path(logits, tokens, chain(0), chooser, noise).emitted == [[-1]]
    noise = None if greedy else noise_at([0], seed=0)
    assert at_all_nodes(logits, tokens, chain(0), chooser, noise).tokens.tolist() == [[-1]]
