from dataclasses import replace

import numpy as np
import pytest
import torch

from speclm.acceptance import Accepted
from speclm.acceptance.interface import TargetCandidates
from speclm.drafting.growing import GrowthConfig, TreeGrower, planned_growth
from speclm.drafting.interface import Prefill
from speclm.drafting.sources import CandidateSource
from speclm.errors import OptionError
from speclm.sampling.noise import PositionNoise
from speclm.tree.plan import TreePlan

CPU = torch.device("cpu")
GREEDY = GrowthConfig(depth=8, num_draft_tokens=8, min_probability=0.05)


class Counting(CandidateSource):
    """Says that the next numbers follow: n + 1 is likely, n + 2 less so."""

    start_rates = (0.7, 0.3)
    num_observed = 2

    def __init__(self) -> None:
        self.last: list[int] = []
        self.observed: list[tuple] = []
        self.noises: list[np.ndarray | None] = []

    def begin(self, prompt: Prefill) -> None:
        self.last = prompt.first_tokens.tolist()

    def root(self, row: int) -> int:
        return self.last[row]

    def advance(self, state: int, token: int) -> int:
        return token

    def candidates(self, state: int, noise: np.ndarray | None) -> list[tuple[int, int]]:
        self.noises.append(noise)
        return [(state + 1, 0), (state + 2, 1)]

    def observe(self, previous, tokens, ids, log_probs, *, num_rejected):
        self.observed.append((previous, tokens, ids.tolist(), num_rejected))

    def commit(self, row: int, emitted: list[int]) -> None:
        self.last[row] = [self.last[row], *emitted][-1]


def prefill(*firsts: int, ends=(), temperature: float = 0.0, prompt=None) -> Prefill:
    tokens = torch.tensor([[50]] * len(firsts)) if prompt is None else torch.tensor(prompt)
    return Prefill(
        tokens=tokens,
        num_padding=torch.zeros(len(firsts), dtype=torch.long),
        first_tokens=torch.tensor(firsts),
        temperature=temperature,
        max_new_tokens=999,
        eos_token_ids=frozenset(ends),
    )


def paths(draft, row: int = 0) -> list[tuple[int, ...]]:
    found = []
    for nodes in draft.topology.path_indices[row].tolist():
        kept = [node for node in nodes if node > 0]
        if kept:
            found.append(tuple(draft.tokens[row, kept].tolist()))
    return found


def test_likeliest_paths_come_first_until_none_is_worth_its_time():
    grower = TreeGrower([Counting()])
    grower.begin(prefill(10))
    draft = grower.propose(torch.tensor([10]), GREEDY, noise=None)
    assert paths(draft)[:3] == [(11,), (11, 12), (11, 12, 13)]
    assert (12,) in paths(draft)
    assert len(paths(draft)) == 8
    few = replace(GREEDY, min_probability=0.45)
    assert paths(grower.propose(torch.tensor([10]), few, noise=None)) == [(11,), (11, 12)]


def test_probabilities_are_those_of_the_tokens_given_their_paths():
    grower = TreeGrower([Counting()])
    grower.begin(prefill(10))
    draft = grower.propose(torch.tensor([10]), GREEDY, noise=None)
    assert draft.node_probs[0][:3] == pytest.approx([1.0, 0.7, 0.7])


def test_nothing_grows_below_an_end_or_the_depth():
    grower = TreeGrower([Counting()])
    grower.begin(prefill(10, ends=[11]))
    draft = grower.propose(torch.tensor([10]), replace(GREEDY, depth=2), noise=None)
    assert (11,) in paths(draft)
    assert not any(len(path) > 1 and path[0] == 11 for path in paths(draft))
    assert max(map(len, paths(draft))) == 2


def test_nothing_grows_beyond_the_last_token_that_a_row_may_emit():
    grower = TreeGrower([Counting()])
    grower.begin(replace(prefill(10, 20), max_new_tokens=4))
    roots = torch.tensor([10, 20])
    draft = grower.propose(roots, GREEDY, noise=None)
    assert max(map(len, paths(draft))) == 3  # the bonus token needs no draft
    grower.commit(Accepted.from_host([[0, 1], [0]], [[11, 12], [21]], device=CPU))
    static = replace(GREEDY, paths=((0,), (0, 0), (0, 0, 0)))
    for config in (GREEDY, static):
        draft = grower.propose(roots + 1, config, noise=None)
        assert [max(map(len, paths(draft, row))) for row in range(2)] == [1, 2]
    grower.commit(Accepted.from_host([[0], [0, 1]], [[13], [22, 23]], device=CPU))
    assert paths(grower.propose(roots + 2, GREEDY, noise=None)) == []


