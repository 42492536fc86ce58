"""Drafts as the loop needs them."""

import pytest
import torch

from speclm.acceptance import ExactRule, RejectionRule
from speclm.errors import DraftError, OptionError
from speclm.generation.drafting import (
    require_drafts_for,
    require_laws,
    require_valid,
    roots_alone,
    with_padding,
)
from speclm.proposers import NgramProposer
from speclm.proposers.interface import Draft
from speclm.tree.topology import chain, from_parents

CPU = torch.device("cpu")
TREE = [0, 0, 0, 2, 3]  # the longest path is 0, 2, 3, 4


def draft_of(parents, *, rows):
    topology = from_parents(parents, device=CPU)
    tokens = torch.arange(topology.num_nodes).expand(rows, -1) + 10
    return Draft(tokens=tokens, topology=topology, probs=None)


def path_of(draft, row, token):
    """Follow first children that hold `token`, as the frontier does."""
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


def test_roots_alone_are_a_step_of_plain_decoding():
    draft = roots_alone(torch.tensor([4, 5]))
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


def test_missing_laws_are_named():
    with pytest.raises(DraftError, match="laws of shape None"):
        require_laws(draft_of([TREE], rows=2), 20)
    require_laws(Draft(torch.tensor([[1]]), chain(0), probs=None), 20)  # nothing was drawn


def test_rule_for_drawn_drafts_needs_a_proposer_that_draws():
    require_drafts_for(ExactRule(), NgramProposer())
    with pytest.raises(OptionError, match="does not draw"):
        require_drafts_for(RejectionRule("block"), NgramProposer())
