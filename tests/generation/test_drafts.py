"""Drafts as the loop needs them."""

from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speclm import SpecModel
from speclm.adaptive.pausing import Ledger, Pausing
from speclm.config import ProposerConfig
from speclm.drafting.combined import CombinedProposer
from speclm.drafting.interface import Draft, Proposer
from speclm.errors import DraftError
from speclm.generation.drafts import (
    cut_to_plan,
    deepest_paths,
    planned,
    require_distributions,
    require_valid,
    root_only,
    with_padding,
)
from speclm.methods.ngram.proposer import NgramProposer
from speclm.tree.plan import TreePlan
from speclm.tree.topology import chain, from_parents, path_products
from tests.models import prompts, shared_model

CPU = torch.device("cpu")
TREE = [0, 0, 0, 2, 3]  # the longest path is 0, 2, 3, 4


def draft_of(parents, *, rows):
    topology = from_parents(parents, device=CPU)
    tokens = torch.arange(topology.num_nodes).expand(rows, -1) + 10
    return Draft(tokens=tokens, topology=topology)


def path_of(draft, row, token):
    """Follow first children that hold `token`, as the lockstep does."""
    shapes = draft.topology.host_parents
    parents, tokens = shapes[row if len(shapes) > 1 else 0], draft.tokens[row].tolist()
    path = [0]
    while True:
        children = [
            node
            for node in range(path[-1] + 1, len(parents))
            if parents[node] == path[-1] and tokens[node] == token
        ]
        if not children:
            return path
        path.append(children[0])


def test_draft_of_the_root_is_a_step_of_plain_decoding():
    draft = root_only(torch.tensor([4, 5]))
    assert draft.tokens.tolist() == [[4], [5]]
    assert draft.topology.num_nodes == 1


@pytest.mark.parametrize("pad", [0, 7])
@pytest.mark.parametrize("shapes", [[TREE], [[0, 0, 1, 2, 4], TREE]])
def test_ended_rows_go_on_with_padding_as_deep_as_any(shapes, pad):
    draft = draft_of(shapes, rows=2)
    padded = with_padding(draft, torch.tensor([3, 9]), [False, True], pad_token_id=pad)
    assert len(path_of(padded, 0, pad)) == 4
    assert padded.tokens[:, 0].tolist() == [3, 9]
    assert padded.tokens[1, 1:].tolist() == draft.tokens[1, 1:].tolist()
    shape = padded.topology.host_parents[-1]
    assert shape == draft.topology.host_parents[-1]
    assert draft.tokens[0].tolist() == [10, 11, 12, 13, 14]  # the proposer's own is left alone


def test_something_else_than_a_draft_is_named():
    with pytest.raises(DraftError, match="returned a list"):
        require_valid([1], torch.tensor([1]))


def test_draft_for_other_rows_is_named():
    with pytest.raises(DraftError, match="expected 3 rows"):
        require_valid(draft_of([TREE], rows=2), torch.tensor([1, 2, 3]))


def test_missing_distributions_are_named():
    with pytest.raises(DraftError, match="distributions of shape None"):
        require_distributions(draft_of([TREE], rows=2), 20)
    require_distributions(Draft(torch.tensor([[1]]), chain(0)), 20)  # nothing was drawn


def test_trees_become_chains_along_their_deepest_paths():
    draft = draft_of([[0, 0, 0, 2, 3], [0, 0, 1, 1, 4]], rows=2)  # node 4 of row 1 is padding
    chains, nodes = deepest_paths(draft, depth=9)
    assert nodes == [[0, 2, 3, 4], [0, 1, 2]]
    assert chains.tokens[0].tolist() == [10, 12, 13, 14]
    assert chains.tokens[1, :3].tolist() == [10, 11, 12]
    assert chains.topology.host_parents == [[0, 0, 1, 2], [0, 0, 1, 3]]
    assert chains.topology.host_sizes == [4, 3]


def test_chains_are_cut_to_the_room_that_is_left():
    chains, nodes = deepest_paths(draft_of([TREE], rows=2), depth=1)
    assert nodes == [[0, 2], [0, 2]]
    assert chains.tokens.tolist() == [[10, 12], [10, 12]]


