import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speclm.acceptance import (
    AcceptanceRule,
    Accepted,
    ExactRule,
    RejectionRule,
    TypicalRule,
    Verified,
    register_acceptance_rule,
    registered_acceptance_rules,
    resolve_acceptance_rule,
)
from speclm.acceptance.interface import TargetCandidates
from speclm.errors import OptionError, UnknownNameError
from speclm.sampling import DraftSampling, TokenChooser
from speclm.tree.topology import chain


class OneToken(AcceptanceRule):
    """Accepts nothing and goes on with the target's likeliest token."""

    @property
    def name(self):
        return "one token"

    def accept(self, verified):
        tokens = verified.logits[:, 0].argmax(-1).tolist()
        rows = [[0] if is_live else [] for is_live in verified.is_live]
        emitted = [[t] if live else [] for t, live in zip(tokens, verified.is_live, strict=True)]
        return Accepted.from_host(rows, emitted, device=verified.logits.device)


def test_a_rule_of_ones_own_promises_nothing_and_asks_for_nothing_by_default():
    rule = OneToken()
    assert (rule.is_lossy, rule.uses_noise, rule.uses_draws) == (False, False, False)
    assert rule.draft_sampling is DraftSampling.NONE


def test_a_rule_decides_on_what_the_target_has_read():
    logits = torch.zeros(2, 3, 5)
    logits[0, 0, 4] = 1.0
    verified = Verified(
        draft_tokens=torch.zeros(2, 3, dtype=torch.long),
        topology=chain(2),
        logits=logits,
        chooser=TokenChooser([], is_greedy=False),
        is_live=[True, False],
    )
    assert OneToken().accept(verified).emitted == [[4], []]


CPU = torch.device("cpu")
LOG_PROB_TOLERANCE = 1e-5  # float32, summed in another order


@st.composite
def rows_of_tokens(draw):
    return draw(st.lists(st.lists(st.integers(0, 99), max_size=5), min_size=1, max_size=4))


def build(rows):
    """Accepted with the given tokens; the path takes every second node."""
    width = max(1, *map(len, rows))
    tokens = torch.tensor([row + [-1] * (width - len(row)) for row in rows])
    path = (torch.arange(width) * 2).expand_as(tokens).masked_fill(tokens < 0, -1)
    return Accepted(path=path, tokens=tokens)


def test_lengths_and_bonus_of_mixed_rows():
    accepted = build([[4, 5, 6], [], [7]])
    assert accepted.num_tokens.tolist() == [3, 0, 1]
    assert accepted.accepted_length.tolist() == [2, 0, 0]
    assert accepted.bonus.tolist() == [6, -1, 7]
    assert accepted.paths == [[0, 2, 4], [], [0]]
    assert accepted.emitted == [[4, 5, 6], [], [7]]


@given(rows=rows_of_tokens(), data=st.data())
def test_cut_keeps_a_prefix_of_each_row(rows, data):
    limits = [data.draw(st.integers(0, 6)) for _ in rows]
    accepted = build(rows)
    cut = accepted.cut(limits)
    expected = [row[:limit] for row, limit in zip(rows, limits, strict=True)]
    assert cut.emitted == expected
    assert cut.paths == [[2 * step for step in range(len(row))] for row in expected]
    assert cut.num_tokens.tolist() == list(map(len, expected))
    assert cut.bonus.tolist() == [row[-1] if row else -1 for row in expected]
    assert accepted.emitted == rows


def test_cut_that_cuts_nothing_returns_itself():
    accepted = build([[1, 2], [3]])
    assert accepted.cut([2, 5]) is accepted


@given(rows_of_tokens())
def test_host_lists_and_tensors_agree_when_built_from_the_host(rows):
    paths = [list(range(len(row))) for row in rows]
    accepted = Accepted.from_host(paths, rows, device=CPU)
    again = Accepted(path=accepted.path, tokens=accepted.tokens)
    assert again.paths == accepted.paths == paths
    assert again.emitted == accepted.emitted == rows


