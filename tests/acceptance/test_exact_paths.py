"""Both ways of choosing give the same tokens: at all nodes, and along the walk."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from speclm.acceptance import accept_exact
from speclm.acceptance.exact import accept_along_path, choose_at_all_nodes
from speclm.sampling import PositionNoise, TokenChooser
from speclm.tree.topology import chain, from_parents

VOCAB = 5
CPU = torch.device("cpu")


def noise_at(steps: list[int], *, seed: int) -> PositionNoise:
    torch.manual_seed(seed)
    noise = PositionNoise(batch=len(steps), vocab_size=VOCAB, device=CPU)
    noise.seek(steps, live=[True] * len(steps))
    return noise


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


@given(draft=drafts(), greedy=st.booleans(), warped=st.booleans())
def test_walk_and_all_nodes_accept_the_same(draft, greedy, warped):
    parents, tokens, steps, seed = draft
    topology = from_parents(parents, device=CPU)
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(*tokens.shape, VOCAB, generator=generator)
    warpers = [TemperatureLogitsWarper(0.8), TopKLogitsWarper(4), TopPLogitsWarper(0.9)]
    chooser = TokenChooser(warpers if warped else [], is_greedy=greedy)
    noise = None if greedy else noise_at(steps, seed=seed)
    choices = choose_at_all_nodes(logits, topology, chooser, noise)
    expected = accept_exact(tokens, choices, topology)
    noise = None if greedy else noise_at(steps, seed=seed)
    found = accept_along_path(logits, tokens, topology, chooser, noise)
    assert found.paths == expected.paths
    assert found.emitted == expected.emitted
    width = found.path.shape[1]  # the walk returns no more columns than it needs
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
    deepest = accept_exact(tokens, choose_at_all_nodes(logits, topology, chooser, noise), topology)
    noise = None if greedy else noise_at([0], seed=1)
    walked = accept_along_path(logits, tokens, topology, chooser, noise)
    assert deepest.emitted == [[3, 1, 4]]
    assert walked.emitted[0] == deepest.emitted[0][: len(walked.emitted[0])]


def test_each_row_reads_the_noise_of_its_own_step():
    topology, tokens = chain(1), torch.tensor([[0, 9], [0, 9]])  # 9 is never chosen
    logits = torch.zeros(2, 2, VOCAB)
    chooser = TokenChooser([], is_greedy=False)
    torch.manual_seed(3)
    matrices = [torch.empty(2, VOCAB).exponential_() for _ in range(4)]
    choices = choose_at_all_nodes(logits, topology, chooser, noise_at([0, 2], seed=3))
    assert choices.tolist() == [
        [int(matrices[0][0].argmin()), int(matrices[1][0].argmin())],
        [int(matrices[2][1].argmin()), int(matrices[3][1].argmin())],
    ]
    walked = accept_along_path(logits, tokens, topology, chooser, noise_at([0, 2], seed=3))
    assert walked.emitted == [[choices[0, 0].item()], [choices[1, 0].item()]]


def test_walk_reads_no_noise_below_the_node_at_which_it_ends():
    logits = torch.full((1, 4, VOCAB), -50.0)
    logits[0, :, 2] = 50.0
    noise = noise_at([0], seed=0)
    before = torch.get_rng_state()
    torch.empty(1, VOCAB).exponential_()
    after_one = torch.get_rng_state()
    torch.set_rng_state(before)
    chooser = TokenChooser([], is_greedy=False)
    accept_along_path(logits, torch.tensor([[0, 1, 1, 1]]), chain(3), chooser, noise)
    assert torch.equal(torch.get_rng_state(), after_one)


@pytest.mark.parametrize("greedy", [True, False])
def test_chosen_nan_is_reported_as_minus_one(greedy):
    logits = torch.zeros(1, 1, VOCAB)
    logits[0, 0, 3] = torch.nan
    chooser = TokenChooser([], is_greedy=greedy)
    noise = None if greedy else noise_at([0], seed=0)
    assert accept_along_path(logits, torch.tensor([[0]]), chain(0), chooser, noise).emitted == [
        [-1]
    ]
    noise = None if greedy else noise_at([0], seed=0)
    assert choose_at_all_nodes(logits, chain(0), chooser, noise).tolist() == [[-1]]
