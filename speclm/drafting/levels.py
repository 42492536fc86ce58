"""Settings and steps of proposers that draft a tree level by level."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from speclm.config import MAX_NODES, ProposerConfig, require_count, require_depth, require_in_range
from speclm.devices import upload
from speclm.drafting.interface import Draft, Prefill
from speclm.drafting.mixture import Mixture, require_mixture
from speclm.errors import OptionError
from speclm.tree.dynamic import GrownRow
from speclm.tree.plan import TreePlan
from speclm.tree.static import RankPaths, normalize_paths
from speclm.tree.topology import trees_of


@dataclass(frozen=True, slots=True)
class GrownTreeConfig(ProposerConfig):
    """Settings of proposers whose trees grow by level.

    Args:
        depth: Maximum levels of the tree.
        num_draft_tokens: Maximum nodes drafted per round.
        width: Nodes expanded at each level; 1 with one branch makes a chain.
        branches: Children considered for each expanded node.
        min_probability: Nodes whose path is less likely than this are left out; of no effect on
            accelerators, where a node costs little, except in a `TreePlan`.
        min_confidence: A row stops growing when its most likely path is less likely than this. On
            accelerators: no level is drafted below one that is accepted less often than this.
        paths: Static tree as paths of ranks; None for trees that grow by probability.
        mixture: Parameters of the distribution that ranks candidates under sampling; None
            estimates them from what the target chooses.
    """

    depth: int = 16
    num_draft_tokens: int = 16
    width: int = 1
    branches: int = 2
    min_probability: float = 0.1
    min_confidence: float = 0.4
    paths: RankPaths | None = None
    mixture: Mixture | None = None

    def __post_init__(self) -> None:
        require_depth("depth", self.depth)  # super() does not work in a slotted dataclass
        for name in ("num_draft_tokens", "width", "branches"):
            require_count(name, getattr(self, name), low=1, high=MAX_NODES - 1)
        for name in ("min_probability", "min_confidence"):
            require_in_range(name, getattr(self, name), low=0.0, high=1.0)
        require_mixture(self.mixture)
        if self.paths is not None:
            object.__setattr__(self, "paths", normalize_paths(self.paths))


@dataclass(frozen=True, slots=True)
class RunByLevelConfig(GrownTreeConfig):
    """Settings of proposers whose network runs once for each level, for all rows together.

    Args:
        min_growing: No level is added when a smaller share of the rows still grows.
    """

    min_growing: float = 0.75

    def __post_init__(self) -> None:
        GrownTreeConfig.__post_init__(self)  # super() does not work in a slotted dataclass
        require_in_range("min_growing", self.min_growing, low=0.0, high=1.0)


_KEPT_SHARE = 0.95  # of what is known of a level, with every new observation


class _LevelRate:
    """Estimates how often a level is accepted if the one above it is."""

    def __init__(self) -> None:
        self._num_hits, self._num_tries = 1.7, 2.0  # as if a few rounds had been observed

    @property
    def value(self) -> float:
        return self._num_hits / self._num_tries

    def observe(self, *, is_hit: bool) -> None:
        self._num_hits = _KEPT_SHARE * self._num_hits + is_hit
        self._num_tries = _KEPT_SHARE * self._num_tries + 1

    def forget(self) -> None:
        """Move towards the first estimate, so that a level that was left out is tried again."""
        new = _LevelRate()
        self._num_hits += (1 - _KEPT_SHARE) * (new._num_hits - self._num_hits)
        self._num_tries += (1 - _KEPT_SHARE) * (new._num_tries - self._num_tries)


class LevelBounds:
    """Follows how many levels the draft of each row may have: none while it emits nothing.

    Where nothing is read during a draft, it also says how many levels pay, from how many of the
    last drafts were accepted.
    """

    def __init__(self, prompt: Prefill) -> None:
        """Start a generation."""
        batch = len(prompt.first_tokens)
        self._room = [prompt.max_new_tokens - 1] * batch  # the bonus token needs no draft
        self._is_idle = [False] * batch
        self._rates: list[_LevelRate] = []
        self._num_drafted = 0  # levels of the last draft, if `expected` decided that

    def commit(self, emitted: Sequence[Sequence[int]]) -> None:
        """Count the tokens that each row emitted; one without any has ended, or waits."""
        self._room = [room - len(new) for room, new in zip(self._room, emitted, strict=True)]
        self._is_idle = [not new for new in emitted]
        rates, num_drafted = self._rates, self._num_drafted
        for accepted in [len(new) - 1 for new in emitted if new]:
            for level in range(min(accepted + 1, num_drafted)):
                rates[level].observe(is_hit=accepted > level)
        for rate in rates[num_drafted:]:
            rate.forget()
        self._num_drafted = 0

    def levels(self, depth: int, *, reads: bool, least: float) -> list[int]:
        """Return the maximum levels of the next draft of each row.

        Args:
            depth: Maximum levels of any draft.
            reads: Whether the host reads every level, and stops a draft by its probabilities.
            least: If not: a level is drafted if the one above it is accepted at least with this
                probability, estimated from the last drafts.
        """
        if reads:
            return self.within(depth)
        bound, reached, num_levels = max(self.within(depth)), 1.0, 0
        while num_levels < bound and reached >= least:
            if num_levels == len(self._rates):
                self._rates.append(_LevelRate())
            reached *= self._rates[num_levels].value
            num_levels += 1
        self._num_drafted = num_levels
        return [num_levels] * len(self._room)

    def within(self, depth: int) -> list[int]:
        """Return the maximum levels of each row, at most `depth`."""
        rows = zip(self._room, self._is_idle, strict=True)
        return [0 if is_idle else max(min(room, depth), 0) for room, is_idle in rows]


ConfigT = TypeVar("ConfigT", bound=GrownTreeConfig)


def options_with_tree(tree: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a `GrownTreeConfig` for a static tree.

    Args:
        tree: A tree in any form that `normalize_paths` accepts.
        options: Other options. With `num_draft_tokens`, the first nodes by depth are kept.

    Raises:
        UnknownNameError: If no preset has that name.
        TopologyError: If `tree` is not a tree.
        OptionError: If `num_draft_tokens` is out of range.
    """
    paths = normalize_paths(tree)
    if "num_draft_tokens" in options:
        bound = options["num_draft_tokens"]
        require_count("num_draft_tokens", bound, low=1, high=MAX_NODES - 1)
        paths = paths[:bound]
    size = {"depth": max(map(len, paths)), "num_draft_tokens": len(paths)}
    return {**options, **size, "paths": paths}


