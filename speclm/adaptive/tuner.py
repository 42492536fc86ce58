"""``tree="auto"``: learn during decoding which trees the next rounds should have."""

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from speclm.adaptive.memory import (
    MAX_RATIO,
    SIZES,
    Memory,
    Timings,
    bucket_of_context,
    bucket_of_rows,
)
from speclm.adaptive.planner import (
    EXPLORED_CONFIDENCE,
    EXPLORED_PROBABILITY,
    Estimate,
    Observed,
    ObservedRow,
    RoundCosts,
    estimates_by_size,
    fastest,
)
from speclm.config import MAX_DEPTH
from speclm.drafting.interface import Draft
from speclm.tree.plan import TreePlan
from speclm.tree.topology import path_products

MAX_NODES = SIZES[-1] - 1
"""Maximum nodes of a planned tree, root excluded."""

_FIRST_PLANNING = 12  # observed rows before the first plan; each later plan needs twice ...
_REPLANNING = 96  # ... as many, but at most this many further rows
_MAX_ROWS = 192  # observed rows that are remembered
_LEARNING_ROWS = 48  # observed rows until the cost of exploring is bounded
_LEARNING_WAIT = 4  # rounds between two explored ones until then
_SHARE = 0.02  # share of the time that exploring may cost afterwards
_MIN_WAIT, _MAX_WAIT = 8, 160  # rounds
_NUM_TIMES = 64
_CLIP = 3.0  # outliers count as at most this many times the median
_MIN_SPREAD = 0.2  # spread of sizes below which times cannot show the cost of one more