def test_candidates_are_the_likeliest_tokens_with_their_log_probabilities():
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    found = TargetCandidates.best(logits, num=2)
    ids, log_probs = found.on_host()
    assert ids.tolist() == logits.argsort(-1, descending=True)[..., :2].tolist()
    expected = logits.log_softmax(-1).gather(-1, found.ids)
    assert torch.allclose(torch.from_numpy(log_probs), expected, atol=LOG_PROB_TOLERANCE)


def test_of_a_vocabulary_smaller_than_the_number_asked_for_all_tokens_are_candidates():
    assert TargetCandidates.best(torch.zeros(1, 2, 3), num=8).ids.shape == (1, 2, 3)


def candidates(nodes=None, *, num_columns=4):
    ids = torch.zeros(2, num_columns, 1, dtype=torch.long)
    return TargetCandidates(ids, ids.float(), nodes)


def test_candidates_of_a_whole_draft_are_those_of_its_nodes_without_padding():
    assert candidates().nodes_of(0, num_nodes=3) == [0, 1, 2]
    assert candidates(num_columns=1).nodes_of(0, num_nodes=3) == [0]  # a step without a draft


def test_candidates_of_a_cut_draft_name_the_nodes_that_were_kept():
    cut = candidates([[0, 2, 5], [0, 1]], num_columns=3)
    assert cut.nodes_of(0, num_nodes=6) == [0, 2, 5]
    assert cut.nodes_of(1, num_nodes=4) == [0, 1]
    assert candidates([[0, 2, 5], [0, 1]], num_columns=1).nodes_of(0, num_nodes=6) == [0]


def test_copies_keep_candidates_and_what_is_known_on_the_host():
    known = Accepted.from_host([[0, 1], [0]], [[4, 5], [6]], device=CPU)
    found = candidates()
    with_both = known.with_candidates(found).with_path_features(torch.ones(2, 2, 3))
    assert with_both.candidates is found
    assert with_both.paths is known.paths
    assert with_both.emitted is known.emitted
    assert with_both.with_paths([[0], [0]]).candidates is found


def test_round_that_emits_nothing_at_all():
    accepted = Accepted.from_host([[], []], [[], []], device=CPU)
    assert accepted.path.shape == (2, 0)
    assert accepted.num_tokens.tolist() == [0, 0]
    assert accepted.bonus.tolist() == [-1, -1]


def test_the_three_rules_are_registered_and_built_with_their_defaults():
    expected = {"exact": ExactRule, "rejection": RejectionRule, "typical": TypicalRule}
    assert registered_acceptance_rules() == expected
    for name, rule in expected.items():
        assert resolve_acceptance_rule(name) == rule()


def test_a_rule_stands_for_itself():
    rule = TypicalRule(epsilon=0.2)
    assert resolve_acceptance_rule(rule) is rule


def test_registering_a_name_again_replaces_the_class(monkeypatch):
    monkeypatch.setattr("speclm.acceptance.interface._RULES", {})
    assert register_acceptance_rule("mine")(ExactRule) is ExactRule
    register_acceptance_rule("mine")(TypicalRule)
    assert resolve_acceptance_rule("mine") == TypicalRule()


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(UnknownNameError, match=r"'best' is no registered rule.*'rejection'"):
        resolve_acceptance_rule("best")


@pytest.mark.parametrize("acceptance", [None, TypicalRule, 3])
def test_other_objects_are_refused(acceptance):
    with pytest.raises(OptionError, match="or an AcceptanceRule; pass an instance"):
        resolve_acceptance_rule(acceptance)


def test_features_of_a_single_path_end_with_its_tokens():
    found = Accepted(torch.tensor([[0, 2, -1]]), torch.tensor([[5, 6, -1]]))
    taken = found.with_features(torch.arange(4.0)[None, :, None])
    assert taken.features.flatten().tolist() == [0.0, 2.0]
