"""Counters of speculative generation."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from time import perf_counter

PHASES = ("prefill", "draft", "verify", "accept", "commit")
"""Timed phases of a generation, in order."""


@dataclass(slots=True)
class RowStats:
    """Counters of one row; only `prefill_tokens` includes the prompt's own forward.

    Args:
        accepted_lengths: Draft tokens kept in each round in which the row emitted tokens.
        offered: ``offered[d - 1]`` counts rounds whose draft reached depth d.
        accepted: ``accepted[d - 1]`` counts rounds that kept a draft token at depth d.
        num_draft_tokens: Nodes drafted, root and padding excluded.
        prefill_tokens: Tokens emitted by the prompt's own forward: accepted tokens of the first
            draft, then the bonus token.
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
    def num_tokens(self) -> int:
        """Tokens emitted, those of the prompt's own forward included."""
        return self.prefill_tokens + len(self.accepted_lengths) + sum(self.accepted_lengths)

    @property
    def acceptance_rate(self) -> float:
        """Accepted per drafted token; 0.0 when nothing was drafted."""
        drafted = self.num_draft_tokens
        return sum(self.accepted_lengths) / drafted if drafted else 0.0

    @property
    def histogram(self) -> list[int]:
        """``histogram[k]`` counts the rounds that kept k draft tokens."""
        lengths = self.accepted_lengths
        return [lengths.count(length) for length in range(max(lengths, default=-1) + 1)]

    def to_dict(self) -> dict[str, object]:
        """Return the counters under the names of vLLM's per-request metrics.

        ``mean_acceptance_length`` is `tau`, which counts the bonus token.
        """
        return {
            "mean_acceptance_length": self.tau,
            "draft_acceptance_rate": self.acceptance_rate,
            "acceptance_histogram": self.histogram,
            "num_spec_steps": len(self.accepted_lengths),
            "num_accepted_draft_tokens": sum(self.accepted_lengths),
            "num_draft_tokens": self.num_draft_tokens,
        }


@dataclass(frozen=True, slots=True)
class Pause:
    """A pause of speculation, because drafts cost more than they gained.

    Args:
        round: Number of rounds before the pause, prefill excluded.
        reason: Measured times of a round with a draft and of one without.
    """

    round: int
    reason: str


