"""Counters of a speculative generation."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from time import perf_counter

PHASES = ("prefill", "draft", "verify", "accept", "commit")
"""Parts of a generation whose time is taken, in order."""


@dataclass(slots=True)
class RowStats:
    """Counters of one row; the prefill and its tokens are excluded, but for `prefill_tokens`.

    Args:
        accepted_lengths: Draft tokens kept in each round in which the row emitted tokens.
        offered: ``offered[d - 1]`` counts rounds whose draft reached depth d.
        accepted: ``accepted[d - 1]`` counts rounds that kept a draft token at depth d.
        num_draft_tokens: Nodes drafted, root and padding excluded.
        prefill_tokens: Tokens that the prompt's own forward emitted: the bonus token, after what
            it accepted of the first draft.
    """

    accepted_lengths: list[int] = field(default_factory=list)
    offered: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    num_draft_tokens: int = 0
    prefill_tokens: int = 0

    def add_round(self, *, accepted_length: int, depth: int, num_draft_tokens: int) -> None:
        """Count a round that kept `accepted_length` tokens of a draft `depth` levels deep."""
        self.accepted_lengths.append(accepted_length)
        self.num_draft_tokens += num_draft_tokens
        for counts, reached in ((self.offered, depth), (self.accepted, accepted_length)):
            counts.extend([0] * (reached - len(counts)))
            for level in range(reached):
                counts[level] += 1

    @property
    def tau(self) -> float:
        """Tokens per round, bonus token included; 1.0 when there was no round."""
        rounds = len(self.accepted_lengths)
        return 1.0 + sum(self.accepted_lengths) / rounds if rounds else 1.0

    @property
    def histogram(self) -> list[int]:
        """``histogram[k]`` counts the rounds that kept k draft tokens."""
        lengths = self.accepted_lengths
        return [lengths.count(length) for length in range(max(lengths, default=-1) + 1)]

    def to_dict(self) -> dict[str, object]:
        """Return the counters under the names of vLLM's per-request metrics.

        ``mean_acceptance_length`` is `tau`: it counts the bonus token.
        """
        drafted, accepted = self.num_draft_tokens, sum(self.accepted_lengths)
        return {
            "mean_acceptance_length": self.tau,
            "draft_acceptance_rate": accepted / drafted if drafted else 0.0,
            "acceptance_histogram": self.histogram,
            "num_spec_steps": len(self.accepted_lengths),
            "num_accepted_draft_tokens": accepted,
            "num_draft_tokens": drafted,
        }


@dataclass(frozen=True, slots=True)
class Pause:
    """A time without drafts, because they cost more than they gave.

    Args:
        round: Rounds after which it began; those of the prefill left out.
        reason: What a speculative and a plain round took.
    """

    round: int
    reason: str


@dataclass(slots=True)
class SpeculationStats:
    """Counters of one `generate` call, over all rows.

    Args:
        rows: Counters of each row, `num_return_sequences` expanded.
        rounds: Target forwards after the prefill; each verifies one draft for all rows.
        seconds: Host time of each phase; see `PHASES`. On an accelerator work is asynchronous,
            and a phase that waits is charged for what it waits for.
        backend: How drafts were verified, in the words of `Verification`.
        self_check: Why by this backend and by nothing better.
        fallbacks: Why the call, or a part of it, was decoded without speculation.
        acceptance: Name of the acceptance rule that decided; greedy decoding takes the exact one.
        is_lossy: Whether an acceptance rule was used that changes the output's distribution.
        num_plain_rounds: Rounds, among `rounds`, in which the proposer was not asked.
        pauses: When and why speculation was paused for some rounds. A call may begin within a
            pause, which is then listed with the call before.
        tree: What was drafted at last, where that was not left to the proposer's own settings.
    """

    rows: list[RowStats] = field(default_factory=list)
    rounds: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    backend: str = "regular generation"
    self_check: str = ""
    fallbacks: list[str] = field(default_factory=list)
    acceptance: str = "exact"
    is_lossy: bool = False
    num_plain_rounds: int = 0
    pauses: list[Pause] = field(default_factory=list)
    tree: str = ""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to phase `name`."""
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += perf_counter() - start

    @property
    def total(self) -> RowStats:
        """Counters of all rows together, as if they were one."""
        return RowStats(
            accepted_lengths=[length for row in self.rows for length in row.accepted_lengths],
            offered=_add(row.offered for row in self.rows),
            accepted=_add(row.accepted for row in self.rows),
            num_draft_tokens=sum(row.num_draft_tokens for row in self.rows),
        )

    @property
    def tau(self) -> float:
        """Tokens per row and target forward, prefill excluded: 1 + mean accepted_length."""
        return self.total.tau

    @property
    def accepted_length_histogram(self) -> list[int]:
        """``histogram[k]`` counts the rounds in which a row kept k draft tokens."""
        return self.total.histogram

    @property
    def acceptance_by_depth(self) -> list[float]:
        """Share of drafts reaching depth 1, 2, ... whose token at that depth was kept."""
        total = self.total
        accepted = total.accepted + [0] * (len(total.offered) - len(total.accepted))
        return [kept / tried for kept, tried in zip(accepted, total.offered, strict=True)]

    @property
    def milliseconds_per_round(self) -> dict[str, float]:
        """Host milliseconds a round, by phase; the prefill is not part of a round."""
        rounds = max(self.rounds, 1)
        return {name: 1e3 * self.seconds[name] / rounds for name in PHASES if name != "prefill"}

    @property
    def pause_summary(self) -> str | None:
        """One line on what was decoded without drafts, and why last; None when nothing was."""
        if self.num_plain_rounds == 0 and not self.pauses:
            return None
        line = f"{self.num_plain_rounds} of {self.rounds} rounds without a draft"
        if not self.pauses:
            return line
        number = "paused" if len(self.pauses) == 1 else f"paused {len(self.pauses)} times"
        last = self.pauses[-1]
        return f"{line}; {number}, after round {last.round}: {last.reason}"

    def to_dict(self) -> dict[str, object]:
        """Return everything that was counted, ready for JSON, with vLLM's names where it has one.

        ``rows`` holds one such record per row.
        """
        return {
            **self.total.to_dict(),
            "num_target_forwards": self.rounds,
            "acceptance_by_depth": self.acceptance_by_depth,
            "milliseconds_per_round": self.milliseconds_per_round,
            "prefill_milliseconds": 1e3 * self.seconds["prefill"],
            "backend": self.backend,
            "self_check": self.self_check,
            "fallbacks": list(self.fallbacks),
            "acceptance": self.acceptance,
            "is_lossy": self.is_lossy,
            "num_plain_rounds": self.num_plain_rounds,
            "pauses": [{"round": pause.round, "reason": pause.reason} for pause in self.pauses],
            "tree": self.tree,
            "rows": [row.to_dict() for row in self.rows],
        }


def _add(columns: Iterable[list[int]]) -> list[int]:
    """Add lists of unequal length, the short ones padded with zeros."""
    return [sum(values) for values in zip_longest(*columns, fillvalue=0)]
