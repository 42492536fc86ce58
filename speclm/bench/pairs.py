"""Paired measurement: every run stands next to a plain run of the same call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import quantiles

from transformers import PreTrainedModel

from speclm.bench.calls import Call
from speclm.bench.decoders import Decoder, Outcome
from speclm.bench.divergence import Divergence, explain
from speclm.errors import MeasurementError
from speclm.stats import SpeculationStats


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles of a sample."""

    lower_quartile: float
    median: float
    upper_quartile: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarise at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        return cls(*quantiles(values, n=4, method="inclusive"))


@dataclass(frozen=True, slots=True)
class Pair:
    """A plain run and a run of a method, one right after the other."""

    plain: Outcome
    method: Outcome

    @property
    def ratio(self) -> float:
        """Plain seconds a token over the method's: of seconds, wherever outputs are equal."""
        return self.method.tokens_per_second / self.plain.tokens_per_second

    @property
    def is_identical(self) -> bool:
        """Whether both runs gave the same tokens in every row."""
        return self.plain.tokens == self.method.tokens


@dataclass(frozen=True, slots=True)
class Comparison:
    """A method next to regular generation.

    Args:
        method: Name of the method.
        promises_identity: Whether it claims regular generation's tokens.
        pairs: One a call.
        divergences: Where the outputs of a method that promises identity differ.
    """

    method: str
    promises_identity: bool
    pairs: list[Pair]
    divergences: list[Divergence] = field(default_factory=list)

    @property
    def ratio(self) -> Spread:
        """Plain time over the method's, over pairs."""
        return Spread.of([pair.ratio for pair in self.pairs])

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all runs of the method over their time."""
        return _rate([pair.method for pair in self.pairs])

    @property
    def plain_tokens_per_second(self) -> float:
        """Tokens of all plain runs over their time."""
        return _rate([pair.plain for pair in self.pairs])

    @property
    def num_identical(self) -> int:
        """Pairs whose runs gave the same tokens."""
        return sum(pair.is_identical for pair in self.pairs)

    @property
    def is_honest(self) -> bool:
        """Whether the outputs are what the method promises, rounding aside."""
        if not self.promises_identity:
            return True
        differing = {index for index, pair in enumerate(self.pairs) if not pair.is_identical}
        listed = {divergence.call for divergence in self.divergences}
        return listed == differing and all(found.is_explained for found in self.divergences)

    @property
    def stats(self) -> SpeculationStats | None:
        """Counters of all runs together; None for a method without any."""
        parts = [pair.method.stats for pair in self.pairs if pair.method.stats is not None]
        return SpeculationStats.merge(parts) if parts else None


def compare(
    plain: Decoder,
    method: Decoder,
    calls: Sequence[Call],
    *,
    base: PreTrainedModel,
    num_warmup: int = 1,
    on_pair: Callable[[Pair], object] | None = None,
) -> Comparison:
    """Run a method next to regular generation, in alternating order, and check its outputs.

    Args:
        plain: The method of regular generation.
        method: The method to measure.
        calls: What is generated; one pair each.
        base: The model, which explains divergences.
        num_warmup: Calls run by both before anything is counted.
        on_pair: Told every pair, e.g. to show progress.

    Raises:
        MeasurementError: If there is no call.
    """
    if not calls:
        raise MeasurementError("no prompts to measure on, expected at least one; pass more")
    for call in calls[:num_warmup]:
        plain.run(call)
        method.run(call)
    pairs: list[Pair] = []
    for index, call in enumerate(calls):
        if index % 2:
            measured = method.run(call)
            pair = Pair(plain=plain.run(call), method=measured)
        else:
            pair = Pair(plain=plain.run(call), method=method.run(call))
        pairs.append(pair)
        if on_pair is not None:
            on_pair(pair)
    divergences = [
        found
        for index, (call, pair) in enumerate(zip(calls, pairs, strict=True))
        if method.promises_identity
        for found in explain(
            base, call, index=index, plain=pair.plain.tokens, other=pair.method.tokens
        )
    ]
    return Comparison(method.name, method.promises_identity, pairs, divergences)


def _rate(outcomes: Sequence[Outcome]) -> float:
    return sum(run.num_tokens for run in outcomes) / sum(run.seconds for run in outcomes)
