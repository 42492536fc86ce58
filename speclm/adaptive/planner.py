"""Chooses the depth and size of trees that give most tokens a second.

What a tree would have given is replayed on rounds that were drafted with large ones: nodes have an
order, the best first, so that a smaller tree of the same growth is a part of what was verified, and
the accepted path tells how far it would have gone. No clock and no model: numbers in, a plan out.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from speclm.tree.plan import TreePlan

_PROBABILITIES = (0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3)
"""Thresholds that are tried for nodes."""

_CONFIDENCES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75)
"""Thresholds that are tried for levels."""

EXPLORED_PROBABILITY, EXPLORED_CONFIDENCE = _PROBABILITIES[0], _CONFIDENCES[0]
"""Thresholds of trees that are drafted to learn from: no larger ones can be replayed."""

_DEPTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64)

_TIE = 1e-9  # share by which a larger tree has to be better

_PRIOR_ROWS = 8
"""Rows that the proposer's own probabilities count for, next to what was accepted."""

_GROWING_SHARE = 0.75
"""Share of the rows that have to grow for another level; as proposers have it by default."""


@dataclass(frozen=True, slots=True)
class RoundCosts:
    """Seconds of the parts of a round.

    Args:
        forwards: Seconds of a target forward by nodes of every row, root included; ascending. What
            lies between is interpolated, and what lies beyond continues the last slope.
        draft: Of a draft, however deep.
        level: What each level of the draft adds.
        overhead: Of all else.
        node: What each node adds to that.
    """

    forwards: tuple[tuple[int, float], ...]
    draft: float = 0.0
    level: float = 0.0
    overhead: float = 0.0
    node: float = 0.0

    def forward(self, num_nodes: int) -> float:
        """Return the seconds of a forward over that many nodes of every row."""
        sizes = [size for size, _ in self.forwards]
        place = bisect_left(sizes, num_nodes)
        if len(sizes) == 1 or (place < len(sizes) and sizes[place] == num_nodes):
            return self.forwards[min(place, len(sizes) - 1)][1]
        last = min(max(place, 1), len(sizes) - 1)
        (low, before), (high, after) = self.forwards[last - 1], self.forwards[last]
        return before + (after - before) * (num_nodes - low) / (high - low)

    def round(self, num_draft_tokens: int, num_levels: float) -> float:
        """Return the seconds of a round."""
        fixed = self.draft + self.overhead + self.level * num_levels
        return fixed + self.node * num_draft_tokens + self.forward(1 + num_draft_tokens)


@dataclass(frozen=True, slots=True)
class ObservedRow:
    """What was drafted for one row in a round, and what of it was accepted.

    Args:
        depths: Depth of each node, the best node first, the root left out.
        probabilities: Probability that the proposer gave to each node's path; not rising.
        is_accepted: Whether the node is on the accepted path.
    """

    depths: tuple[int, ...]
    probabilities: tuple[float, ...]
    is_accepted: tuple[bool, ...]

    @classmethod
    def of(
        cls, depths: Sequence[int], probabilities: Sequence[float] | None, path: Sequence[int]
    ) -> "ObservedRow":
        """Sort the nodes of a draft.

        Args:
            depths: Depth of each node, root included; 0 for padding.
            probabilities: Probability of each node's path; None for nodes in order of their worth.
            path: Accepted nodes.
        """
        nodes = [node for node, depth in enumerate(depths) if depth > 0]
        if probabilities is not None:
            nodes.sort(key=lambda node: -probabilities[node])  # parents stay before their children
        kept = set(path)
        return cls(
            tuple(depths[node] for node in nodes),
            tuple(1.0 if probabilities is None else probabilities[node] for node in nodes),
            tuple(node in kept for node in nodes),
        )


