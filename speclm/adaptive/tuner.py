"""``tree="auto"``: which trees the next rounds should have, learned while decoding."""

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from speclm.adaptive.planner import (
    EXPLORED_CONFIDENCE,
    EXPLORED_PROBABILITY,
    Estimate,
    Observed,
    ObservedRow,
    RoundCosts,
    best_by_size,
    best_plan,
)
from speclm.adaptive.timings import MAX_RATIO, SIZES, Timings, bucket_of_context, bucket_of_rows
from speclm.config import MAX_DEPTH
from speclm.drafting.interface import Draft
from speclm.tree.plan import TreePlan
from speclm.tree.topology import path_products

MAX_NODES = SIZES[-1] - 1
"""Most nodes of a tree that is planned, the root left out."""

_FIRST_PLANNING = 12  # rows that are observed before the first plan; later ones follow at twice ...
_REPLANNING = 96  # ... as many, up to so many more
_MAX_ROWS = 192  # rows that are remembered
_LEARNING_ROWS = 48  # rows before which exploring may cost more
_LEARNING_WAIT = 4  # rounds between two explored ones until then
_SHARE = 0.02  # of the time that exploring may cost afterwards
_MIN_WAIT, _MAX_WAIT = 8, 160  # rounds
_NUM_TIMES = 64
_CLIP = 3.0  # times the median: what counts of an outlier
_MIN_SPREAD = 0.2  # of sizes, below which their times tell nothing about one more
_MAX_BUCKETS = 64


@dataclass(slots=True)
class _Line:
    """Seconds as a linear function of a size, from the last rounds."""

    points: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_NUM_TIMES))

    def add(self, size: int, seconds: float) -> None:
        """Take note of a round."""
        self.points.append((size, seconds))

    def fit(self) -> tuple[float, float]:
        """Return the seconds of size 0 and of one more; neither is negative."""
        if not self.points:
            return 0.0, 0.0
        limit = _CLIP * median(seconds for _, seconds in self.points)
        sizes = [size for size, _ in self.points]
        times = [min(seconds, limit) for _, seconds in self.points]
        size, time = fmean(sizes), fmean(times)
        spread = fmean((one - size) ** 2 for one in sizes)
        if spread < _MIN_SPREAD:
            return time, 0.0
        products = ((one - size) * (other - time) for one, other in zip(sizes, times, strict=True))
        slope = min(max(fmean(products) / spread, 0.0), time / size if size > 0 else 0.0)
        return time - slope * size, slope


@dataclass(slots=True)
class _Bucket:
    """What is known about calls of one setting, number of rows and length of context.

    Args:
        has_probabilities: Whether drafts say how likely their nodes are; None before the first.
        rounds: Rounds with explored trees.
        num_rows: Rows in them.
        num_observed: Rows observed so far, forgotten ones included.
        planned_at: Rows observed when the plan was made.
        best: The plan; None before the first.
        wait: Rounds until the next explored one.
        num_rounds: Rounds so far.
        drafting: Seconds of a draft by its levels.
        rest: Seconds of all but draft and forward, by nodes.
        forward: Seconds of a forward by nodes, for targets whose forwards are not measured.
    """

    has_probabilities: bool | None = None
    rounds: deque[tuple[ObservedRow, ...]] = field(default_factory=deque)
    num_rows: int = 0
    num_observed: int = 0
    planned_at: int = 0
    best: Estimate | None = None
    wait: int = 0
    num_rounds: int = 0
    drafting: _Line = field(default_factory=_Line)
    rest: _Line = field(default_factory=_Line)
    forward: _Line = field(default_factory=_Line)

    def observe(self, rows: Sequence[ObservedRow]) -> None:
        """Remember a round that was drafted to learn from, and forget the oldest."""
        self.rounds.append(tuple(rows))
        self.num_rows += len(rows)
        self.num_observed += len(rows)
        while self.num_rows - len(self.rounds[0]) >= _MAX_ROWS:
            self.num_rows -= len(self.rounds.popleft())

    @property
    def is_due(self) -> bool:
        """Whether enough was seen since the last plan to make another."""
        if self.best is None:
            return self.num_observed >= _FIRST_PLANNING
        return self.num_observed >= self.planned_at + min(self.planned_at, _REPLANNING)

    def costs(self, timings: Timings | None) -> RoundCosts:
        """Return what the parts of a round take."""
        draft, level = self.drafting.fit()
        overhead, node = self.rest.fit()
        if timings is None:
            first, slope = self.forward.fit()
            timings = ((1, first + slope), (2, first + 2 * slope))
        return RoundCosts(timings, draft=draft, level=level, overhead=overhead, node=node)


