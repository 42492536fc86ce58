"""Size and shape of the trees of the next rounds."""

from dataclasses import dataclass

from speclm.config import MAX_NODES, require_count, require_depth, require_in_range
from speclm.errors import OptionError
from speclm.tree.static import RankPaths, normalize_paths


@dataclass(frozen=True, slots=True)
class TreePlan:
    """Size and shape of the drafts of the next rounds.

    Args:
        depth: Maximum levels; each may cost a run of the proposer's network.
        num_draft_tokens: Maximum nodes, root excluded.
        paths: A static tree as paths of ranks; None for trees that grow by probability.
        min_probability: Nodes of a growing tree whose path is less likely than this are left out;
            None for the proposer's own threshold.
        min_confidence: No level is added when the most likely path is less likely than this;
            None for the proposer's own threshold.

    Raises:
        OptionError: If a number is out of range, or the static tree is larger than the plan.
        TreeBudgetError: If `depth` is out of range.
        TopologyError: If `paths` do not form a tree.
    """

    depth: int
    num_draft_tokens: int
    paths: RankPaths | None = None
    min_probability: float | None = None
    min_confidence: float | None = None

    def __post_init__(self) -> None:
        require_depth("depth", self.depth)
        require_count("num_draft_tokens", self.num_draft_tokens, low=1, high=MAX_NODES - 1)
        for name in ("min_probability", "min_confidence"):
            if getattr(self, name) is not None:
                require_in_range(name, getattr(self, name), low=0.0, high=1.0)
        if self.paths is None:
            return
        paths = normalize_paths(self.paths)
        object.__setattr__(self, "paths", paths)  # plans are keys, so they cannot hold lists
        if len(paths) > self.num_draft_tokens or max(map(len, paths)) > self.depth:
            raise OptionError(
                f"paths have {len(paths)} nodes on {max(map(len, paths))} levels, expected "
                f"at most {self.num_draft_tokens} on {self.depth}; use `TreePlan.of`"
            )

    @classmethod
    def of(cls, paths: RankPaths) -> "TreePlan":
        """Return the plan in which every tree is this static one."""
        paths = normalize_paths(paths)
        return cls(max(map(len, paths)), len(paths), paths)