def test_of_drawn_children_the_first_is_followed_with_its_distribution_though_others_be_taller():
    topology = from_parents([[0, 0, 0, 2]], device=CPU)
    distributions = torch.eye(4)[None].repeat(2, 1, 1)
    tokens = torch.tensor([[7, 8, 9, 6], [7, 8, 9, 6]])
    probs = [[1.0, 0.5, 0.3, 0.1]] * 2
    chains, nodes = deepest_paths(
        Draft(tokens, topology, node_probs=probs, distributions=distributions), depth=5
    )
    assert nodes == [[0, 1], [0, 1]]
    assert chains.node_probs == [[1.0, 0.5], [1.0, 0.5]]
    assert torch.equal(chains.distributions, distributions[:, :2])


def test_drawn_chains_go_on_below_their_first_children_and_past_padding():
    draft = draft_of([[0, 0, 2, 0, 1, 3, 4]], rows=1)  # node 2 is padding
    distributions = torch.zeros(1, 7, 20)
    _, nodes = deepest_paths(replace(draft, distributions=distributions), depth=9)
    assert nodes == [[0, 1, 4, 6]]


def test_root_alone_stays_alone():
    chains, nodes = deepest_paths(root_only(torch.tensor([4, 5])), depth=3)
    assert chains.tokens.tolist() == [[4], [5]]
    assert nodes == [[0], [0]]


def test_a_draft_within_its_plan_is_not_touched():
    draft = draft_of([TREE], rows=2)
    assert cut_to_plan(draft, None) == (draft, None)
    assert cut_to_plan(draft, TreePlan(3, 4)) == (draft, None)


def test_the_first_nodes_are_kept_where_nothing_says_which_are_likely():
    draft = draft_of([TREE], rows=2)

    cut, nodes = cut_to_plan(draft, TreePlan(3, 3))

    assert nodes == [[0, 1, 2, 3]] * 2
    assert cut.tokens.tolist() == [[10, 11, 12, 13]] * 2
    assert cut.topology.host_parents == [[0, 0, 0, 2]]


def test_the_likeliest_nodes_are_kept_and_rows_may_differ():
    probs = [[1.0, 0.6, 0.3, 0.9, 0.9], [1.0, 0.1, 0.8, 0.9, 0.9]]
    draft = replace(draft_of([TREE], rows=2), node_probs=probs)

    cut, nodes = cut_to_plan(draft, TreePlan(3, 2))

    assert nodes == [[0, 1, 2], [0, 2, 3]]
    assert cut.tokens.tolist() == [[10, 11, 12], [10, 12, 13]]
    assert cut.topology.host_parents == [[0, 0, 0], [0, 0, 1]]
    assert cut.node_probs == [[1.0, 0.6, 0.3], [1.0, 0.8, 0.9]]


def test_probabilities_do_not_choose_among_drawn_nodes():
    probs = [[1.0, 0.1, 0.8, 0.9, 0.9]]
    draft = replace(draft_of([TREE], rows=1), node_probs=probs, distributions=torch.rand(1, 5, 7))

    cut, nodes = cut_to_plan(draft, TreePlan(3, 2))

    assert nodes == [[0, 1, 2]]
    assert torch.equal(cut.distributions, draft.distributions[:, :3])


@given(data=st.data())
def test_what_is_kept_is_a_tree_within_the_plan_of_the_best_probabilities(data):
    size = data.draw(st.integers(2, 14))
    parents = [0] + [data.draw(st.integers(0, node - 1)) for node in range(1, size)]
    numbers = st.sampled_from([0.0, 0.25, 0.5, 1.0])
    probs = [[1.0] + [data.draw(numbers) for _ in range(size - 1)]]
    draft = replace(draft_of([parents], rows=1), node_probs=probs)
    plan = TreePlan(data.draw(st.integers(1, 6)), data.draw(st.integers(1, 8)))

    cut, nodes = cut_to_plan(draft, plan)

    assert cut.topology.num_nodes - 1 <= plan.num_draft_tokens
    assert cut.topology.max_depth <= plan.depth
    if nodes is not None:
        probabilities = path_products(parents, probs[0])
        depths = draft.topology.host_node_depths[0]
        left = [n for n in range(size) if n not in nodes[0] and depths[n] <= plan.depth]
        assert len(nodes[0]) - 1 == plan.num_draft_tokens or not left
        assert all(probabilities[n] <= min(probabilities[kept] for kept in nodes[0]) for n in left)
        found = cut.topology.host_parents[0]
        assert [nodes[0][parent] for parent in found] == [parents[node] for node in nodes[0]]


