"""Decide whether the next round should have a draft, so that generation is never slower."""

import copy
import math
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from statistics import fmean, median, median_low
from time import perf_counter

from speclm.adaptive.memory import Memory, bucket_of_context
from speclm.stats import Pause, SpeculationStats

# Gains, losses and balances are in plain rounds: the time of a round without a draft, or the one
# token that it emits.
_START = 0.5  # balance before anything is known: the most that the first call may lose
_FIRST_PRICE = 2.0  # price of the first draft of a batch, which reads the prompts of all rows
_NEW_TEXT = 4  # a new call adds this fraction of what is missing for a draft
_LIMIT = 12.0  # maximum balance: the most that is lost if drafts become useless
_REFILL = 1 / 40  # added by a round without a draft: the share of time that probes may cost
_LEAST_REFILL = 1 / 160  # halved down to this each time that a probe has gained nothing

_MEASURED_ROUNDS = 2
_FRESH_ROUNDS = 16  # an older plain time is measured again before drafts pause ...
_VALID_ROUNDS = 256  # ... and one older than this always, unless drafts obviously pay
_OBVIOUS_TAU = 2.5

_OBSERVED = 4  # a proposer learns from one of so many rounds while drafts pause

_NUM_PLAIN_TIMES = 9
_NUM_ROUNDS = 8
_NUM_FIRST_ROUNDS = 5
_CLIP = 2.0  # outliers count as at most this many times the median