def require_ranks(paths: RankPaths, vocab_size: int) -> None:
    """Check that the ranks of a static tree fit into the draft vocabulary.

    Raises:
        OptionError: If a rank exceeds the vocabulary.
    """
    rank = max(map(max, paths))
    if rank >= vocab_size:
        raise OptionError(
            f"tree asks for rank {rank}, the draft vocabulary has {vocab_size} tokens; "
            "use smaller ranks"
        )


@lru_cache(maxsize=64)
def planned(config: ConfigT, plan: TreePlan) -> ConfigT:
    """Return a config with the values that a plan sets."""
    changes: dict[str, Any] = {
        name: getattr(plan, name)
        for name in ("min_probability", "min_confidence")
        if getattr(plan, name) is not None
    }
    return replace(
        config,
        depth=plan.depth,
        num_draft_tokens=plan.num_draft_tokens,
        paths=plan.paths,
        **changes,
    )


def assemble(grown: list[GrownRow], roots: Int[Tensor, " batch"]) -> Draft:
    """Return the draft of grown rows; short rows are padded with token 0, which is always valid."""
    parents = [[0, *row.parents] for row in grown]
    nodes = max(map(len, parents))
    drafted = [row.tokens + [0] * (nodes - 1 - len(row.tokens)) for row in grown]
    tokens = upload(drafted, roots.device)
    return Draft(
        tokens=torch.cat([roots[:, None], tokens], dim=1),
        topology=trees_of(parents, device=roots.device),
        node_probs=[
            [1.0, *row_probs(row), *[0.0] * (nodes - 1 - len(row.tokens))] for row in grown
        ],
    )


def row_probs(row: GrownRow) -> list[float]:
    """Return the probability of each node given its path, from cumulative log-probabilities."""
    scores = [0.0, *row.scores]
    return [
        math.exp(min(score - scores[parent], 0.0))
        for score, parent in zip(row.scores, row.parents, strict=True)
    ]


def seen_below(
    seen: Bool[Tensor, "batch parents slots"], parents: Int[Tensor, "batch width"]
) -> Bool[Tensor, "batch width slots_and_width"]:
    """Return the mask of new nodes: each sees what its parent sees, and itself."""
    batch, width = parents.shape
    inherited = seen.gather(1, parents[:, :, None].expand(-1, -1, seen.shape[2]))
    itself = torch.eye(width, dtype=torch.bool, device=seen.device).expand(batch, -1, -1)
    return torch.cat([inherited, itself], dim=2)


def least_probability(min_probability: float, *, num_rows: int) -> float:
    """Return the acceptance probability below which a node costs more time than it saves.

    Rows share the fixed cost of a round but not the cost of a node, so nodes have to be more
    likely in a larger batch. In batches of four, twice the threshold of a single row was best for
    n-grams and for Medusa heads; hence the square root.

    Args:
        min_probability: The threshold for a single row.
        num_rows: Rows that have not ended.
    """
    return min(min_probability * math.sqrt(max(num_rows, 1)), max(min_probability, 0.5))
