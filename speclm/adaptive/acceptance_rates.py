"""Acceptance rates of candidates by depth and rank, and the static trees that follow from them."""

from collections import Counter
from collections.abc import Sequence
from heapq import heappop, heappush

from jaxtyping import Int
from torch import Tensor
from typing_extensions import override

from speclm.acceptance import Accepted
from speclm.config import MAX_NODES, require_count
from speclm.drafting.interface import Draft, Prefill, Proposer
from speclm.errors import OptionError
from speclm.sampling.noise import PositionNoise
from speclm.target import TargetFeatures
from speclm.tree.plan import TreePlan
from speclm.tree.static import RankPath, RankPaths, sorted_paths

# Shape of the tree to observe with: its depth, its width below the root, and the largest sum of the
# ranks on a path, near the root and below.
_DEEPEST = 8
_RANKS_BELOW_ROOT = 8
_NEAR_ROOT = 3
_SUM_NEAR_ROOT = 3
_SUM_OF_RANKS = 2

RankAcceptance = Sequence[Sequence[float]]
"""For each depth, the probability that the child of rank 0, 1, ... is accepted if its parent is."""

Ranks = Sequence[Sequence[int]]
"""For each root of a text the rank of the token 1, 2, ... after it; -1 past the end of the text."""


def calibrated_paths(acceptance: RankAcceptance, *, num_nodes: int) -> RankPaths:
    """Return the static tree of the paths with the largest products of acceptance rates.

    Source: Cai et al. 2024 (Medusa), section 2.3.3, trees from the accuracies of heads by rank.

    Args:
        acceptance: Acceptance rates by depth and rank.
        num_nodes: Maximum nodes, root excluded; fewer if no others were ever accepted.

    Raises:
        OptionError: If `num_nodes` does not fit into a round, or nothing was accepted.
    """
    require_count("num_nodes", num_nodes, low=1, high=MAX_NODES - 1)
    chosen: list[RankPath] = []
    # Entries: minus the probability of the path, its length, the path.
    candidates: list[tuple[float, int, RankPath]] = [(-1.0, 0, ())]
    while candidates and len(chosen) <= num_nodes:
        minus_probability, depth, path = heappop(candidates)
        chosen.append(path)
        for rank, share in enumerate(acceptance[depth] if depth < len(acceptance) else ()):
            if share > 0:
                heappush(candidates, (minus_probability * share, depth + 1, (*path, rank)))
    if len(chosen) == 1:
        raise OptionError(
            "no draft token was ever accepted, so no tree pays; use prompts of the kind that the "
            "heads were trained for"
        )
    return sorted_paths(chosen[1:])


def expected_tau(acceptance: RankAcceptance, paths: RankPaths) -> float:
    """Return the tau of a static tree if ranks are accepted independently."""
    tau = 1.0
    for path in paths:
        probability = 1.0
        for depth, rank in enumerate(path):
            shares = acceptance[depth] if depth < len(acceptance) else ()
            probability *= shares[rank] if rank < len(shares) else 0.0
        tau += probability
    return tau


def replay_rounds(ranks: Ranks, paths: RankPaths) -> list[int]:
    """Return the accepted length of each round in which a text would be generated.

    Args:
        ranks: Ranks at each root, from the text's first token on.
        paths: The static tree of every round.

    Example:
        >>> replay_rounds([[0, 1], [1, -1], [-1, -1]], ((0,), (0, 1)))
        [2]
    """
    nodes = set(paths)
    accepted_lengths = []
    position = 0
    while position < len(ranks):
        path = tuple(rank for rank in ranks[position] if rank >= 0)
        length = 0
        while length < len(path) and path[: length + 1] in nodes:
            length += 1
        accepted_lengths.append(length)
        position += length + 1
    return accepted_lengths


def observing_paths(*, max_depth: int) -> RankPaths:
    """Return the tree to observe with: wide below the root, and deep below the best ranks.

    Args:
        max_depth: Maximum levels; there are never more than eight.
    """
    paths: list[RankPath] = [(rank,) for rank in range(_RANKS_BELOW_ROOT)]
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


class RankRecorder(Proposer):
    """Counts which ranks are accepted while a proposer fills one wide static tree in every round.

    Example:
        ```python
        recorder = RankRecorder(proposer)
        SpecModel(base, recorder, adaptive=False).generate(**inputs)
        paths = calibrated_paths(recorder.acceptance, num_nodes=8)
        ```
    """

    def __init__(self, inner: Proposer) -> None:
        """Wrap a proposer.

        Raises:
            OptionError: If it does not fill static trees.
        """
        if not inner.fills_static_trees:
            raise OptionError(
                f"{type(inner).__name__} does not rank its candidates, expected a proposer that "
                'fills static trees, such as heads or a draft model; use tree="auto"'
            )
        self.config, self.parts = inner.config, (inner,)
        self._inner = inner
        self._tree = TreePlan.of(observing_paths(max_depth=inner.config.depth))
        self._offered: Counter[tuple[int, int]] = Counter()  # by depth and rank
        self._accepted: Counter[tuple[int, int]] = Counter()
        self._children: dict[RankPath, list[int]] = {}
        for path in self._tree.paths or ():
            self._children.setdefault(path[:-1], []).append(path[-1])
        self._drafted: list[RankPath] = [()]  # of each node of the last draft

    @property
    @override
    def features(self) -> TargetFeatures:  # type: ignore[override]  # the inner one decides
        return self._inner.features

    @property
    @override
    def num_observed(self) -> int:  # type: ignore[override]  # the inner one decides
        return self._inner.num_observed

    @property
    @override
    def needs_lockstep(self) -> bool:  # type: ignore[override]  # the inner one decides
        return self._inner.needs_lockstep

    @override
    def begin(self, prompt: Prefill) -> None:
        self._inner.begin(prompt)

    @override
    def propose(self, roots: Int[Tensor, " batch"], *, noise: PositionNoise | None) -> Draft:
        self._inner.plan = self._tree
        draft = self._inner.propose(roots, noise=noise)
        # The proposer may have left out levels that are too deep for it.
        parents = draft.topology.host_parents[0]
        self._drafted = [()]
        num_children: Counter[int] = Counter()
        for parent in parents[1:]:
            self._drafted.append((*self._drafted[parent], num_children[parent]))
            num_children[parent] += 1
        return draft

    @override
    def commit(self, accepted: Accepted) -> None:
        if len(self._drafted) > 1:
            for path in accepted.paths:
                if path:
                    self._count(self._drafted[path[-1]])
        self._drafted = [()]
        self._inner.commit(accepted)

    @property
    def acceptance(self) -> RankAcceptance:
        """Acceptance rate of each rank by depth."""
        widths: dict[int, int] = {}
        for depth, rank in self._accepted:
            widths[depth] = max(widths.get(depth, 0), rank + 1)
        return [
            [
                self._accepted[depth, rank] / max(self._offered[depth, rank], 1)
                for rank in range(widths[depth])
            ]
            for depth in range(len(widths))
        ]

    def _count(self, taken: RankPath) -> None:
        for depth in range(len(taken) + 1):
            for rank in self._children.get(taken[:depth], ()):
                self._offered[depth, rank] += 1
            if depth < len(taken):
                self._accepted[depth, taken[depth]] += 1
