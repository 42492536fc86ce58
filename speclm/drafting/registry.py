"""Proposers by name."""

from collections.abc import Callable
from typing import TypeVar

from speclm.drafting.interface import Proposer

_PROPOSERS: dict[str, type[Proposer]] = {}

ProposerType = TypeVar("ProposerType", bound=type[Proposer])


def register_proposer(name: str) -> Callable[[ProposerType], ProposerType]:
    """Make a proposer available as ``heads=name``.

    Registering a name again replaces the class, so that a notebook cell can be run twice.

    Example:
        ```python
        @register_proposer("mine")
        class MyProposer(Proposer): ...
        ```
    """

    def register(proposer_type: ProposerType) -> ProposerType:
        _PROPOSERS[name] = proposer_type
        return proposer_type

    return register


def registered_proposers() -> dict[str, type[Proposer]]:
    """Return the registered classes by name."""
    return dict(_PROPOSERS)
