"""Choose which parts of a joined proposer draft, by the tokens per second of their rounds."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from time import perf_counter

_FIRST_TRIAL, _TRIAL = 16, 8  # rounds; one after a switch, in which parts catch up, is not counted
_FIRST_WAIT, _MAX_WAIT = 32, 512  # rounds between two trials
_FADE = 0.985  # weight of the rounds before to that of the latest one
_CLIP = 3.0  # outliers count as at most this many times the mean
_MAX_SETTINGS = 8


@dataclass(slots=True)
class _Rate:
    """Tokens and seconds of rounds with one choice, in which old ones fade."""

    tokens: float = 0.0
    seconds: float = 0.0
    num_rounds: float = 0.0

    def add(self, tokens: float, seconds: float) -> None:
        """Add a round."""
        if self.num_rounds:
            seconds = min(seconds, _CLIP * self.seconds / self.num_rounds)
        self.tokens = _FADE * self.tokens + tokens
        self.seconds = _FADE * self.seconds + seconds
        self.num_rounds = _FADE * self.num_rounds + 1

    @property
    def speed(self) -> float:
        """Tokens per second; infinite before the first round, so that every choice is tried."""
        return self.tokens / self.seconds if self.seconds else float("inf")


@dataclass(slots=True)
class _Setting:
    """What is known in one setting.

    Args:
        rates: Rate of each choice.
        used: The choice in use.
        left: Rounds for which it is used before another choice is made.
        is_trial: Whether it is tried, although another was faster.
        wait: Rounds between two trials.
        tried: The choice that was tried last.
    """

    rates: list[_Rate]
    used: int = 0
    left: int = _FIRST_TRIAL
    is_trial: bool = True
    wait: int = _FIRST_WAIT
    tried: int = 0


@dataclass(slots=True)
class PartChoice:
    """Chooses among sets of parts: mostly the fastest so far, now and then another one.

    A trial of a slow choice doubles the time to the next one. Only speed depends on the choice.

    Args:
        num_choices: Sets of parts to choose from.
        clock: Returns seconds.
    """

    num_choices: int
    clock: Callable[[], float] = perf_counter
    _settings: OrderedDict[Hashable, _Setting] = field(default_factory=OrderedDict)
    _current: _Setting = field(init=False)
    _start: float | None = None
    _is_first: bool = False

    def __post_init__(self) -> None:
        self.begin(None)

    def begin(self, setting: Hashable) -> None:
        """Switch to what is known in a setting; the least recent of many is dropped."""
        if setting not in self._settings:
            self._settings[setting] = _Setting([_Rate() for _ in range(self.num_choices)])
        self._settings.move_to_end(setting)
        while len(self._settings) > _MAX_SETTINGS:
            self._settings.popitem(last=False)
        self._current, self._start, self._is_first = self._settings[setting], None, False

    def forget(self) -> None:
        """Forget all rounds."""
        self._settings.clear()
        self.begin(None)

    def next(self) -> int:
        """Return the choice of the round that starts now."""
        current = self._current
        if current.left <= 0 and self.num_choices > 1:
            self._choose(current)
        current.left -= 1
        self._start = self.clock()
        return current.used

    def record(self, tokens: float) -> None:
        """Record the tokens per row of the round that ends now; nothing if it had no draft."""
        if self._start is None:
            return
        seconds, self._start = self.clock() - self._start, None
        if self._is_first:
            self._is_first = False  # parts read what they have missed
            return
        self._current.rates[self._current.used].add(tokens, seconds)

    def _choose(self, current: _Setting) -> None:
        speeds = [rate.speed for rate in current.rates]
        best = speeds.index(max(speeds))
        before = current.used
        if speeds[best] == float("inf"):
            current.used, current.left, current.is_trial = best, _FIRST_TRIAL, True
        elif current.is_trial:
            has_gained = current.tried == best
            current.wait = _FIRST_WAIT if has_gained else min(2 * current.wait, _MAX_WAIT)
            current.used, current.left, current.is_trial = best, current.wait, False
        else:
            others = [choice for choice in range(self.num_choices) if choice != best]
            later = [choice for choice in others if choice > current.tried]
            current.used, current.left, current.is_trial = (later or others)[0], _TRIAL, True
        if current.is_trial:
            current.tried = current.used
        self._is_first |= current.used != before