@dataclass(slots=True)
class Ledger:
    """Gains and losses of drafts in calls of one setting, batch size and length of context.

    Args:
        first_price: Expected loss of the first draft.
        balance: Gains minus losses, at most `_LIMIT`. Drafts pause while it is less than the price
            of a useless draft.
        refill: What a round without a draft adds to a low balance.
        to_measure: Rounds without a draft that are still to be timed.
        plain_times: Seconds of the last rounds without a draft.
        age: Rounds since the last of them.
        rounds: Seconds, tokens and booked gain of the last rounds with a draft.
        first_times: Seconds of rounds with a draft after one without, in which proposers read
            what they have missed, such as the prompt.
        prefill_times: Seconds of drafts that were verified together with the prompt.
        before_probe: Balance before the current series of rounds with a draft; None outside one.
        num_unmeasured: Rounds with a draft since the plain time became unknown.
    """

    first_price: float
    balance: float = _START
    refill: float = _REFILL
    to_measure: int = _MEASURED_ROUNDS
    plain_times: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_PLAIN_TIMES))
    age: int = 0
    rounds: deque[tuple[float, float, float]] = field(
        default_factory=lambda: deque(maxlen=_NUM_ROUNDS)
    )
    first_times: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_FIRST_ROUNDS))
    prefill_times: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_FIRST_ROUNDS))
    before_probe: float | None = None
    num_unmeasured: int = 0

    def wants_draft(self) -> bool:
        """Return whether the next round should have a draft."""
        return self.to_measure == 0 and self.balance >= self.price()

    def is_paused(self) -> bool:
        """Return whether rounds have shown that drafts do not pay."""
        return self.to_measure == 0 and bool(self.rounds) and self.balance < self.price()

    def price(self) -> float:
        """Return what a round loses if no draft token is accepted."""
        plain = self.plain_time()
        if plain is None:
            return 0.0
        if not self.rounds:
            return self.first_price
        seconds = self._usual()
        if self.before_probe is None and len(self.first_times) > 1:
            seconds = max(seconds, median_low(self.first_times))
        return max(seconds / plain - 1.0, 0.0)

    def plain_time(self) -> float | None:
        """Return the usual seconds of a round without a draft (low median: noise only adds)."""
        return median_low(self.plain_times) if self.plain_times else None

    def tau(self) -> float:
        """Return the mean tokens of the last rounds with a draft."""
        return fmean(tokens for _, tokens, _ in self.rounds) if self.rounds else 1.0

    def reason(self) -> str:
        """Return figures that show why drafts do not pay."""
        limit = _CLIP * self._usual()
        seconds = fmean(min(seconds, limit) for seconds, _, _ in self.rounds)
        return (
            f"round of {1e3 * seconds:.1f} ms for {self.tau():.1f} tokens, "
            f"plain {1e3 * (self.plain_time() or 0.0):.1f} ms"
        )

    def begin_call(self) -> None:
        """Add a part of what is missing for a draft, because the text is new."""
        self.balance += max(self.price() - self.balance, 0.0) / _NEW_TEXT

    def add_plain(self, seconds: float | None) -> float:
        """Book a round without a draft and return the change of the balance.

        Args:
            seconds: None if the time is not usable.
        """
        if seconds is not None:
            self.plain_times.append(seconds)
            self.age = 0
        if self.to_measure:
            self.to_measure -= 1
            return self._book_again() if self.to_measure == 0 else 0.0
        if self.before_probe is not None:
            has_gained = self.balance > self.before_probe
            self.refill = _REFILL if has_gained else max(self.refill / 2, _LEAST_REFILL)
            self.before_probe = None
        is_low = self.balance < max(self.price(), _START)
        return self._add(self.refill if is_low else 0.0)

    def add_draft(self, seconds: float | None, tokens: int | float, *, is_first: bool) -> float:
        """Book a round with a draft and return the change of the balance.

        Args:
            seconds: None if the time is not usable.
            tokens: Tokens that the round emitted.
            is_first: Whether the round before, if any, had no draft.
        """
        self.age += 1
        if self.before_probe is None:
            self.before_probe = self.balance
        gain = 0.0 if seconds is None else self._book(seconds, tokens, is_first=is_first)
        self.num_unmeasured = self.num_unmeasured + 1 if self.plain_time() is None else 0
        is_stale = self.age > _VALID_ROUNDS and self.tau() <= _OBVIOUS_TAU
        is_doubtful = self.age > _FRESH_ROUNDS and self.balance < self.price()
        if is_stale or is_doubtful or self.num_unmeasured > 2 * _FRESH_ROUNDS:
            self.to_measure, self.age, self.num_unmeasured = _MEASURED_ROUNDS, 0, 0
            self.plain_times.clear()
        return gain

    def add_prefill(self, seconds: float, tokens: int | float) -> float:
        """Book a draft that was verified with the prompt and return the change of the balance.

        Args:
            seconds: Time of drafting.
            tokens: Draft tokens that were accepted.
        """
        plain = self.plain_time()
        self.prefill_times.append(seconds)
        if plain is None:
            return 0.0
        # Long times count once two calls have shown them.
        counted = min(seconds, _CLIP * plain)
        if len(self.prefill_times) > 1:
            counted = max(counted, median_low(self.prefill_times))
        return self._add(tokens - counted / plain)

    def _add(self, change: float) -> float:
        self.balance = min(self.balance + change, _LIMIT)
        return change

    def _book(self, seconds: float, tokens: int | float, *, is_first: bool) -> float:
        plain = self.plain_time()
        usual = self._usual() if self.rounds else None
        if is_first:
            # The time of reading counts once two calls have shown it, because a model's first call
            # is slow in many ways.
            self.first_times.append(seconds)
            usual = usual or min(seconds, _CLIP * (plain or seconds))
            read = median_low(self.first_times) if len(self.first_times) > 1 else 0.0
            seconds, counted = usual, max(usual, read)
        else:
            counted = seconds = min(seconds, _CLIP * (usual or seconds))
        gain = 0.0 if plain is None else tokens - counted / plain
        self.rounds.append((seconds, tokens, gain))
        return self._add(gain)

    def _book_again(self) -> float:
        """Book the last rounds with a draft by the new plain time and return the change."""
        plain = self.plain_time()
        if plain is None:  # the clock is not usable
            return 0.0
        rounds = [(seconds, tokens, tokens - seconds / plain) for seconds, tokens, _ in self.rounds]
        pairs = zip(rounds, self.rounds, strict=True)
        change = sum((new[2] - old[2] for new, old in pairs), 0.0)
        self.rounds.extend(rounds)
        return self._add(change)

    def _usual(self) -> float:
        """Return the seconds of a round with a draft."""
        return median(seconds for seconds, _, _ in self.rounds)


def ledger_of(
    memory: Memory, setting: Hashable, *, batch: int, context: int, before: Ledger | None = None
) -> Ledger:
    """Return the ledger of rounds of `batch` rows with `context` cached tokens.

    Args:
        memory: Holds the ledgers.
        setting: What acceptance depends on.
        batch: Rows.
        context: Cached tokens. A call with a long prompt must not lose what calls with short ones
            have gained, because proposers read the prompt, and plain rounds take longer.
        before: Ledger of the round before; a new one continues it.
    """
    key = ("pausing", setting, batch, bucket_of_context(context))
    first_price = _FIRST_PRICE if batch > 1 else 0.0
    return memory.recall(key, lambda: copy.deepcopy(before) if before else Ledger(first_price))


