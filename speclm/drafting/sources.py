"""What a draft tree is grown from: sources of tokens that may follow a node."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from speclm.drafting.interface import Prefill

State = Any
"""A source's own; None if it has nothing to say at or below a node."""


class CandidateSource(ABC):
    """Suggests tokens that may follow a node of a draft tree.

    Attributes:
        start_rates: Hit rate of each key before anything is measured; its length is the number of
            keys.
    """

    start_rates: Sequence[float]

    @abstractmethod
    def begin(self, prompt: Prefill) -> None:
        """Start a generation, whose rows are those of the prompt."""

    @abstractmethod
    def root(self, row: int) -> State:
        """Return the state after the committed tokens of a row."""

    @abstractmethod
    def advance(self, state: State, token: int) -> State:
        """Return the state one token later."""

    @abstractmethod
    def candidates(self, state: State, *, limit: int) -> list[tuple[int, int]]:
        """Return at most `limit` pairs of a token and a key, best first.

        The key is the class of evidence, such as the rank or the length of a match.
        """

    @abstractmethod
    def commit(self, row: int, emitted: list[int]) -> None:
        """Append emitted tokens to a row's text."""
