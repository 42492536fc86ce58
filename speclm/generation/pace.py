"""Never slower: whether the next round of a generation should speculate."""

import math
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from enum import Enum
from statistics import fmean, median, median_low, stdev
from time import perf_counter

from speclm.stats import Pause, SpeculationStats

# All losses and gains below are in plain rounds: the time of one, or the token that it gives.
_MAX_LOSS = 8.0  # of speculation before it pauses; some sixteen wrong drafts at half a round each
_MAX_DOUBTFUL_LOSS = 12.0  # where the rounds differ so much that the loss may be bad luck
_CLEAR = 3.0  # standard errors by which the mean of the last rounds is a loss
_MAX_PROBE_LOSS = 2.0  # of a probe before it gives up
_PROBE_GAIN = 1.0  # of a probe that ends the pause
_MAX_PROBE_ROUNDS = 32  # of a probe that neither gains nor loses, or cannot be timed

_FIRST_WAIT = 24  # rounds of the first pause; each later one is twice as long ...
_MIN_LONGEST_WAIT = 32  # ... up to this, or to what the loss that led to it asks for:
_WAIT_PER_LOSS = 40  # so that probing for nothing costs no more than 1 part in 40
_LONGEST_WAIT = 512

_OBVIOUS_TAU = 2.5  # a round that gives more tokens than this hardly costs as many plain rounds
_ROUNDS_BEFORE_MEASURING = 3
_ROUNDS_BEFORE_MEASURING_THE_OBVIOUS = 32
_MEASURED_ROUNDS = 2
_FRESH_ROUNDS = 16  # a plain time this old is measured again before speculation pauses
_VALID_ROUNDS = 256  # and one this old in any case

_NUM_PLAIN_TIMES = 9
_NUM_ROUNDS = 8
_CLIP = 2.0  # times the median: what counts of an outlier
_SHORT_CONTEXT = 2048  # tokens; longer contexts are told apart by powers of two
_MAX_LANES = 64


class _Mode(Enum):
    SPECULATING = "speculating"
    MEASURING = "measuring plain rounds"
    PAUSED = "paused"
    PROBING = "probing"