Observed = Sequence[Sequence[ObservedRow]]
"""Rounds, each the rows that were running."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a plan is expected to give.

    Args:
        plan: The plan.
        tau: Tokens of a row in a round.
        seconds: Of a round.
    """

    plan: TreePlan
    tau: float
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens of a row a second."""
        return self.tau / self.seconds


def best_plan(
    rounds: Observed, costs: RoundCosts, *, max_depth: int, max_nodes: int, has_probabilities: bool
) -> Estimate | None:
    """Return the plan with the most tokens a second; None where nothing was observed.

    Of equal ones the smaller tree is taken. A node is worth its place while what it adds to tau
    exceeds what it adds to the time of a round, in tokens that this time gives on average; the
    thresholds of the plan are such probabilities, found by trying some.

    Args:
        rounds: Drafts at least as large as any that is considered.
        costs: Seconds of the parts of a round.
        max_depth: Most levels.
        max_nodes: Most nodes, the root left out.
        has_probabilities: Whether the probabilities mean something; the plan has thresholds then.
    """
    sizes = best_by_size(
        rounds, costs, max_depth=max_depth, max_nodes=max_nodes, has_probabilities=has_probabilities
    )
    best = max((estimate.rate for estimate in sizes), default=0.0)
    return next((one for one in sizes if one.rate >= best * (1 - _TIE)), None)


def best_by_size(
    rounds: Observed, costs: RoundCosts, *, max_depth: int, max_nodes: int, has_probabilities: bool
) -> list[Estimate]:
    """Return the best plan of at most 1, 2, 3... nodes; arguments as of `best_plan`."""
    table = _Table.of(rounds)
    if table is None:
        return []
    probabilities = torch.tensor(
        _PROBABILITIES if has_probabilities else (0.0,), dtype=torch.float64, device="cpu"
    )
    prior = _PRIOR_ROWS / (_PRIOR_ROWS + table.num_rows) if has_probabilities else 0.0
    values = torch.lerp(table.accepted, table.probabilities, prior)  # [rows, nodes]
    seconds = [costs.round(num, 0.0) for num in range(max_nodes + 1)]
    best: list[tuple[float, float, float, int, float, float]] = []
    tried: set[tuple[int, ...]] = set()
    for depth in sorted({min(depth, max_depth) for depth in _DEPTHS}):
        for confidence in _CONFIDENCES if has_probabilities else (0.0,):
            levels, row_levels = table.levels(depth, confidence)
            shape = tuple(row_levels.tolist())
            if shape in tried:
                continue  # the same trees as those of a smaller depth or lower confidence
            tried.add(shape)
            gains, sizes = table.replay(values, row_levels, probabilities, max_nodes=max_nodes)
            times = _mean_seconds(sizes, seconds) + costs.level * levels
            rates, places = ((1 + gains) / times).max(0)
            columns = torch.arange(max_nodes + 1, device="cpu")
            found = list(
                zip(
                    rates.tolist(),
                    (1 + gains)[places, columns].tolist(),
                    times[places, columns].tolist(),
                    [depth] * (max_nodes + 1),
                    [confidence] * (max_nodes + 1),
                    probabilities[places].tolist(),
                    strict=True,
                )
            )
            best = [
                new if new[0] > old[0] * (1 + _TIE) else old
                for old, new in zip(best or found, found, strict=True)
            ]
    return [
        Estimate(
            TreePlan(
                depth,
                size,
                min_probability=probability if has_probabilities else None,
                min_confidence=confidence if has_probabilities else None,
            ),
            tau,
            time,
        )
        for size, (_, tau, time, depth, confidence, probability) in enumerate(best)
        if size > 0
    ]


def _mean_seconds(sizes: Tensor, seconds: Sequence[float]) -> Tensor:
    """Return the mean seconds of rounds whose drafts are bounded by 0, 1, 2... nodes.

    Args:
        sizes: Nodes of the largest row of each round at each threshold, ``[thresholds, rounds]``.
        seconds: By nodes.
    """
    bounds = torch.arange(len(seconds), device="cpu")
    table = torch.tensor(seconds, dtype=torch.float64, device="cpu")
    return table[torch.minimum(sizes[:, :, None], bounds)].mean(1)


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """Observed rounds as tensors over rows and nodes; short rows are padded with depth 0.

    Args:
        depths: ``[rows, nodes]``.
        probabilities: ``[rows, nodes]``, 0 at padding.
        accepted: ``[rows, nodes]``, 1 at nodes of the accepted path.
        best: Best probability at depth 0, 1, 2... of each row, ``[rows, depth]``.
        rounds: Round of each row.
        slots: Place of each row in its round.
        growing: Place among the rows of each round, the deepest first, whose growth is decisive.
    """

    depths: Tensor
    probabilities: Tensor
    accepted: Tensor
    best: Tensor
    rounds: Tensor
    slots: Tensor
    growing: Tensor

    @property
    def num_rounds(self) -> int:
        return len(self.growing)

    @property
    def num_rows(self) -> int:
        return len(self.depths)

    @classmethod
    def of(cls, rounds: Observed) -> "_Table | None":
        rows = [row for rows in rounds for row in rows]
        if not rows:
            return None
        width = max(1, *(len(row.depths) for row in rows))
        deepest = max((max(row.depths, default=0) for row in rows), default=0)
        best = torch.zeros(len(rows), deepest + 1, dtype=torch.float64, device="cpu")
        best[:, 0] = 1.0
        for index, row in enumerate(rows):
            for depth, probability in zip(row.depths, row.probabilities, strict=True):
                best[index, depth] = max(float(best[index, depth]), probability)

        def padded(values: Sequence[float | int]) -> list[float | int]:
            return [*values, *[0.0] * (width - len(values))]

        numbers = torch.tensor(
            [
                [padded(row.depths), padded(row.probabilities), padded(row.is_accepted)]
                for row in rows
            ],
            dtype=torch.float64,
            device="cpu",
        )  # [rows, 3, nodes]
        depths, probabilities, accepted = numbers.unbind(1)
        growing = [max(math.ceil(_GROWING_SHARE * len(group)) - 1, 0) for group in rounds]
        return cls(
            depths,
            probabilities,
            accepted,
            best,
            rounds=torch.tensor(
                [index for index, group in enumerate(rounds) for _ in group],
                dtype=torch.long,
                device="cpu",
            ),
            slots=torch.tensor(
                [slot for group in rounds for slot in range(len(group))],
                dtype=torch.long,
                device="cpu",
            ),
            growing=torch.tensor(growing, dtype=torch.long, device="cpu"),
        )

    def levels(self, depth: int, confidence: float) -> tuple[float, Tensor]:
        """Return the mean levels that are drafted, and those that each row gets nodes of."""
        grows = (self.best[:, :depth] >= confidence) & (self.best[:, :depth] > 0)
        own = grows.long().sum(1)  # probabilities fall with depth
        by_round = torch.zeros(
            self.num_rounds, int(self.slots.max()) + 1, dtype=torch.long, device="cpu"
        )
        by_round[self.rounds, self.slots] = own
        ordered = by_round.sort(1, descending=True).values
        drafted = ordered.gather(1, self.growing[:, None])[:, 0]  # [rounds]
        return float(drafted.double().mean()), torch.minimum(own, drafted[self.rounds])

    def replay(
        self, values: Tensor, row_levels: Tensor, probabilities: Tensor, *, max_nodes: int
    ) -> tuple[Tensor, Tensor]:
        """Return what trees of bounded size give, and how large they become unbounded.

        Returns:
            Mean accepted nodes a row by threshold and bound, ``[thresholds, nodes + 1]``, and the
            nodes of the largest row of every round, ``[thresholds, rounds]``.
        """
        is_drafted = (self.depths > 0) & (self.depths <= row_levels[:, None])
        kept = is_drafted & (
            self.probabilities >= probabilities[:, None, None]
        )  # [thresholds, rows, nodes]
        ranks = kept.long().cumsum(2)
        width = max(self.depths.shape[1], max_nodes)
        gains = torch.zeros(len(probabilities), width + 1, dtype=torch.float64, device="cpu")
        places = ranks.masked_fill(~kept, 0).flatten(1)
        gains.scatter_add_(1, places, (values * kept).flatten(1))
        counts = ranks[:, :, -1]  # [thresholds, rows]
        sizes = torch.zeros(len(probabilities), self.num_rounds, dtype=torch.long, device="cpu")
        sizes.scatter_reduce_(1, self.rounds.expand(len(probabilities), -1), counts, reduce="amax")
        return gains.cumsum(1)[:, : max_nodes + 1] / self.num_rows, sizes
