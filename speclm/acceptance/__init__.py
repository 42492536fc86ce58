"""Acceptance rules: what of a draft survives."""

from speclm.acceptance.accepted import Accepted
from speclm.acceptance.exact import ExactRule, accept_exact
from speclm.acceptance.interface import AcceptanceRule, Verified
from speclm.acceptance.registry import (
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
