"""What proposers share that draft a tree a level at a time with a cache of their own."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from speclm.config import MAX_NODES, ProposerConfig, require_count, require_depth, require_in_range
from speclm.drafting.interface import Draft
from speclm.drafting.mixture import Mixture, require_mixture
from speclm.errors import OptionError
from speclm.tree.dynamic import GrownRow
from speclm.tree.plan import TreePlan
from speclm.tree.static import Choices, normalize_choices
from speclm.tree.topology import trees_of


@dataclass(frozen=True, slots=True)
class GrownTreeConfig(ProposerConfig):
    """Settings of proposers whose trees grow by level.

    Args:
        depth: Most levels of the tree, each of which costs a run of the proposer's network.
        num_draft_tokens: Most nodes drafted a round.
        width: Nodes expanded at each level; 1 with one branch makes a chain.
        branches: Children considered for each expanded node.
        min_probability: Nodes less likely than this are not verified.
        min_confidence: A row grows no further once no path of it is this likely.
        min_growing: No further level is drafted once a smaller share of the rows grows: a level
            costs the whole batch.
        choices: Static tree as paths of ranks; None for trees that grow by probability.
        mixture: Numbers of the distribution that ranks candidates under sampling; None to estimate
            them from what the target chooses.
    """

    depth: int = 16
    num_draft_tokens: int = 16
    width: int = 1
    branches: int = 2
    min_probability: float = 0.1
    min_confidence: float = 0.4
    min_growing: float = 0.75
    choices: Choices | None = None
    mixture: Mixture | None = None

    def __post_init__(self) -> None:
        require_depth("depth", self.depth)  # super() does not work in a slotted dataclass
        for name in ("num_draft_tokens", "width", "branches"):
            require_count(name, getattr(self, name), low=1, high=MAX_NODES - 1)
        for name in ("min_probability", "min_confidence", "min_growing"):
            require_in_range(name, getattr(self, name), low=0.0, high=1.0)
        require_mixture(self.mixture)
        if self.choices is not None:
            object.__setattr__(self, "choices", normalize_choices(self.choices))


ConfigT = TypeVar("ConfigT", bound=GrownTreeConfig)


def options_with_tree(tree: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a config of which a static tree sets the size.

    Args:
        tree: As `normalize_choices` takes it.
        options: The others; of `num_draft_tokens` nodes the first by depth are kept.

    Raises:
        UnknownNameError: If no preset has that name.
        TopologyError: If the tree is none.
        OptionError: If `num_draft_tokens` is out of range.
    """
    choices = normalize_choices(tree)
    if "num_draft_tokens" in options:
        bound = options["num_draft_tokens"]
        require_count("num_draft_tokens", bound, low=1, high=MAX_NODES - 1)
        choices = choices[:bound]
    size = {"depth": max(map(len, choices)), "num_draft_tokens": len(choices)}
    return {**options, **size, "choices": choices}


def require_ranks(choices: Choices, vocab_size: int) -> None:
    """Check that a static tree asks for no more guesses than there are.

    Raises:
        OptionError: If a rank exceeds the vocabulary that guesses are from.
    """
    rank = max(map(max, choices))
    if rank >= vocab_size:
        raise OptionError(
            f"tree asks for rank {rank}, guesses are from a vocabulary of {vocab_size} tokens; "
            "use smaller ranks"
        )


@lru_cache(maxsize=64)
def planned(config: ConfigT, plan: TreePlan) -> ConfigT:
    """Return a config of trees that grow by level, with what the plan says in its place."""
    changes: dict[str, Any] = {
        "depth": plan.depth,
        "num_draft_tokens": plan.num_draft_tokens,
        "choices": plan.choices,
    }
    if plan.min_probability is not None:
        changes["min_probability"] = plan.min_probability
    if plan.min_confidence is not None:
        changes["min_confidence"] = plan.min_confidence
    return replace(config, **changes)


def assemble(grown: list[GrownRow], roots: Int[Tensor, " batch"]) -> Draft:
    """Return the draft of grown rows; short ones are padded with token 0, which is always valid.

    Probabilities are those that the rows were ranked by.
    """
    parents = [[0, *row.parents] for row in grown]
    nodes = max(map(len, parents))
    guesses = [row.tokens + [0] * (nodes - 1 - len(row.tokens)) for row in grown]
    tokens = torch.tensor(guesses, dtype=torch.long, device=roots.device)
    probs = [[1.0, *row_probs(row), *[0.0] * (nodes - 1 - len(row.tokens))] for row in grown]
    return Draft(
        tokens=torch.cat([roots[:, None], tokens.view(len(guesses), -1)], dim=1),
        topology=trees_of(parents, device=roots.device),
        probs=torch.tensor(probs, device=roots.device, dtype=torch.float32),
    )


def row_probs(row: GrownRow) -> list[float]:
    """Return the probability of each node given its path, from cumulative log-probabilities."""
    above = [0.0, *row.scores]
    return [
        math.exp(min(score - above[parent], 0.0))
        for score, parent in zip(row.scores, row.parents, strict=True)
    ]


def seen_below(
    seen: Bool[Tensor, "batch above slots"], parents: Int[Tensor, "batch width"]
) -> Bool[Tensor, "batch width slots_and_width"]:
    """Return what new nodes see: what their parents see, and each itself."""
    batch, width = parents.shape
    above = seen.gather(1, parents[:, :, None].expand(-1, -1, seen.shape[2]))
    itself = torch.eye(width, dtype=torch.bool, device=seen.device).expand(batch, -1, -1)
    return torch.cat([above, itself], dim=2)


def least_probability(min_probability: float, *, num_rows: int) -> float:
    """Return the probability of acceptance below which a node costs more time than it saves.

    What a round costs at least is shared by the rows, what a node costs is not: among more rows a
    node has to be likelier. Measured on batches of four, where twice the threshold of a single
    row was best for n-grams and for Medusa heads; hence the square root.

    Args:
        min_probability: The threshold for a single row.
        num_rows: Rows that are still generated.
    """
    return min(min_probability * math.sqrt(max(num_rows, 1)), max(min_probability, 0.5))
