"""Measures how often candidates are right, by the evidence for them."""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from itertools import accumulate
from math import exp
from operator import mul
from typing import TypeVar

_Key = TypeVar("_Key", bound=Hashable)

_MAX_SETTINGS = 8
_KEY_WEIGHT = 16.0  # candidates that the start rate of a key counts for
_CODE_WEIGHT = 12.0  # candidates that the rates of its keys count for, where sources agree
_AGREEMENT = 0.5  # how independent of the first a second source is assumed to be
_ROUNDS_PER_UPDATE = 32
_MAX_COUNT = 2000.0  # candidates after which older ones count half

# Exponential noise in four buckets of equal probability. The target takes a token of probability r
# with noise E if E / r is below the smallest such quotient of all others, which is exponential with
# rate 1 - r; hence with probability exp(-E (1 - r) / r).
NOISE_BOUNDS = (0.2877, 0.6931, 1.3863)
_NOISE_MIDDLES = (0.134, 0.470, 0.981, 2.08)
_NOISE_SHARE = 0.6  # of the cases in which the target's distribution is not nearly certain


class HitRates:
    """Hit rates of candidates, by the keys that their sources gave them.

    A candidate's code combines one key of each source that suggests it and, under sampling, the
    bucket of its noise. The rate of a code starts from the rates of its keys. Every setting has
    rates of its own. They change once in `_ROUNDS_PER_UPDATE` rounds, which keeps reading cheap.
    """

    def __init__(self, start_rates: Sequence[Sequence[float]]) -> None:
        """Start from the rates of each source's keys."""
        self._start_rates = [tuple(rates) for rates in start_rates]
        sizes = [len(rates) + 1 for rates in self._start_rates]
        self.strides = [1, *accumulate(sizes, mul)][:-1]
        """What one more in the key of each source adds to a code; 0 is no candidate."""
        self.noise_stride = self.strides[-1] * sizes[-1] if sizes else 1
        """What one more in the noise bucket adds to a code; bucket 0 is no noise."""
        self._settings: OrderedDict[Hashable, _Counts] = OrderedDict()
        self._counts = _Counts()

    @property
    def known(self) -> dict[int, float]:
        """Rates of the codes that were asked for since the last update."""
        return self._counts.rates

    def begin(self, setting: Hashable) -> None:
        """Switch to the rates of a setting; the least recent of many settings is dropped."""
        self._counts = self._settings.setdefault(setting, _Counts())
        self._settings.move_to_end(setting)
        while len(self._settings) > _MAX_SETTINGS:
            self._settings.popitem(last=False)

    def forget(self) -> None:
        """Start again from the rates of each source's keys, in every setting."""
        self._settings.clear()
        self._counts = _Counts()

    def rate(self, code: int) -> float:
        """Return the probability that a candidate of this code is right."""
        found = self._counts.rates.get(code)
        if found is None:
            hits, seen = self._counts.codes.get(code, (0.0, 0.0))
            prior = self._prior(code)
            found = (hits + _CODE_WEIGHT * prior) / (seen + _CODE_WEIGHT)
            self._counts.rates[code] = found
        return found

    def count(self, code: int, *, is_hit: bool) -> None:
        """Count a candidate of which it is known whether it was right."""
        pending = self._counts.pending
        hits, seen = pending.get(code, (0, 0))
        pending[code] = hits + is_hit, seen + 1

    def end_round(self) -> None:
        """End a round; use the new rates if it is time."""
        counts = self._counts
        counts.num_rounds += 1
        if counts.num_rounds % _ROUNDS_PER_UPDATE:
            return
        for code, (hits, seen) in counts.pending.items():
            counts.add(counts.codes, code, hits, seen)
            keys, noise = self._keys(code)
            for source, key in keys:
                counts.add(counts.keys, (source, key, noise), hits, seen)
        counts.pending, counts.rates = {}, {}

    def _keys(self, code: int) -> tuple[list[tuple[int, int]], int]:
        """Return the sources that suggest a candidate, their keys, and the noise bucket."""
        noise, code = divmod(code, self.noise_stride)
        keys = []
        for source, rates in enumerate(self._start_rates):
            code, key = divmod(code, len(rates) + 1)
            if key:
                keys.append((source, key - 1))
        return keys, noise

    def _prior(self, code: int) -> float:
        keys, noise = self._keys(code)
        rates = []
        for source, key in keys:
            start = _under_noise(self._start_rates[source][key], noise)
            hits, seen = self._counts.keys.get((source, key, noise), (0.0, 0.0))
            rates.append((hits + _KEY_WEIGHT * start) / (seen + _KEY_WEIGHT))
        rates.sort(reverse=True)
        missed = 1 - rates[0]
        for rate in rates[1:]:
            missed *= 1 - _AGREEMENT * rate
        return 1 - missed


class _Counts:
    """Hits and candidates of one setting, by code and by key, and the rates in use."""

    def __init__(self) -> None:
        self.num_rounds = 0
        self.pending: dict[int, tuple[int, int]] = {}  # by code, since the last update
        self.rates: dict[int, float] = {}
        self.codes: dict[int, tuple[float, float]] = {}
        self.keys: dict[tuple[int, int, int], tuple[float, float]] = {}

    @staticmethod
    def add(table: dict[_Key, tuple[float, float]], key: _Key, hits: int, seen: int) -> None:
        """Add hits and candidates to an entry, in which old ones fade."""
        old_hits, old_seen = table.get(key, (0.0, 0.0))
        if old_seen >= _MAX_COUNT:
            old_hits, old_seen = old_hits / 2, old_seen / 2
        table[key] = old_hits + hits, old_seen + seen


def _under_noise(rate: float, bucket: int) -> float:
    """Return the start rate of a candidate whose noise is in a bucket; 0 for greedy decoding."""
    if bucket == 0:
        return rate
    chosen = exp(-_NOISE_MIDDLES[bucket - 1] * (1 - rate) / max(rate, 1e-3))
    return _NOISE_SHARE * chosen + (1 - _NOISE_SHARE) * rate