class TreeMemory:
    """What the calls of one model have learned about trees.

    It belongs to a proposer, a setting, a number of rows and a length of context. Another proposer
    starts anew.
    """

    def __init__(self, *, explores_always: bool = False) -> None:
        """Start without any knowledge.

        Args:
            explores_always: Whether every round is drafted to learn from, and no plan is made.
        """
        self.explores_always = explores_always
        self._buckets: dict[Hashable, _Bucket] = {}
        self._proposer: object = None
        self.timings: dict[tuple[int, int], Timings] = {}
        """By buckets of rows and context, for this model."""
        self.last: TreeTuner | None = None
        """That of the last call."""

    def begin_call(self, proposer: object) -> None:
        """Start a call."""
        if proposer is not self._proposer:
            self._buckets.clear()
            self._proposer = proposer

    def bucket(self, setting: Hashable, *, batch: int, context: int) -> _Bucket:
        """Return what is known about rounds of that many rows, in buckets of powers of two."""
        key = (setting, bucket_of_rows(batch), bucket_of_context(context))
        if key not in self._buckets:
            if len(self._buckets) >= _MAX_BUCKETS:
                del self._buckets[next(iter(self._buckets))]
            self._buckets[key] = _Bucket()
        return self._buckets[key]


class TreeTuner:
    """Says before each round of one call what to draft, and is told what came of it.

    Some rounds are drafted with a tree larger than pays. On those it is replayed what any smaller
    tree would have given; with what forwards, levels and the rest of a round take, that tells the
    tree of most tokens a second. At first every second round is such a one, until there is enough
    to go by; later so few that they cost one part in fifty. Text and machine may change: the last
    ones count.

    Tokens never depend on it, as they do not depend on drafts. No tensors of the model.

    Example:
        ```python

        tuner = TreeTuner(TreeMemory(), batch=1, num_prompt_tokens=20, max_depth=8)
        plan = tuner.next_plan()  # None: what the proposer's own settings say
        ```
    """

    def __init__(
        self,
        memory: TreeMemory,
        *,
        batch: int,
        num_prompt_tokens: int,
        max_depth: int,
        setting: Hashable = None,
        proposer: object = None,
    ) -> None:
        """Begin a call.

        Args:
            memory: What earlier calls learned; is changed.
            batch: Rows, those that end included: forwards have them all.
            num_prompt_tokens: Tokens in the cache before the first round.
            max_depth: Most levels, those of the proposer's own settings.
            setting: What acceptance depends on next to the text, such as the temperature.
            proposer: Whose drafts are planned, by identity.
        """
        memory.begin_call(proposer)
        self._memory = memory
        self._setting, self._batch = setting, batch
        self._max_depth = min(max_depth, MAX_DEPTH)
        self._explores_always = memory.explores_always
        self._key = (bucket_of_rows(batch), bucket_of_context(num_prompt_tokens))
        self._context = float(num_prompt_tokens)
        self._bucket = memory.bucket(setting, batch=batch, context=num_prompt_tokens)
        self._is_exploring = False
        self._num_rounds = 0
        memory.last = self

    @property
    def timings(self) -> Timings | None:
        """Seconds of forwards for calls like this one; None before they are measured."""
        return self._memory.timings.get(self._key)

    @timings.setter
    def timings(self, timings: Timings) -> None:
        self._memory.timings[self._key] = timings

    @property
    def is_exploring(self) -> bool:
        """Whether the round that was planned last is one to learn from."""
        return self._is_exploring

    @property
    def best(self) -> Estimate | None:
        """The plan in use, and what it was expected to give; None before there is one."""
        return self._bucket.best

    def next_plan(self) -> TreePlan | None:
        """Return what the next draft should be; None for what the proposer's own settings say."""
        bucket = self._memory.bucket(self._setting, batch=self._batch, context=int(self._context))
        self._bucket = bucket
        if bucket.best is None:
            # Drafts of two sizes in turn also tell what a level takes.
            self._is_exploring = bucket.has_probabilities is not None and bucket.num_rounds % 2 == 1
        else:
            self._is_exploring = bucket.wait <= 0
        self._is_exploring = self._is_exploring or self._explores_always
        if self._is_exploring:
            return self.explored_plan
        return None if bucket.best is None else bucket.best.plan

    @property
    def explored_plan(self) -> TreePlan:
        """The tree that is drafted to learn from; those that are considered are parts of it."""
        has_probabilities = bool(self._bucket.has_probabilities) or self._explores_always
        return TreePlan(
            self._max_depth,
            self._max_nodes,
            min_probability=EXPLORED_PROBABILITY if has_probabilities else None,
            min_confidence=EXPLORED_CONFIDENCE if has_probabilities else None,
        )

    def record(
        self,
        draft: Draft,
        paths: Sequence[Sequence[int]],
        *,
        is_whole: Sequence[bool],
        seconds: dict[str, float],
    ) -> None:
        """Take note of a round that had a draft.

        Args:
            draft: What was verified.
            paths: Accepted nodes of each row; empty in a row that was not running.
            is_whole: Rows whose path was not cut by the end of the text.
            seconds: Of each phase of the round.
        """
        bucket, topology = self._bucket, draft.topology
        bucket.has_probabilities = draft.probs is not None
        bucket.num_rounds += 1
        bucket.wait -= 1
        self._num_rounds += 1
        live = [len(path) for path in paths if path]
        self._context += fmean(live) if live else 0.0
        if self._num_rounds > 1:  # in the first one, proposers may read the prompt
            bucket.drafting.add(topology.max_depth, seconds["draft"])
            bucket.rest.add(topology.num_nodes - 1, seconds["accept"] + seconds["commit"])
            bucket.forward.add(topology.num_nodes, seconds["verify"])
        if not self._is_exploring:
            return
        rows = self._observed(draft, paths, is_whole)
        if rows:
            bucket.observe(rows)
        if bucket.is_due and not self._explores_always:
            bucket.best = self._plan(bucket)
            bucket.planned_at = bucket.num_observed
        bucket.wait = self._next_wait(bucket)

    @property
    def costs(self) -> RoundCosts:
        """What the parts of a round take."""
        return self._bucket.costs(self.timings)

    def estimates(self) -> list[Estimate]:
        """Return the best plan of at most 1, 2, 3... nodes by what was observed so far."""
        return best_by_size(
            self._bucket.rounds,
            self.costs,
            max_depth=self._max_depth,
            max_nodes=self._max_nodes,
            has_probabilities=bool(self._bucket.has_probabilities),
        )

    @property
    def observed(self) -> Observed:
        """Rounds that were drafted to learn from."""
        return self._bucket.rounds

    @property
    def _max_nodes(self) -> int:
        """Nodes of the largest tree that may pay by the time of its forward."""
        timings = self.timings
        if timings is None:
            return 16
        longest = MAX_RATIO * timings[0][1]
        return max([2, *(size - 1 for size, seconds in timings if seconds <= longest)])

    def _observed(
        self, draft: Draft, paths: Sequence[Sequence[int]], is_whole: Sequence[bool]
    ) -> list[ObservedRow]:
        all_parents, all_depths = draft.topology.host_parents, draft.topology.host_node_depths
        probs = None if draft.probs is None else draft.probs.tolist()  # after the round's own sync
        rows = []
        for row, path in enumerate(paths):
            if path and is_whole[row]:
                shape = row if len(all_parents) > 1 else 0
                probabilities = (
                    None if probs is None else path_products(all_parents[shape], probs[row])
                )
                rows.append(ObservedRow.of(all_depths[shape], probabilities, path))
        return rows

    def _plan(self, bucket: _Bucket) -> Estimate | None:
        return best_plan(
            bucket.rounds,
            bucket.costs(self.timings),
            max_depth=self._max_depth,
            max_nodes=self._max_nodes,
            has_probabilities=bool(bucket.has_probabilities),
        )

    def _next_wait(self, bucket: _Bucket) -> int:
        """Return for how many rounds to use the plan before another tree is explored."""
        if bucket.best is None:
            return 0
        rows = [row for group in bucket.rounds for row in group]
        costs = bucket.costs(self.timings)
        size = fmean(max(len(row.depths) for row in group) for group in bucket.rounds if group)
        levels = fmean(max(row.depths, default=1) for row in rows)
        seconds = costs.round(round(size), levels)
        tau = 1 + fmean(sum(row.is_accepted) for row in rows)
        lost = max(seconds * bucket.best.rate - tau, 0.0) / bucket.best.tau  # in rounds
        wait = int(min(max(lost / _SHARE, _MIN_WAIT), _MAX_WAIT))
        return min(wait, _LEARNING_WAIT) if bucket.num_observed < _LEARNING_ROWS else wait


def describe_tree(tree: TreePlan | Estimate | None) -> str:
    """Return a few words on what was drafted; none for what a proposer's own settings say."""
    if tree is None:
        return ""
    plan = tree.plan if isinstance(tree, Estimate) else tree
    if plan.choices is not None:
        return f"static tree of {len(plan.choices)} nodes on {plan.depth} levels"
    line = f"up to {plan.num_draft_tokens} nodes on {plan.depth} levels"
    if plan.min_probability is not None:
        line += f", nodes from a probability of {plan.min_probability:.2f}"
    if plan.min_confidence is not None:
        line += f", levels from {plan.min_confidence:.2f}"
    return line
