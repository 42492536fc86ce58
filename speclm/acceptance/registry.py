"""Acceptance rules by name."""

from collections.abc import Callable
from typing import TypeVar

from speclm.acceptance.interface import AcceptanceRule
from speclm.errors import OptionError, UnknownNameError

_RULES: dict[str, type[AcceptanceRule]] = {}

RuleType = TypeVar("RuleType", bound=type[AcceptanceRule])


def register_acceptance_rule(name: str) -> Callable[[RuleType], RuleType]:
    """Make a rule available as ``acceptance=name``; the class must be callable without arguments.

    Registering a name again replaces the class, so that a notebook cell can be run twice.

    Example:
        ```python
        @register_acceptance_rule("mine")
        class MyRule(AcceptanceRule): ...
        ```
    """

    def register(rule_type: RuleType) -> RuleType:
        _RULES[name] = rule_type
        return rule_type

    return register


def registered_acceptance_rules() -> dict[str, type[AcceptanceRule]]:
    """Return the registered classes by name."""
    return dict(_RULES)


def resolve_acceptance_rule(acceptance: object) -> AcceptanceRule:
    """Return the rule that an argument ``acceptance`` stands for.

    Args:
        acceptance: A registered name, which gives the rule with its defaults, or a rule.

    Raises:
        UnknownNameError: If no rule has that name.
        OptionError: If it is neither a name nor a rule.
    """
    if isinstance(acceptance, AcceptanceRule):
        return acceptance
    if not isinstance(acceptance, str):
        raise OptionError(
            f"acceptance is {acceptance!r}, expected one of the names {sorted(_RULES)!r} or an "
            "AcceptanceRule; pass an instance, not a class"
        )
    if acceptance not in _RULES:
        raise UnknownNameError(
            f"acceptance {acceptance!r} is no registered rule, expected one of "
            f"{sorted(_RULES)!r}; decorate your own with @register_acceptance_rule"
        )
    return _RULES[acceptance]()
