"""Choose the depth and size of the trees with the most tokens per second.

Smaller trees are replayed on rounds with large ones. The nodes of a round are ordered, the best
first, so a smaller tree is a part of the verified one, and the accepted path shows how many of its
nodes would have been accepted. The module uses neither a clock nor a model.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from speclm.tree.plan import TreePlan

_PROBABILITIES = (0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3)
"""Values of `TreePlan.min_probability` that are tried."""

_CONFIDENCES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75)
"""Values of `TreePlan.min_confidence` that are tried."""

EXPLORED_PROBABILITY, EXPLORED_CONFIDENCE = _PROBABILITIES[0], _CONFIDENCES[0]
"""Thresholds of exploring rounds; higher ones would leave too few nodes to replay larger trees."""

_DEPTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64)

_TIE = 1e-9  # relative gain from which a larger tree counts as better

_PRIOR_ROWS = 8
"""The proposer's own probabilities weigh as much as this many observed rows."""

_GROWING_SHARE = 0.75
"""Share of the rows that must still grow for another level; the default of proposers."""


@dataclass(frozen=True, slots=True)
class RoundCosts:
    """Seconds of the parts of a round.

    Args:
        forwards: Seconds of a target forward by nodes per row, root included; ascending. Sizes
            between are interpolated; larger ones continue the last slope.
        draft: Fixed seconds of a draft.
        level: Seconds that each level of the draft adds.
        overhead: Fixed seconds of the rest.
        node: Seconds that each node adds to the rest.
    """

    forwards: tuple[tuple[int, float], ...]
    draft: float = 0.0
    level: float = 0.0
    overhead: float = 0.0
    node: float = 0.0

    def forward(self, num_nodes: int) -> float:
        """Return the seconds of a forward over `num_nodes` nodes per row."""
        sizes = [size for size, _ in self.forwards]
        index = bisect_left(sizes, num_nodes)
        if len(sizes) == 1 or (index < len(sizes) and sizes[index] == num_nodes):
            return self.forwards[min(index, len(sizes) - 1)][1]
        last = min(max(index, 1), len(sizes) - 1)
        (low, before), (high, after) = self.forwards[last - 1], self.forwards[last]
        return before + (after - before) * (num_nodes - low) / (high - low)

    def round(self, num_draft_tokens: int, num_levels: float) -> float:
        """Return the seconds of a round."""
        fixed = self.draft + self.overhead + self.level * num_levels
        return fixed + self.node * num_draft_tokens + self.forward(1 + num_draft_tokens)


@dataclass(frozen=True, slots=True)
class ObservedRow:
    """The nodes of one row of a draft, the best node first, without the root.

    Args:
        depths: Depth of each node.
        probabilities: The proposer's probability of each node's path; not increasing.
        is_accepted: Whether each node is on the accepted path.
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
            probabilities: Probability of each node's path; None if nodes are sorted already.
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
"""Rounds, each with the rows that were still generated."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Expected result of a plan.

    Args:
        plan: The plan.
        tau: Tokens per row and round.
        seconds: Seconds of a round.
    """

    plan: TreePlan
    tau: float
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens per row and second."""
        return self.tau / self.seconds


def fastest(estimates: Sequence[Estimate]) -> Estimate | None:
    """Return the estimate with the most tokens per second, the smallest of equals; None of none."""
    best = max((estimate.rate for estimate in estimates), default=0.0)
    return next((one for one in estimates if one.rate >= best * (1 - _TIE)), None)


def estimates_by_size(
    rounds: Observed, costs: RoundCosts, *, max_depth: int, max_nodes: int, has_probabilities: bool
) -> list[Estimate]:
    """Return the best plan of at most 1, 2, 3... nodes; an empty list without observations.

    A node pays while it adds more to tau than its time would give in tokens on average. The
    thresholds of a plan approximate that limit; several are tried.

    Args:
        rounds: Drafts at least as large as any tree that is considered.
        costs: Seconds of the parts of a round.
        max_depth: Maximum levels.
        max_nodes: Maximum nodes, root excluded.
        has_probabilities: Whether drafts come with probabilities; plans then have thresholds.
    """
    table = _Table.of(rounds)
    if table is None:
        return []
    probabilities = torch.tensor(
        _PROBABILITIES if has_probabilities else (0.0,), dtype=torch.float64, device="cpu"
    )
    prior = _PRIOR_ROWS / (_PRIOR_ROWS + table.num_rows) if has_probabilities else 0.0
    values = torch.lerp(table.accepted, table.probabilities, prior)  # [rows, nodes]
    seconds = [costs.round(num, 0.0) for num in range(max_nodes + 1)]
    best: list[tuple[float, float, float, float, int, float]] = []  # rate, tau, seconds, plan
    tried: set[tuple[int, ...]] = set()
    for depth in sorted({min(depth, max_depth) for depth in _DEPTHS}):
        for confidence in _CONFIDENCES if has_probabilities else (0.0,):
            levels, row_levels = table.levels(depth, confidence)
            shape = tuple(row_levels.tolist())
            if shape in tried:
                continue  # the trees of a smaller depth or lower confidence are the same
            tried.add(shape)
            gains, sizes = table.replay(values, row_levels, probabilities, max_nodes=max_nodes)
            times = _mean_seconds(sizes, seconds) + costs.level * levels
            rates, thresholds = ((1 + gains) / times).max(0)
            bounds = torch.arange(max_nodes + 1, device="cpu")
            found = zip(
                rates.tolist(),
                (1 + gains)[thresholds, bounds].tolist(),
                times[thresholds, bounds].tolist(),
                probabilities[thresholds].tolist(),
                strict=True,
            )
            new = [(*figures, depth, confidence) for figures in found]
            best = [
                one if one[0] > old[0] * (1 + _TIE) else old
                for old, one in zip(best or new, new, strict=True)
            ]
    estimates = []
    for size, (_, tau, time, probability, depth, confidence) in enumerate(best[1:], start=1):
        limits = (probability, confidence) if has_probabilities else (None, None)
        plan = TreePlan(depth, size, min_probability=limits[0], min_confidence=limits[1])
        estimates.append(Estimate(plan, tau, time))
    return estimates