@dataclass(slots=True)
class SpeculationStats:
    """Counters of one `generate` call, over all rows.

    ``str(stats)`` is a readable table.

    Args:
        rows: Counters of each row, `num_return_sequences` expanded.
        rounds: Target forwards after the prefill; each verifies one draft for all rows.
        seconds: Host time of each phase; see `PHASES`. An accelerator works asynchronously, and
            its time counts in the phase that waits for it.
        verification: How drafts were verified, in the words of `Verification`.
        self_check: Reason for `verification`.
        fallbacks: Why the call, or a part of it, was decoded without speculation.
        acceptance: Name of the acceptance rule; greedy decoding uses the exact one.
        is_lossy: Whether the acceptance rule changes the output distribution.
        num_plain_rounds: Those of `rounds` in which the proposer was not asked.
        pauses: When and why speculation was paused for some rounds. A call may begin within a
            pause, which is then listed with the earlier call.
        tree: The last tree drafted, if it did not follow from the proposer's own settings.
        num_regular_steps: Forwards that regular generation needs for the same tokens, prefill
            excluded; set when the call ends.
        engine: Name of the engine that verified trees, or "eager", with the reason if one was asked
            for.
        engine_seconds: Time that the engine took to compile or record, not part of `seconds`.
        plain_round_seconds: Host time of the fastest round without a draft, in this call or an
            earlier one; None if there was none.
    """

    rows: list[RowStats] = field(default_factory=list)
    rounds: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    verification: str = "regular generation"
    self_check: str = ""
    fallbacks: list[str] = field(default_factory=list)
    acceptance: str = "exact"
    is_lossy: bool = False
    num_plain_rounds: int = 0
    pauses: list[Pause] = field(default_factory=list)
    tree: str = ""
    num_regular_steps: int = 0
    plain_round_seconds: float | None = None
    engine: str = "eager"
    engine_seconds: float = 0.0

    @classmethod
    def merge(cls, parts: Iterable["SpeculationStats"]) -> "SpeculationStats":
        """Add the counters of several calls; each row of each call stays a row.

        Fields that cannot be added are taken from the last call.
        """
        merged = cls()
        for part in parts:
            shifted = [replace(pause, round=merged.rounds + pause.round) for pause in part.pauses]
            known = (merged.plain_round_seconds, part.plain_round_seconds)
            merged = replace(
                part,
                rows=[*merged.rows, *part.rows],
                rounds=merged.rounds + part.rounds,
                seconds={name: merged.seconds[name] + part.seconds[name] for name in PHASES},
                fallbacks=list(dict.fromkeys([*merged.fallbacks, *part.fallbacks])),
                is_lossy=merged.is_lossy or part.is_lossy,
                num_plain_rounds=merged.num_plain_rounds + part.num_plain_rounds,
                pauses=[*merged.pauses, *shifted],
                engine_seconds=merged.engine_seconds + part.engine_seconds,
                num_regular_steps=merged.num_regular_steps + part.num_regular_steps,
                plain_round_seconds=min((time for time in known if time is not None), default=None),
            )
        return merged

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to phase `name`."""
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += perf_counter() - start

    def count_preparing(self, seconds: float, *, phase: str) -> bool:
        """Take the time that an engine took to prepare out of a phase; return whether any."""
        self.engine_seconds += seconds
        self.seconds[phase] -= seconds
        return seconds > 0

    def count_round(
        self, paths: Sequence[Sequence[int]], *, sizes: Sequence[int], depths: Sequence[int]
    ) -> None:
        """Count a round in the rows that emitted something.

        Args:
            paths: Accepted nodes of each row, the root included; empty in a row without tokens.
            sizes: Nodes of each row's tree; one number where all rows share a tree.
            depths: Levels of each row's tree, in the same form.
        """
        self.rounds += 1
        for row, path in enumerate(paths):
            if path:
                shape = row if len(sizes) > 1 else 0
                self.rows[row].add_round(
                    accepted_length=len(path) - 1,
                    depth=depths[shape],
                    num_draft_tokens=sizes[shape] - 1,
                )

    @property
    def total(self) -> RowStats:
        """Counters of all rows together, as if they were one."""
        return RowStats(
            accepted_lengths=[length for row in self.rows for length in row.accepted_lengths],
            offered=_add(row.offered for row in self.rows),
            accepted=_add(row.accepted for row in self.rows),
            num_draft_tokens=sum(row.num_draft_tokens for row in self.rows),
            prefill_tokens=sum(row.prefill_tokens for row in self.rows),
        )

    @property
    def tau(self) -> float:
        """Tokens per row and target forward: 1 + mean accepted length, prefill excluded."""
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
    def kept_by_depth(self) -> list[float]:
        """Share of all rounds that kept a draft token at depth 1, 2, ...

        `tau` is one more than their sum.
        """
        total = self.total
        return [kept / len(total.accepted_lengths) for kept in total.accepted]

    @property
    def milliseconds_per_round(self) -> dict[str, float]:
        """Host milliseconds per round, by phase; the prefill is not part of a round."""
        rounds = max(self.rounds, 1)
        return {name: 1e3 * self.seconds[name] / rounds for name in PHASES if name != "prefill"}

    @property
    def estimated_speed_up(self) -> float | None:
        """Estimated time of regular steps for these tokens over the time taken, prefill excluded.

        None if no round without a draft was timed.
        """
        taken = sum(seconds for name, seconds in self.seconds.items() if name != "prefill")
        if self.plain_round_seconds is None or not self.num_regular_steps or taken <= 0:
            return None
        return self.plain_round_seconds * self.num_regular_steps / taken

    @property
    def pause_summary(self) -> str | None:
        """One line on the rounds without drafts and the last pause; None without any."""
        if self.num_plain_rounds == 0 and not self.pauses:
            return None
        line = f"{self.num_plain_rounds} of {self.rounds} rounds without a draft"
        if not self.pauses:
            return line
        number = "paused" if len(self.pauses) == 1 else f"paused {len(self.pauses)} times"
        last = self.pauses[-1]
        return f"{line}; {number}, after round {last.round}: {last.reason}"

    @property
    def engine_summary(self) -> str:
        """One line on the engine; empty for eager rounds."""
        took = f", {self.engine_seconds:.1f} s to prepare" if self.engine_seconds else ""
        return "" if self.engine == "eager" else self.engine + took

    def __str__(self) -> str:
        if self.fallbacks and not self.rounds:
            return f"regular generation: {'; '.join(self.fallbacks)}"
        total, seconds = self.total, sum(self.seconds.values())
        rate = f"{total.num_tokens / seconds:.1f} tokens/s" if seconds else "time not known"
        by_depth = " ".join(f"{share:.2f}" for share in self.acceptance_by_depth)
        phases = ", ".join(f"{name} {ms:.2f}" for name, ms in self.milliseconds_per_round.items())
        speed_up = self.estimated_speed_up
        lines = {
            "tokens": f"{total.num_tokens} in {seconds:.2f} s, {rate}",
            "tau": f"{self.tau:.2f} tokens per target forward after the prefill "
            f"(1 + mean accepted length), {self.rounds} forwards",
            "acceptance": self.acceptance
            + (", lossy: the distribution is not the base's" if self.is_lossy else ""),
            "accepted": f"{total.acceptance_rate:.2f} of {total.num_draft_tokens} draft tokens",
            "by position": by_depth or "nothing drafted",
            "time": f"prefill {1e3 * self.seconds['prefill']:.1f} ms; ms per round: {phases}",
            "speed-up": "not known, no round without a draft was timed"
            if speed_up is None
            else f"about {speed_up:.2f}, estimated from rounds without a draft",
            "tree": self.tree,
            "engine": self.engine_summary,
            "pauses": self.pause_summary,
            "fallbacks": "; ".join(self.fallbacks),
        }
        return "\n".join(f"{name:<12}{text}" for name, text in lines.items() if text)

    def to_dict(self) -> dict[str, object]:
        """Return all counters, ready for JSON, under vLLM's names where it has them.

        ``rows`` holds one such record per row.
        """
        return {
            **self.total.to_dict(),
            "num_target_forwards": self.rounds,
            "acceptance_by_depth": self.acceptance_by_depth,
            "milliseconds_per_round": self.milliseconds_per_round,
            "prefill_milliseconds": 1e3 * self.seconds["prefill"],
            "verification": self.verification,
            "self_check": self.self_check,
            "fallbacks": list(self.fallbacks),
            "acceptance": self.acceptance,
            "is_lossy": self.is_lossy,
            "num_plain_rounds": self.num_plain_rounds,
            "pauses": [{"round": pause.round, "reason": pause.reason} for pause in self.pauses],
            "tree": self.tree,
            "engine": self.engine,
            "engine_seconds": self.engine_seconds,
            "rows": [row.to_dict() for row in self.rows],
        }


def _add(columns: Iterable[list[int]]) -> list[int]:
    """Add lists of unequal length, the short ones padded with zeros."""
    return [sum(values) for values in zip_longest(*columns, fillvalue=0)]
