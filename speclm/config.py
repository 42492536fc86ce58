"""Limits of a round and the settings of the built-in proposers, as frozen dataclasses."""

from dataclasses import dataclass

from speclm.errors import OptionError, TreeBudgetError

MAX_NODES = 512
"""Most nodes of one draft, root included; a tree beyond it costs more than it can win."""

MAX_LEAD = 64
"""Most positions the fastest row may be ahead of the slowest: bounds the noise that is kept."""

MAX_DEPTH = MAX_LEAD
"""Most levels below the root, since a row may not be further ahead than `MAX_LEAD`."""


MAX_MERGED_PROMPT = 1024
"""Longest prompt whose forward also verifies the first draft: its mask is dense."""


def require_in_range(name: str, value: int | float, *, low: int | float, high: int | float) -> None:
    """Check that an option lies in ``[low, high]``.

    Raises:
        OptionError: If it does not; the message names the option, the value and the range.
    """
    if not low <= value <= high:
        raise OptionError(f"{name} is {value!r}, expected {low!r} to {high!r}; choose one in range")


def require_depth(name: str, depth: int) -> None:
    """Check that a number of levels fits into a round.

    Raises:
        TreeBudgetError: If `depth` is below 1 or above `MAX_DEPTH`.
    """
    if not 1 <= depth <= MAX_DEPTH:
        raise TreeBudgetError(
            f"{name} is {depth!r}, a tree may be 1 to {MAX_DEPTH} levels deep; lower {name}"
        )


@dataclass(frozen=True, slots=True)
class ProposerConfig:
    """Settings that any proposer has.

    Args:
        depth: Most draft tokens on one path, in ``[1, MAX_DEPTH]``.
    """

    depth: int = 4

    def __post_init__(self) -> None:
        require_depth("depth", self.depth)