@dataclass(slots=True)
class _Line:
    """Seconds as a linear function of a size, fitted to the last rounds."""

    points: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_NUM_TIMES))

    def add(self, size: int, seconds: float) -> None:
        """Add a round."""
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
class _TreeRecord:
    """What is known about calls of one setting, number of rows and length of context.

    Args:
        has_probabilities: Whether drafts come with probabilities; None before the first draft.
        rounds: Rounds with explored trees.
        num_rows: Rows in them.
        num_observed: Rows observed so far, forgotten ones included.
        planned_at: Rows observed when the plan was made.
        best: The plan; None before the first.
        wait: Rounds until the next explored one.
        num_rounds: Rounds so far.
        drafting: Seconds of a draft by its levels.
        rest: Seconds of all but draft and forward, by nodes.
        forward: Seconds of a forward by nodes, for targets whose forwards cannot be timed.
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
        """Remember an explored round, and forget the oldest."""
        self.rounds.append(tuple(rows))
        self.num_rows += len(rows)
        self.num_observed += len(rows)
        while self.num_rows - len(self.rounds[0]) >= _MAX_ROWS:
            self.num_rows -= len(self.rounds.popleft())

    @property
    def is_due(self) -> bool:
        """Whether enough rows were observed to make a new plan."""
        if self.best is None:
            return self.num_observed >= _FIRST_PLANNING
        return self.num_observed >= self.planned_at + min(self.planned_at, _REPLANNING)

    def costs(self, timings: Timings | None) -> RoundCosts:
        """Return the seconds of the parts of a round."""
        draft, level = self.drafting.fit()
        overhead, node = self.rest.fit()
        if timings is None:
            first, slope = self.forward.fit()
            timings = ((1, first + slope), (2, first + 2 * slope))
        return RoundCosts(timings, draft=draft, level=level, overhead=overhead, node=node)


class TreeTuner:
    """Plans the tree of each round of one call from the results of earlier rounds.

    Some rounds explore: they draft a larger tree than pays. They are replayed to find how many
    tokens any smaller tree would have given. With the times of forwards, draft levels and the rest
    of a round, this shows which tree gives the most tokens per second. At first every second round
    explores, later so few that they cost one part in fifty. Old rounds are forgotten, because text
    and machine change.

    Tokens do not depend on it. It holds no tensors.

    Example:
        ```python
        tuner = TreeTuner(Memory(), batch=1, num_prompt_tokens=20, max_depth=8)
        plan = tuner.next_plan()  # None: the proposer's own settings
        ```
    """

    def __init__(
        self,
        memory: Memory,
        *,
        batch: int,
        num_prompt_tokens: int,
        max_depth: int,
        setting: Hashable = None,
        proposer: object = None,
    ) -> None:
        """Begin a call.

        Args:
            memory: What earlier calls learned; is updated.
            batch: Rows, including ended ones, which forwards still compute.
            num_prompt_tokens: Tokens in the cache before the first round.
            max_depth: Maximum levels by the proposer's own settings.
            setting: What acceptance depends on, apart from the text; for example the temperature.
            proposer: The proposer, compared by identity.
        """
        memory.begin_call(proposer)
        self._memory = memory
        self._setting, self._batch = setting, batch
        self._max_depth = min(max_depth, MAX_DEPTH)
        self._explores_always = memory.explores_always
        self._key = (bucket_of_rows(batch), bucket_of_context(num_prompt_tokens))
        self._context = float(num_prompt_tokens)
        self._learned = self._recall()
        self._num_rounds = 0
        self.is_exploring = False
        """Whether the round planned last explores."""
        memory.last_tuner = self

    @property
    def timings(self) -> Timings | None:
        """Seconds of forwards of calls like this one; None before they are measured."""
        return self._memory.timings.get(self._key)

    @timings.setter
    def timings(self, timings: Timings) -> None:
        self._memory.timings[self._key] = timings

    @property
    def best(self) -> Estimate | None:
        """The plan in use and its expected result; None before there is one."""
        return self._learned.best

    @property
    def costs(self) -> RoundCosts:
        """Seconds of the parts of a round."""
        return self._learned.costs(self.timings)

    @property
    def observed(self) -> Observed:
        """Rounds that explored."""
        return self._learned.rounds

    def next_plan(self) -> TreePlan | None:
        """Return the plan of the next draft; None for the proposer's own settings."""
        learned = self._learned = self._recall()
        if learned.best is None:
            # Alternating drafts of two sizes also shows the cost of a level.
            is_due = learned.has_probabilities is not None and learned.num_rounds % 2 == 1
        else:
            is_due = learned.wait <= 0
        self.is_exploring = is_due or self._explores_always
        if not self.is_exploring:
            return None if learned.best is None else learned.best.plan
        has_probabilities = bool(learned.has_probabilities) or self._explores_always
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
        """Record a round with a draft.

        Args:
            draft: The draft.
            paths: Accepted nodes of each row; empty in a row that emits nothing.
            is_whole: Whether the path of each row was not cut by the end of its text.
            seconds: Time of each phase of the round.
        """
        learned, topology = self._learned, draft.topology
        learned.has_probabilities = draft.node_probs is not None
        learned.num_rounds += 1
        learned.wait -= 1
        self._num_rounds += 1
        live = [len(path) for path in paths if path]
        self._context += fmean(live) if live else 0.0
        if self._num_rounds > 1:  # in the first one, proposers may read the prompt
            learned.drafting.add(topology.max_depth, seconds["draft"])
            learned.rest.add(topology.num_nodes - 1, seconds["accept"] + seconds["commit"])
            learned.forward.add(topology.num_nodes, seconds["verify"])
        if not self.is_exploring:
            return
        rows = _observed_rows(draft, paths, is_whole)
        if rows:
            learned.observe(rows)
        if learned.is_due and not self._explores_always:
            learned.best = fastest(self.estimates())
            learned.planned_at = learned.num_observed
        learned.wait = self._next_wait(learned)

    def estimates(
        self, *, rounds: Observed | None = None, costs: RoundCosts | None = None
    ) -> list[Estimate]:
        """Return the best plan of at most 1, 2, 3... nodes, estimated from explored rounds.

        Args:
            rounds: The rounds; None for `observed`.
            costs: Times of the parts of a round; None for the measured `costs`.
        """
        return estimates_by_size(
            self._learned.rounds if rounds is None else rounds,
            self.costs if costs is None else costs,
            max_depth=self._max_depth,
            max_nodes=self._max_nodes,
            has_probabilities=bool(self._learned.has_probabilities),
        )

    def _recall(self) -> _TreeRecord:
        buckets = (bucket_of_rows(self._batch), bucket_of_context(int(self._context)))
        return self._memory.recall(("trees", self._setting, *buckets), _TreeRecord)

    @property
    def _max_nodes(self) -> int:
        """Nodes of the largest tree whose forward is not too slow to pay."""
        timings = self.timings
        if timings is None:
            return 16
        longest = MAX_RATIO * timings[0][1]
        return max([2, *(size - 1 for size, seconds in timings if seconds <= longest)])

    def _next_wait(self, learned: _TreeRecord) -> int:
        """Return the number of rounds until the next exploration."""
        if learned.best is None:
            return 0
        rows = [row for group in learned.rounds for row in group]
        size = fmean(max(len(row.depths) for row in group) for group in learned.rounds if group)
        levels = fmean(max(row.depths, default=1) for row in rows)
        seconds = self.costs.round(round(size), levels)
        tau = 1 + fmean(sum(row.is_accepted) for row in rows)
        lost = max(seconds * learned.best.rate - tau, 0.0) / learned.best.tau  # in rounds
        wait = int(min(max(lost / _SHARE, _MIN_WAIT), _MAX_WAIT))
        return min(wait, _LEARNING_WAIT) if learned.num_observed < _LEARNING_ROWS else wait


def _observed_rows(
    draft: Draft, paths: Sequence[Sequence[int]], is_whole: Sequence[bool]
) -> list[ObservedRow]:
    topology, rows = draft.topology, []
    for row, path in enumerate(paths):
        if path and is_whole[row]:
            shape = row if len(topology.host_parents) > 1 else 0
            probabilities = None
            if draft.node_probs is not None:
                probabilities = path_products(topology.host_parents[shape], draft.node_probs[row])
            rows.append(ObservedRow.of(topology.host_node_depths[shape], probabilities, path))
    return rows


def describe_tree(tree: TreePlan | Estimate | None) -> str:
    """Return a short description of a plan; empty for the proposer's own settings."""
    if tree is None:
        return ""
    plan = tree.plan if isinstance(tree, Estimate) else tree
    if plan.paths is not None:
        return f"static tree of {len(plan.paths)} nodes on {plan.depth} levels"
    line = f"up to {plan.num_draft_tokens} nodes on {plan.depth} levels"
    if plan.min_probability is not None:
        line += f", nodes from a probability of {plan.min_probability:.2f}"
    if plan.min_confidence is not None:
        line += f", levels from {plan.min_confidence:.2f}"
    return line