def test_static_tree_is_filled_by_rank_as_far_as_there_are_candidates():
    grower = TreeGrower([Counting()])
    grower.begin(prefill(10))
    plan = TreePlan.of(((0,), (1,), (2,), (1, 0), (2, 0)))
    config = planned_growth(GREEDY, plan, num_rows=1)
    draft = grower.propose(torch.tensor([10]), config, noise=None)
    assert paths(draft) == [(11,), (12,), (12, 13)]


def test_waiting_row_has_only_its_root():
    grower = TreeGrower([Counting()])
    grower.begin(prefill(10, 20))
    grower.propose(torch.tensor([10, 20]), GREEDY, noise=None)
    grower.commit(Accepted.from_host([[0], []], [[11], []], device=CPU))
    draft = grower.propose(torch.tensor([11, 20]), GREEDY, noise=None)
    assert paths(draft, 0)[0] == (12,)
    assert paths(draft, 1) == []
    assert grower.num_live == 1


def test_hits_are_counted_along_the_emitted_tokens():
    grower = TreeGrower([Counting()])
    grower.begin(prefill(10))
    token = 10
    for _ in range(64):  # two on, every time
        draft = grower.propose(torch.tensor([token]), GREEDY, noise=None)
        token += 2
        node = draft.tokens[0].tolist().index(token)
        grower.commit(Accepted.from_host([[0, node]], [[token, token + 2]], device=CPU))
        token += 2
    draft = grower.propose(torch.tensor([token]), GREEDY, noise=None)
    assert paths(draft)[:2] == [(token + 2,), (token + 2, token + 4)]


@pytest.mark.parametrize("is_cut", [False, True])
def test_every_node_is_observed_with_the_token_before_it_and_accepted_ones_last(is_cut):
    source = Counting()
    grower = TreeGrower([source])
    grower.begin(prefill(10, prompt=[[7, 9]]))
    few = replace(GREEDY, num_draft_tokens=2)
    draft = grower.propose(torch.tensor([10]), few, noise=None)
    assert draft.tokens.tolist() == [[10, 11, 12]]
    logits = torch.zeros(1, 3, 30)
    for node, best in enumerate([11, 25, 26]):
        logits[0, node, best] = 5.0
    found = TargetCandidates.best(logits, num=2)
    nodes = [0, 2] if is_cut else [0, 1, 2]
    if is_cut:
        found = TargetCandidates(found.ids[:, nodes], found.log_probs[:, nodes], [nodes])
    accepted = Accepted.from_host([[0]], [[11]], device=CPU)
    grower.commit(accepted.with_candidates(found))
    ((previous, tokens, ids, num_rejected),) = source.observed
    assert list(zip(previous, tokens, strict=True))[-1] == (9, 10)
    assert ids[-1][0] == 11
    assert (previous[0], tokens[0]) == ((11, 12) if is_cut else (10, 11))
    assert num_rejected == len(nodes) - 1


def test_round_without_a_draft_is_observed_at_the_root():
    source = Counting()
    grower = TreeGrower([source])
    grower.begin(prefill(10))
    accepted = Accepted.from_host([[0]], [[11]], device=CPU)
    found = TargetCandidates.best(torch.rand(1, 1, 30), num=2)
    grower.commit(accepted.with_candidates(found))
    assert [row[:2] for row in source.observed] == [([50], [10])]
    assert grower.propose(torch.tensor([11]), GREEDY, noise=None).tokens[0, 1] == 12


@pytest.mark.parametrize("reads_noise", [True, False])
def test_sources_that_read_it_are_given_the_noise_of_their_position(reads_noise):
    torch.manual_seed(0)
    noise = PositionNoise(batch=1, vocab_size=30, device=CPU)
    noise.seek([4], live=[True])
    source = Counting()
    source.reads_noise = reads_noise
    grower = TreeGrower([source])
    grower.begin(prefill(10, temperature=1.0))
    grower.propose(torch.tensor([10]), replace(GREEDY, depth=1), noise=noise)
    if reads_noise:
        assert np.array_equal(source.noises[0], noise.row(0, 0).numpy())
    else:
        assert source.noises[0] is None


def test_muted_source_suggests_nothing():
    source = Counting()
    grower = TreeGrower([source])
    grower.begin(prefill(10))
    grower.muted = frozenset([source])
    assert grower.propose(torch.tensor([10]), GREEDY, noise=None).topology.num_nodes == 1
    grower.muted = frozenset()
    assert grower.propose(torch.tensor([10]), GREEDY, noise=None).topology.num_nodes > 1


@pytest.mark.parametrize(("option", "value"), [("num_draft_tokens", 0), ("min_probability", 0.0)])
def test_options_out_of_range_are_named(option, value):
    with pytest.raises(OptionError, match=rf"{option} is {value}"):
        GrowthConfig(**{option: value})
