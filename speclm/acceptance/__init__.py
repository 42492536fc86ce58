"""Acceptance rules: which draft tokens are kept."""

from speclm.acceptance.exact import ExactRule, accept_exact
from speclm.acceptance.interface import (
    AcceptanceRule,
    Accepted,
    Verified,
    register_acceptance_rule,
    registered_acceptance_rules,
    resolve_acceptance_rule,
)
from speclm.acceptance.rejection import RejectionRule
from speclm.acceptance.typical import TypicalRule

__all__ = [
    "AcceptanceRule",
    "Accepted",
    "ExactRule",
    "RejectionRule",
    "TypicalRule",
    "Verified",
    "accept_exact",
    "register_acceptance_rule",
    "registered_acceptance_rules",
    "resolve_acceptance_rule",
]
