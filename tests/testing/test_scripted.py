import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speclm.acceptance import accept_exact
from speclm.drafting.interface import Prefill
from speclm.errors import OptionError, TreeBudgetError
from speclm.testing import ScriptedProposer

ROOT = 5  # last token of every prompt


def begin(proposer, reference):
    proposer.begin(
        Prefill(
            tokens=torch.ones(len(reference), 2, dtype=torch.long),
            num_padding=torch.zeros(len(reference), dtype=torch.long),
            first_tokens=torch.full((len(reference),), ROOT),
            temperature=0.0,
            max_new_tokens=100,
        )
    )


def drive(proposer, reference):
    """Decode the reference with the proposer's drafts; return the rounds each row took."""
    begin(proposer, reference)
    positions, rounds = [0] * len(reference), [0] * len(reference)
    while any(at < len(row) for at, row in zip(positions, reference, strict=True)):
        lasts = [[ROOT, *row][at] for row, at in zip(reference, positions, strict=True)]
        roots = torch.tensor(lasts)
        draft = proposer.propose(roots, noise=None)
        depths = draft.topology.depths.expand(len(reference), -1).tolist()
        choices = [
            [row[min(at + depth, len(row) - 1)] for depth in of_row]
            for row, at, of_row in zip(reference, positions, depths, strict=True)
        ]
        accepted = accept_exact(draft.tokens, torch.tensor(choices), draft.topology)
        left = [len(row) - at for row, at in zip(reference, positions, strict=True)]
        accepted = accepted.cut(left)
        for row, emitted in enumerate(accepted.emitted):
            assert emitted == reference[row][positions[row] : positions[row] + len(emitted)]
            positions[row] += len(emitted)
            rounds[row] += bool(emitted)
        proposer.commit(accepted)
    return rounds


tokens = st.lists(st.integers(0, 9), min_size=1, max_size=30)


@given(
    reference=st.lists(tokens, min_size=1, max_size=3),
    wrong_at=st.sets(st.integers(0, 29), max_size=6),
    depth=st.integers(1, 6),
    num_siblings=st.integers(0, 2),
)
def test_forwards_are_bounded_by_length_and_errors(reference, wrong_at, depth, num_siblings):
    proposer = ScriptedProposer(reference, wrong_at, depth=depth, num_siblings=num_siblings)
    for rounds, row in zip(drive(proposer, reference), reference, strict=True):
        assert rounds <= math.ceil(len(row) / (depth + 1)) + len(wrong_at)


def test_planted_error_costs_a_round():
    reference = [list(range(1, 21))]
    assert drive(ScriptedProposer(reference, depth=4), reference) == [4]
    assert drive(ScriptedProposer(reference, [1, 2, 3], depth=4), reference) == [7]


def test_true_child_comes_after_its_wrong_siblings():
    reference = [[6, 7]]
    proposer = ScriptedProposer(reference, depth=2, num_siblings=2)
    begin(proposer, reference)
    draft = proposer.propose(torch.tensor([ROOT]), noise=None)
    assert draft.tokens.tolist() == [[ROOT, 5, 5, 6, 6, 6, 7]]
    assert draft.topology.parents.tolist() == [[0, 0, 0, 0, 3, 3, 3]]


def test_even_error_replaces_the_token_and_odd_error_ends_the_path():
    reference, roots = [[6, 7, 8, 9]], torch.tensor([ROOT])
    for wrong_at, drafted in ((0, [5, 7, 8, 9]), (2, [6, 7, 7, 9]), (1, [6]), (3, [6, 7, 8])):
        proposer = ScriptedProposer(reference, [wrong_at], depth=4, num_siblings=0)
        begin(proposer, reference)
        assert proposer.propose(roots, noise=None).tokens.tolist() == [[ROOT, *drafted]]


def test_row_at_the_end_of_its_reference_is_padded():
    reference = [[], [2, 3]]
    proposer = ScriptedProposer(reference, depth=2, num_siblings=0)
    begin(proposer, reference)
    draft = proposer.propose(torch.tensor([ROOT, ROOT]), noise=None)
    assert draft.topology.is_padding.tolist() == [[False, True, True], [False] * 3]
    assert draft.tokens[1].tolist() == [ROOT, 2, 3]


def test_unusable_scripts_are_refused():
    with pytest.raises(OptionError, match="expected a reference"):
        ScriptedProposer([])
    with pytest.raises(OptionError, match="num_siblings=-1"):
        ScriptedProposer([[1]], num_siblings=-1)
    with pytest.raises(TreeBudgetError, match="depth"):
        ScriptedProposer([[1]], depth=0)
    with pytest.raises(OptionError, match="batch has 2 rows, the reference 1"):
        begin(ScriptedProposer([[1]]), [[1], [2]])
