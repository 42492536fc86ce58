"""Static trees from how often guesses of each rank were accepted at each depth."""

from collections.abc import Sequence
from heapq import heappop, heappush

from speclm.config import MAX_NODES, require_count
from speclm.errors import OptionError
from speclm.tree.choices import Choices

# The tree to observe with: how deep, how many guesses below the root, and how far off the best
# guesses a path may stray, its ranks added up.
_DEEPEST = 8
_RANKS_BELOW_ROOT = 8
_NEAR_ROOT = 3
_SUM_NEAR_ROOT = 3
_SUM_OF_RANKS = 2

RankAcceptance = Sequence[Sequence[float]]
"""For each depth, the chance that the child of rank 0, 1, ... is accepted where its parent was."""


def calibrated_choices(acceptance: RankAcceptance, *, num_nodes: int) -> Choices:
    """Return the tree of the paths with the largest products of acceptance.

    Source: Cai et al. 2024 (Medusa), section 2.3.3, trees from the accuracies of heads by rank.

    Args:
        acceptance: By depth and rank.
        num_nodes: Most nodes, the root left out; fewer where nothing more was ever accepted.

    Raises:
        OptionError: If `num_nodes` does not fit into a round, or nothing was accepted.
    """
    require_count("num_nodes", num_nodes, low=1, high=MAX_NODES - 1)
    chosen: list[tuple[int, ...]] = []
    # Entries: minus the chance of the path, its length, the path.
    frontier: list[tuple[float, int, tuple[int, ...]]] = [(-1.0, 0, ())]
    while frontier and len(chosen) <= num_nodes:
        minus_chance, depth, path = heappop(frontier)
        chosen.append(path)
        for rank, share in enumerate(acceptance[depth] if depth < len(acceptance) else ()):
            if share > 0:
                heappush(frontier, (minus_chance * share, depth + 1, (*path, rank)))
    choices = chosen[1:]
    if not choices:
        raise OptionError(
            "no guess was ever accepted, so no tree pays; use prompts of the kind that the heads "
            "were trained for"
        )
    return tuple(sorted(choices, key=lambda path: (len(path), path)))


def expected_tau(acceptance: RankAcceptance, choices: Choices) -> float:
    """Return the tokens a round that the tree gives if ranks are accepted independently."""
    tau = 1.0
    for path in choices:
        chance = 1.0
        for depth, rank in enumerate(path):
            shares = acceptance[depth] if depth < len(acceptance) else ()
            chance *= shares[rank] if rank < len(shares) else 0.0
        tau += chance
    return tau


def observing_choices(*, max_depth: int) -> Choices:
    """Return a tree that shows which ranks are accepted: wide, and deep below the best ranks.

    Args:
        max_depth: Most levels; beyond eight none are added.
    """
    paths: list[tuple[int, ...]] = [(rank,) for rank in range(_RANKS_BELOW_ROOT)]
    level = paths
    for depth in range(2, min(max_depth, _DEEPEST) + 1):
        bound = _SUM_NEAR_ROOT if depth <= _NEAR_ROOT else _SUM_OF_RANKS
        level = [
            (*path, rank)
            for path in level
            for rank in range(bound + 1)
            if sum(path) + rank <= bound
        ]
        paths = [*paths, *level]
    return tuple(paths)