class Pausing:
    """Decides before each round of one call whether to draft, from the time of earlier rounds.

    Drafts have a balance. Each round adds the tokens that it emitted minus its time, both in plain
    rounds. Drafts pause while the balance does not cover another useless draft. Rounds without a
    draft refill it slowly, so a draft is tried now and then, less often if tries fail. The loss is
    therefore bounded by start and refill, and gains are saved up to a limit. The first two rounds
    have no draft, to measure the time of a plain round. Later calls of the same setting and batch
    size continue with the same balance.

    Tokens do not depend on it. It uses no tensors and does not sync.

    Example:
        ```python
        pausing = Pausing(Memory(), batch=1, num_prompt_tokens=20)
        drafted = pausing.wants_draft()  # starts the clock
        pausing.record(tokens=3, drafted=drafted)  # stops it
        ```
    """

    def __init__(
        self,
        memory: Memory,
        *,
        batch: int,
        num_prompt_tokens: int,
        setting: Hashable = None,
        proposer: object = None,
        stats: SpeculationStats | None = None,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        """Begin a call.

        Args:
            memory: What earlier calls learned; is updated.
            batch: Rows, including ended ones, which forwards still compute.
            num_prompt_tokens: Tokens in the cache before the first round.
            setting: What acceptance depends on, apart from the text; for example the temperature.
            proposer: The proposer, compared by identity.
            stats: Counters to update, if any.
            clock: Returns seconds.
        """
        memory.begin_call(proposer)
        self._memory = memory
        self._setting, self._batch = setting, batch
        self._stats = stats
        self._clock = clock
        self._context = float(num_prompt_tokens)
        self._ledger = ledger_of(memory, setting, batch=batch, context=num_prompt_tokens)
        self._ledger.begin_call()
        self._first_ledger = self._ledger
        self._balance = self._ledger.balance  # without the limit
        self._num_tokens = 0.0
        self._num_rounds = 0
        self._has_read = False  # whether the round before had a draft
        self.is_paused = self._ledger.is_paused()
        """Whether rounds have shown that drafts do not pay."""
        self._start = clock()

    def wants_draft(self) -> bool:
        """Start the clock, and return whether the next round should have a draft.

        Before the prefill: whether a draft should be verified together with the prompt.
        """
        self._start = self._clock()
        return self._ledger.wants_draft()

    def observes(self, index: int) -> bool:
        """Return whether the proposer should learn from round `index`, which has no draft.

        What it learns takes a few percent of a round, which is too much while drafts pause. But
        then a proposer that learns nothing may never draft better.
        """
        return not self.is_paused or index % _OBSERVED == 0

    def restart_clock(self) -> None:
        """Do not count the time since `wants_draft`."""
        self._start = self._clock()

    def record_prefill(self, *, tokens: int | float, seconds: float | None) -> None:
        """Record the prompt's forward.

        Args:
            tokens: Tokens that it emitted.
            seconds: Time of drafting before it; None without a draft.
        """
        self._num_tokens += tokens
        if seconds is not None and 0 < seconds < math.inf:
            self._balance += self._ledger.add_prefill(seconds, tokens - 1)
            self._has_read = True

    def record(self, *, tokens: int | float, drafted: bool, seconds: float | None = None) -> None:
        """Record a round.

        Args:
            tokens: Tokens that the round emitted in the shortest rows, which decide when the call
                ends.
            drafted: Whether the proposer was called, even if it drafted nothing, or the target read
                again what rejected drafts have made it forget.
            seconds: Wall time of the round, NaN if it is not usable; None for the time since
                `wants_draft`.
        """
        if seconds is None:
            seconds = self._clock() - self._start
        timed = seconds if math.isfinite(seconds) and seconds > 0 else None
        self._num_rounds += 1
        self._num_tokens += tokens
        self._context += tokens
        ledger = ledger_of(
            self._memory,
            self._setting,
            batch=self._batch,
            context=int(self._context),
            before=self._ledger,
        )
        self._ledger = ledger
        if drafted:
            self._balance += ledger.add_draft(timed, tokens, is_first=not self._has_read)
        else:
            self._balance += ledger.add_plain(timed)
        self._has_read = drafted
        was_paused, self.is_paused = self.is_paused, ledger.is_paused()
        if self._stats is None:
            return
        if not drafted:
            self._stats.num_plain_rounds += 1
        if self.is_paused and not was_paused:
            self._stats.pauses.append(Pause(self._num_rounds, ledger.reason()))

    def finish(self, num_steps: int) -> None:
        """End the call, whose longest row has `num_steps` new tokens.

        More tokens may have been booked, if several rows were the shortest one in turn.
        """
        excess = self._num_tokens - num_steps
        if excess > 0 and self._ledger is self._first_ledger:
            self._ledger.balance = min(self._ledger.balance, self._balance - excess)