def test_a_plan_is_handed_to_every_part_and_taken_back_after_an_error():
    part = NgramProposer()
    joined = CombinedProposer([CombinedProposer([part])])
    with suppress(ZeroDivisionError), planned(joined, TreePlan(2, 3)):
        assert joined.plan == part.plan == TreePlan(2, 3)
        raise ZeroDivisionError
    assert joined.plan is None
    assert part.plan is None
    with planned(None, TreePlan(2, 3)):
        pass


class Observer(Proposer):
    """Drafts one tree again and again, and keeps what the target thought likely in each text."""

    config = ProposerConfig(depth=3)
    num_observed = 2

    def __init__(self):
        self.seen = []  # the text up to a node, and the likeliest tokens after it

    def begin(self, prompt):
        last = prompt.first_tokens.tolist()
        rows = zip(prompt.tokens.tolist(), prompt.num_padding.tolist(), last, strict=True)
        self.texts = [[*row[padding:], token] for row, padding, token in rows]

    def propose(self, roots, *, noise):
        tree = draft_of([TREE], rows=len(roots))
        return replace(tree, node_probs=[[1.0, 0.1, 0.5, 0.9, 0.9]] * len(roots))

    def commit(self, accepted):
        ids, _ = accepted.candidates.on_host()
        for row, text in enumerate(self.texts):
            if accepted.emitted[row]:
                nodes = accepted.candidates.nodes_of(row, num_nodes=len(TREE))
                for column, node in enumerate(nodes):
                    text_there = (*text, *path_to(node))
                    self.seen.append((text_there, ids[row, column].tolist()))
            text.extend(accepted.emitted[row])


def path_to(node):
    """Return the tokens on the path to a node of the observer's tree."""
    return [] if node == 0 else [*path_to(TREE[node]), node + 10]


@pytest.mark.parametrize(
    ("family", "plan", "num_nodes"),
    [
        ("llama", None, 5),
        ("llama", TreePlan(2, 2), 3),  # nodes 0, 2 and 3 are left
        ("bloom", None, 4),  # a chain of nodes 0, 2, 3 and 4
        ("bloom", TreePlan(2, 2), 3),
    ],
)
def test_candidates_come_with_the_nodes_of_the_whole_draft(family, plan, num_nodes):
    base, observer = shared_model(family), Observer()
    inputs = prompts(5, 3)
    SpecModel(base, observer, adaptive=False).generate(**inputs, max_new_tokens=9, tree=plan)
    of_first_round = {text for text, _ in observer.seen if text[:5] == observer.seen[0][0][:5]}
    assert len(of_first_round) >= num_nodes
    for text, found in observer.seen[: 4 * num_nodes]:  # later nodes are beyond the end
        logits = base(torch.tensor([text])).logits[0, -1]
        assert found == logits.topk(2).indices.tolist()


class Learner(NgramProposer):
    """Counts the rounds in which it is told what the target thought likely."""

    num_observed = 2  # type: ignore[assignment]

    def __init__(self):
        super().__init__()
        self.num_told = self.num_rounds = 0

    def commit(self, accepted):
        self.num_rounds += 1
        self.num_told += accepted.candidates is not None
        super().commit(accepted.with_candidates(None))


@pytest.mark.parametrize("is_paused", [False, True])
def test_candidates_are_computed_in_few_rounds_while_drafts_pause(is_paused, monkeypatch):
    monkeypatch.setattr(Pausing, "wants_draft", lambda _: False)
    monkeypatch.setattr(Ledger, "is_paused", lambda _: is_paused)
    learner, base = Learner(), shared_model("llama")
    output = SpecModel(base, learner).generate(**prompts(6), max_new_tokens=11)
    assert output.shape[1] == 17
    assert learner.num_rounds == 10  # with that of the prompt
    assert learner.num_told == (4 if is_paused else 10)