def _mean_seconds(sizes: Tensor, seconds: Sequence[float]) -> Tensor:
    """Return the mean seconds of rounds whose drafts have at most 0, 1, 2... nodes.

    Args:
        sizes: Nodes of the largest row of each round at each threshold, ``[thresholds, rounds]``.
        seconds: Seconds of a round by nodes.
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
        indices: Index of each row within its round.
        growing: Index of the row, among the rows of each round sorted by depth from the deepest,
            that decides how deep the draft grows.
    """

    depths: Tensor
    probabilities: Tensor
    accepted: Tensor
    best: Tensor
    rounds: Tensor
    indices: Tensor
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
        deepest = max(max(row.depths, default=0) for row in rows)
        best = [[1.0] + [0.0] * deepest for _ in rows]
        numbers = torch.zeros(3, len(rows), width, dtype=torch.float64, device="cpu")
        for index, row in enumerate(rows):
            for depth, probability in zip(row.depths, row.probabilities, strict=True):
                best[index][depth] = max(best[index][depth], probability)
            values = [row.depths, row.probabilities, row.is_accepted]
            numbers[:, index, : len(row.depths)] = numbers.new_tensor(values)
        indices = [(group, row) for group, rows in enumerate(rounds) for row in range(len(rows))]
        growing = [max(math.ceil(_GROWING_SHARE * len(group)) - 1, 0) for group in rounds]
        depths, probabilities, accepted = numbers
        round_indices, row_indices = torch.tensor(indices, dtype=torch.long, device="cpu").T
        return cls(
            depths,
            probabilities,
            accepted,
            best=torch.tensor(best, dtype=torch.float64, device="cpu"),
            rounds=round_indices,
            indices=row_indices,
            growing=torch.tensor(growing, dtype=torch.long, device="cpu"),
        )

    def levels(self, depth: int, confidence: float) -> tuple[float, Tensor]:
        """Return the mean number of levels that are drafted, and that of each row."""
        grows = (self.best[:, :depth] >= confidence) & (self.best[:, :depth] > 0)
        own = grows.long().sum(1)  # probabilities fall with depth
        by_round = torch.zeros(
            self.num_rounds, int(self.indices.max()) + 1, dtype=torch.long, device="cpu"
        )
        by_round[self.rounds, self.indices] = own
        ordered = by_round.sort(1, descending=True).values
        drafted = ordered.gather(1, self.growing[:, None])[:, 0]  # [rounds]
        return float(drafted.double().mean()), torch.minimum(own, drafted[self.rounds])

    def replay(
        self, values: Tensor, row_levels: Tensor, probabilities: Tensor, *, max_nodes: int
    ) -> tuple[Tensor, Tensor]:
        """Replay smaller trees.

        Returns:
            Mean accepted nodes per row by threshold and bound, ``[thresholds, nodes + 1]``, and
            the nodes of the largest row of every round without a bound, ``[thresholds, rounds]``.
        """
        is_drafted = (self.depths > 0) & (self.depths <= row_levels[:, None])
        is_likely = self.probabilities >= probabilities[:, None, None]
        kept = is_drafted & is_likely  # [thresholds, rows, nodes]
        ranks = kept.long().cumsum(2)
        width = max(self.depths.shape[1], max_nodes)
        gains = torch.zeros(len(probabilities), width + 1, dtype=torch.float64, device="cpu")
        gains.scatter_add_(1, ranks.masked_fill(~kept, 0).flatten(1), (values * kept).flatten(1))
        counts = ranks[:, :, -1]  # [thresholds, rows]
        sizes = torch.zeros(len(probabilities), self.num_rounds, dtype=torch.long, device="cpu")
        sizes.scatter_reduce_(1, self.rounds.expand(len(probabilities), -1), counts, reduce="amax")
        return gains.cumsum(1)[:, : max_nodes + 1] / self.num_rows, sizes
