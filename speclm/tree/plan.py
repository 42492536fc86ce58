"""How large the trees of the next rounds should be."""

from dataclasses import dataclass

from speclm.config import MAX_NODES, require_count, require_depth, require_in_range
from speclm.errors import OptionError
from speclm.tree.static import Choices, normalize_choices


@dataclass(frozen=True, slots=True)
class TreePlan:
    """What the drafts of the next rounds should be.

    Args:
        depth: Most levels, each of which may cost a run of the proposer's network.
        num_draft_tokens: Most nodes, the root left out.
        choices: Static tree as paths of ranks; None for trees that grow by probability.
        min_probability: Probability of acceptance below which a node of a growing tree costs more
            than it gives; None for the proposer's own.
        min_confidence: Probability of the best path below which another level costs more than it
            gives; None for the proposer's own.

    Raises:
        OptionError: If a number is out of range, or the static tree exceeds it.
        TreeBudgetError: If `depth` is out of range.
        TopologyError: If `choices` are no tree.
    """

    depth: int
    num_draft_tokens: int
    choices: Choices | None = None
    min_probability: float | None = None
    min_confidence: float | None = None

    def __post_init__(self) -> None:
        require_depth("depth", self.depth)
        require_count("num_draft_tokens", self.num_draft_tokens, low=1, high=MAX_NODES - 1)
        for name in ("min_probability", "min_confidence"):
            if getattr(self, name) is not None:
                require_in_range(name, getattr(self, name), low=0.0, high=1.0)
        if self.choices is None:
            return
        choices = normalize_choices(self.choices)
        object.__setattr__(self, "choices", choices)  # plans are keys, which lists cannot be
        if len(choices) > self.num_draft_tokens or max(map(len, choices)) > self.depth:
            raise OptionError(
                f"choices have {len(choices)} nodes on {max(map(len, choices))} levels, expected "
                f"at most {self.num_draft_tokens} on {self.depth}; use `TreePlan.of`"
            )

    @classmethod
    def of(cls, choices: Choices) -> "TreePlan":
        """Return the plan that every tree is this static one."""
        choices = normalize_choices(choices)
        return cls(max(map(len, choices)), len(choices), choices)
