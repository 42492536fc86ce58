"""What a self-check found."""

import math
from dataclasses import dataclass
from enum import Enum


class Backend(Enum):
    """What the self-check allows a target; the values are words for reports."""

    TREES = "tree attention"
    CHAINS = "chains"
    """One chain per row, read by the model as in regular generation; rows advance together."""
    PLAIN = "regular generation"


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """Verdict on a model.

    Args:
        backend: How its drafts are verified.
        reason: Why, and why by nothing better, in words for reports.
        error: Largest difference of a logit, relative to their spread, that the check of `backend`
            saw; for regular generation that of trees. Infinite when the check raised.
        milliseconds: What finding the verdict took.
        is_cached: Whether it was known from an earlier check.
        is_lasting: Whether another model of the same kind must get the same verdict; others are
            not cached.
        is_final: Whether it holds for every way to verify drafts.
    """

    backend: Backend
    reason: str
    error: float = math.inf
    milliseconds: float = 0.0
    is_cached: bool = False
    is_lasting: bool = True
    is_final: bool = False

    @property
    def passes(self) -> bool:
        """Whether drafts may be verified at all."""
        return self.backend is not Backend.PLAIN
