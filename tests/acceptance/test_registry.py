import pytest

from speclm.acceptance import (
    ExactRule,
    RejectionRule,
    TypicalRule,
    register_acceptance_rule,
    registered_acceptance_rules,
    resolve_acceptance_rule,
)
from speclm.errors import OptionError, UnknownNameError


def test_the_three_rules_are_registered_and_built_with_their_defaults():
    expected = {"exact": ExactRule, "rejection": RejectionRule, "typical": TypicalRule}
    assert registered_acceptance_rules() == expected
    for name, rule in expected.items():
        assert resolve_acceptance_rule(name) == rule()


def test_a_rule_stands_for_itself():
    rule = TypicalRule(epsilon=0.2)
    assert resolve_acceptance_rule(rule) is rule


def test_registering_a_name_again_replaces_the_class(monkeypatch):
    monkeypatch.setattr("speclm.acceptance.registry._RULES", {})
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
