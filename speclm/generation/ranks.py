"""Learns which ranks of a proposer's guesses are accepted at which depth, while it decodes."""

from collections import Counter

from jaxtyping import Int
from torch import Tensor
from typing_extensions import override

from speclm.acceptance.accepted import Accepted
from speclm.errors import OptionError
from speclm.proposers.interface import Draft, Prefill, Proposer
from speclm.sampling.noise import PositionNoise
from speclm.target import TargetFeatures
from speclm.tree.calibrated import RankAcceptance, observing_choices
from speclm.tree.choices import Choices
from speclm.tree.plan import TreePlan


class RankRecorder(Proposer):
    """Has a proposer fill one wide static tree in every round, and counts what is accepted.

    Works with any proposer that fills static trees.
    """

    def __init__(self, inner: Proposer) -> None:
        """Wrap a proposer.

        Args:
            inner: Drafts.

        Raises:
            OptionError: If it does not rank its guesses.
        """
        if not inner.takes_choices:
            raise OptionError(
                f"{type(inner).__name__} does not rank its guesses, expected a proposer that fills "
                'static trees, such as Medusa heads or a draft model; use tree="auto"'
            )
        self.config, self.parts = inner.config, (inner,)
        self._inner = inner
        self._choices: Choices = observing_choices(max_depth=inner.config.depth)
        self._offered: Counter[tuple[int, int]] = Counter()  # by depth and rank
        self._accepted: Counter[tuple[int, int]] = Counter()
        self._children: dict[tuple[int, ...], list[int]] = {}
        for path in self._choices:
            self._children.setdefault(path[:-1], []).append(path[-1])
        self._nodes: tuple[tuple[int, ...], ...] = ((), *self._choices)
        self._has_drafted = False

    @property
    @override
    def features(self) -> TargetFeatures:  # type: ignore[override]  # the inner one decides
        return self._inner.features

    @property
    @override
    def needs_lockstep(self) -> bool:  # type: ignore[override]  # the inner one decides
        return self._inner.needs_lockstep

    @override
    def begin(self, prompt: Prefill) -> None:
        self._inner.begin(prompt)

    @override
    def propose(self, roots: Int[Tensor, " batch"], *, noise: PositionNoise | None) -> Draft:
        self._inner.plan = TreePlan.of(self._choices)
        draft = self._inner.propose(roots, noise=noise)
        self._nodes = _paths_of(draft)
        self._has_drafted = draft.topology.max_depth > 0
        return draft

    @override
    def commit(self, accepted: Accepted) -> None:
        if self._has_drafted:
            for path in accepted.paths:
                if path:
                    self._count(self._nodes[path[-1]])
        self._has_drafted = False
        self._inner.commit(accepted)

    @property
    def acceptance(self) -> RankAcceptance:
        """Share of the guesses of each rank that were accepted, by depth."""
        deepest = max((depth for depth, _ in self._accepted), default=-1)
        found = []
        for depth in range(deepest + 1):
            widest = max(rank for level, rank in self._accepted if level == depth)
            found.append(
                [
                    self._accepted[depth, rank] / max(self._offered[depth, rank], 1)
                    for rank in range(widest + 1)
                ]
            )
        return found

    def _count(self, taken: tuple[int, ...]) -> None:
        for depth in range(len(taken) + 1):
            for rank in self._children.get(taken[:depth], ()):
                self._offered[depth, rank] += 1
            if depth < len(taken):
                self._accepted[depth, taken[depth]] += 1


def _paths_of(draft: Draft) -> tuple[tuple[int, ...], ...]:
    """Return each node's path of ranks; a proposer may have left out what is too deep for it."""
    parents = draft.topology.host_parents[0]
    paths: list[tuple[int, ...]] = [()]
    num_children = [0] * len(parents)
    for node in range(1, len(parents)):
        parent = parents[node]
        paths.append((*paths[parent], num_children[parent]))
        num_children[parent] += 1
    return tuple(paths)