@dataclass(slots=True)
class _Lane:
    """What is known about calls of one setting, number of rows and length of context.

    Args:
        mode: What the next round is for.
        left: Rounds that are left of a measurement or a pause.
        plain_times: Seconds of the last plain rounds.
        age: Rounds since the last of them.
        rounds: Seconds and tokens a row of the last speculative rounds.
        num_unmeasured: Speculative rounds since then or since the lane began.
        loss: What the recent speculative rounds lost, gains that came before left out.
        gain: What the probe has gained.
        num_probed: Rounds of the probe.
        wait: Length of the next pause.
    """

    mode: _Mode = _Mode.SPECULATING
    left: int = 0
    plain_times: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_PLAIN_TIMES))
    age: int = 0
    rounds: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_NUM_ROUNDS))
    num_unmeasured: int = 0
    loss: float = 0.0
    gain: float = 0.0
    num_probed: int = 0
    wait: int = _FIRST_WAIT

    @property
    def plain_time(self) -> float | None:
        """Seconds of a plain round; the low median, since noise adds time."""
        return median_low(self.plain_times) if self.plain_times else None

    @property
    def round_time(self) -> float:
        """Mean seconds of the last speculative rounds, outliers clipped."""
        limit = self._usual_limit
        return fmean(min(seconds, limit) for seconds, _ in self.rounds)

    @property
    def tau(self) -> float:
        """Mean tokens a row of the last speculative rounds."""
        return fmean(tokens for _, tokens in self.rounds) if self.rounds else 1.0

    @property
    def pays(self) -> bool:
        """Whether the last speculative rounds took no longer than plain ones would have."""
        if self.plain_time is None or not self.rounds:
            return True
        return self.round_time <= self.plain_time * self.tau

    @property
    def loses_clearly(self) -> bool:
        """Whether the last speculative rounds lost more than their spread explains.

        A round gives one token or many, so that a few poor ones in turn say little. Drafts in
        vain lose in every round alike.
        """
        if self.plain_time is None or len(self.rounds) < 2:
            return False
        limit = self._usual_limit
        lost = [min(seconds, limit) / self.plain_time - tokens for seconds, tokens in self.rounds]
        return fmean(lost) > _CLEAR * stdev(lost) / math.sqrt(len(lost))

    @property
    def reason(self) -> str:
        """Why speculation does not pay, in numbers."""
        return (
            f"round of {1e3 * self.round_time:.1f} ms for {self.tau:.1f} tokens, "
            f"plain {1e3 * (self.plain_time or 0.0):.1f} ms"
        )

    def begin_call(self) -> None:
        """Halve what is left of a pause: the text is another."""
        if self.mode is _Mode.PAUSED:
            self.left = (self.left + 1) // 2

    def add_plain(self, seconds: float | None) -> bool:
        """Take note of a plain round; return whether a pause has begun.

        Args:
            seconds: None when the time says nothing.
        """
        if seconds is not None:
            self.plain_times.append(seconds)
            self.age = 0
        if self.mode is _Mode.PAUSED:
            self.left -= 1
            if self.left <= 0:
                self.mode, self.gain, self.num_probed = _Mode.PROBING, 0.0, 0
        elif self.mode is _Mode.MEASURING:
            self.left -= 1
            if self.left <= 0:
                return self._end_measurement()
        return False

    def add_round(self, seconds: float | None, tokens: float) -> bool:
        """Take note of a speculative round; return whether a pause has begun.

        Args:
            seconds: None when the time says nothing.
            tokens: Mean over the rows.
        """
        self.age += 1
        if self.mode is _Mode.PROBING:
            self.num_probed += 1
        if seconds is not None:
            self._weigh(seconds, tokens)
            self.num_unmeasured += 1
        if self.mode is _Mode.SPECULATING:
            return self._review()
        if self.mode is _Mode.PROBING:
            return self._review_probe()
        return False  # the decision was another number of rows'

    def _weigh(self, seconds: float, tokens: float) -> None:
        """Compare one round with the plain rounds that would have given its tokens."""
        plain_time = self.plain_time
        counted = seconds
        if self.rounds:
            usual = median(seconds for seconds, _ in self.rounds)
            # After a pause a proposer may have to read what it missed; that happens once.
            is_first = self.mode is _Mode.PROBING and self.num_probed == 1
            counted = min(seconds, usual if is_first else _CLIP * usual)
        self.rounds.append((counted, tokens))
        if plain_time is not None:
            lost = counted / plain_time - tokens
            self.loss = max(self.loss + lost, 0.0)
            self.gain -= lost

    def _review(self) -> bool:
        if self.plain_time is None:
            is_obvious = self.tau > _OBVIOUS_TAU
            enough = (
                _ROUNDS_BEFORE_MEASURING_THE_OBVIOUS if is_obvious else _ROUNDS_BEFORE_MEASURING
            )
            if self.num_unmeasured >= enough:
                self._measure()
        elif self._has_lost and not self.pays:
            if self.age <= _FRESH_ROUNDS:
                return self._pause(self.loss)
            self._measure()
        elif self.age > _VALID_ROUNDS and self.tau <= _OBVIOUS_TAU:
            self._measure()
        return False

    def _review_probe(self) -> bool:
        if self.gain <= -_MAX_PROBE_LOSS:
            return self._pause(-self.gain)
        if self.gain >= _PROBE_GAIN or self.num_probed >= _MAX_PROBE_ROUNDS:
            self.mode, self.loss = _Mode.SPECULATING, 0.0
            self.wait = max(self.wait // 4, _FIRST_WAIT)
        return False

    def _measure(self) -> None:
        self.mode, self.left = _Mode.MEASURING, _MEASURED_ROUNDS
        self.plain_times.clear()
        self.num_unmeasured, self.age = 0, 0

    def _end_measurement(self) -> bool:
        """Weigh the last speculative rounds again, now with fresh plain times."""
        self.mode = _Mode.SPECULATING
        if self.pays or self.plain_time is None:  # which means that the clock says nothing
            self.loss = 0.0
            return False
        limit, loss = self._usual_limit, 0.0
        for seconds, tokens in self.rounds:
            loss = max(loss + min(seconds, limit) / self.plain_time - tokens, 0.0)
        self.loss = max(self.loss, loss)
        return self._has_lost and self._pause(self.loss)

    @property
    def _has_lost(self) -> bool:
        """Whether enough was lost for a pause."""
        enough = _MAX_LOSS if self.loses_clearly else _MAX_DOUBTFUL_LOSS
        return self.loss >= enough

    @property
    def _usual_limit(self) -> float:
        """Seconds beyond which a speculative round is an outlier."""
        return _CLIP * median(seconds for seconds, _ in self.rounds)

    def _pause(self, loss: float) -> bool:
        longest = min(max(_MIN_LONGEST_WAIT, _WAIT_PER_LOSS * loss), _LONGEST_WAIT)
        self.mode, self.left = _Mode.PAUSED, self.wait
        self.wait = int(min(2 * self.wait, longest))
        self.loss = 0.0
        return True


class PaceMemory:
    """What the calls of one model have learned about the time of rounds.

    Times belong to a proposer, a setting, a number of live rows and a length of context. Another
    proposer starts anew.
    """

    def __init__(self) -> None:
        self._lanes: dict[Hashable, _Lane] = {}
        self._proposer: object = None

    def begin_call(self, proposer: object) -> None:
        """Start a call, whose text may be easier to guess than that of the last one."""
        if proposer is not self._proposer:
            self._lanes.clear()
            self._proposer = proposer
        for lane in self._lanes.values():
            lane.begin_call()

    def lane(self, setting: Hashable, *, num_live: int, context: int) -> _Lane:
        """Return what is known about rounds of that many rows, in buckets of powers of two."""
        rows = (max(num_live, 1) - 1).bit_length()
        key = (setting, rows, (max(context, 0) // _SHORT_CONTEXT).bit_length())
        if key not in self._lanes:
            if len(self._lanes) >= _MAX_LANES:
                del self._lanes[next(iter(self._lanes))]
            self._lanes[key] = _Lane()
        return self._lanes[key]


class Pace:
    """Says before each round of one call whether to speculate, and is told what it took.

    Speculation is taken to pay until it is measured that it does not. Every speculative round is
    compared with the plain rounds that would have given its tokens; once the recent ones have
    lost the time of eight plain rounds, or of twelve where bad luck would explain eight,
    speculation pauses. Some rounds later a probe decides whether it goes on. Pauses grow, up to
    what keeps fruitless probes within 1 part in 40. The time of a plain round is measured where
    speculation does not obviously pay: by two plain rounds, once for many calls. The first round
    of a call is not timed.

    Tokens never depend on it, as they do not depend on drafts. No tensors, and no sync.

    Example:
        ```python
        from speclm.generation.pace import Pace, PaceMemory

        pace = Pace(PaceMemory(), batch=1, num_prompt_tokens=20)
        drafted = pace.wants_draft()  # starts the clock
        pace.record(tokens=3, drafted=drafted, num_live=1)  # stops it
        ```
    """

    def __init__(
        self,
        memory: PaceMemory,
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
            memory: What earlier calls learned; is changed.
            batch: Rows, all of them live.
            num_prompt_tokens: Tokens in the cache before the first round.
            setting: What acceptance depends on beside the text, such as the temperature.
            proposer: Whose drafts are judged, by identity.
            stats: Told about plain rounds and pauses; None for nobody.
            clock: Seconds; may be any clock, but one that stands still or jumps teaches little.
        """
        memory.begin_call(proposer)
        self._memory = memory
        self._setting = setting
        self._stats = stats
        self._clock = clock
        self._context = float(num_prompt_tokens)
        self._lane = memory.lane(setting, num_live=batch, context=num_prompt_tokens)
        self._num_rounds = 0
        self._start = clock()

    def wants_draft(self) -> bool:
        """Tell whether the round that begins now should have a draft; call it once a round.

        Before the prefill it says whether the prompt's forward should verify one.
        """
        self._start = self._clock()
        return self._lane.mode in {_Mode.SPECULATING, _Mode.PROBING}

    def restart_clock(self) -> None:
        """Leave out of the round's time what has been done since `wants_draft`."""
        self._start = self._clock()

    def record(
        self, *, tokens: int, drafted: bool, num_live: int, seconds: float | None = None
    ) -> None:
        """Take note of a round.

        Args:
            tokens: Tokens emitted in the round by all rows.
            drafted: Whether the proposer was asked, though it may have guessed nothing.
            num_live: Rows that were running when the round began.
            seconds: Wall time of the round; None for the time since `wants_draft`.
        """
        if num_live < 1:
            return
        if seconds is None:
            seconds = self._clock() - self._start
        self._num_rounds += 1
        is_timed = self._num_rounds > 1 and math.isfinite(seconds) and seconds > 0
        timed = seconds if is_timed else None
        tokens_per_row = tokens / num_live
        self._context += tokens_per_row
        self._lane = self._memory.lane(self._setting, num_live=num_live, context=int(self._context))
        stats, lane = self._stats, self._lane
        if drafted:
            has_paused = lane.add_round(timed, tokens_per_row)
        else:
            has_paused = lane.add_plain(timed)
            if stats is not None:
                stats.num_plain_rounds += 1
        if has_paused and stats is not None:
            stats.pauses.append(Pause(self._num_rounds, lane.reason))
