"""Run methods in pairs with regular generation, and compare speed and outputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import quantiles
from time import monotonic

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
    """One call run by regular generation and by a method."""

    plain: Outcome
    method: Outcome

    @property
    def ratio(self) -> float:
        """Speed-up: tokens per second of the method over those of regular generation."""
        return self.method.tokens_per_second / self.plain.tokens_per_second

    @property
    def is_identical(self) -> bool:
        """Whether both runs gave the same tokens in every row."""
        return self.plain.tokens == self.method.tokens


@dataclass(frozen=True, slots=True)
class Comparison:
    """A method compared with regular generation.

    Args:
        method: Name of the method.
        promises_identity: Whether its outputs have to be those of regular generation.
        pairs: One per call.
        divergences: Where the outputs of a method that promises identity differ.
    """

    method: str
    promises_identity: bool
    pairs: list[Pair]
    divergences: list[Divergence] = field(default_factory=list)

    @property
    def ratio(self) -> Spread:
        """Speed-up over regular generation, over pairs."""
        return Spread.of([pair.ratio for pair in self.pairs])

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all runs of the method over their time."""
        return _rate([pair.method for pair in self.pairs])

    @property
    def plain_tokens_per_second(self) -> float:
        """Tokens of all runs of regular generation over their time."""
        return _rate([pair.plain for pair in self.pairs])

    @property
    def num_identical(self) -> int:
        """Number of pairs whose runs gave the same tokens."""
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
        """Counters of all runs together; None for a method without counters."""
        parts = [pair.method.stats for pair in self.pairs if pair.method.stats is not None]
        return SpeculationStats.merge(parts) if parts else None


def compare(
    plain: Decoder,
    methods: Sequence[Decoder],
    calls: Sequence[Call],
    *,
    base: PreTrainedModel,
    num_warmup: int = 1,
    max_seconds: float | None = None,
    on_pair: Callable[[Pair], object] | None = None,
) -> list[Comparison]:
    """Run every call by regular generation and by all methods, and check the outputs.

    The order rotates from call to call, so that no run always comes first.

    Args:
        plain: Regular generation.
        methods: The methods to measure.
        calls: What is generated; each gives one pair per method.
        base: The model, which explains divergences.
        num_warmup: Number of calls that are run once by all before anything is counted.
        max_seconds: No further call is begun after this time; None for all calls.
        on_pair: Called with every pair, for example to show progress.

    Raises:
        MeasurementError: If there is no call.
    """
    if not calls:
        raise MeasurementError("no prompts to measure on, expected at least one; pass more")
    everyone = [plain, *methods]
    for call in calls[:num_warmup]:
        for decoder in everyone:
            decoder.run(call)
    pairs: list[list[Pair]] = [[] for _ in methods]
    start = monotonic()
    for index, call in enumerate(calls):
        if index > 0 and max_seconds is not None and monotonic() - start > max_seconds:
            break
        turn = index % len(everyone)
        order = [*range(turn, len(everyone)), *range(turn)]
        outcomes = {number: everyone[number].run(call) for number in order}
        for number, found in enumerate(pairs, 1):
            found.append(Pair(plain=outcomes[0], method=outcomes[number]))
            if on_pair is not None:
                on_pair(found[-1])
    return [
        Comparison(
            method.name, method.promises_identity, found, _divergences(base, method, calls, found)
        )
        for method, found in zip(methods, pairs, strict=True)
    ]


def _divergences(
    base: PreTrainedModel, method: Decoder, calls: Sequence[Call], pairs: Sequence[Pair]
) -> list[Divergence]:
    """Return where a method's outputs differ, if it promises that they do not."""
    if not method.promises_identity:
        return []
    return [
        found
        for index, (call, pair) in enumerate(zip(calls, pairs, strict=False))
        for found in explain(
            base, call, index=index, plain=pair.plain.tokens, other=pair.method.tokens
        )
    ]


def _rate(outcomes: Sequence[Outcome]) -> float:
    return sum(run.num_tokens for run in outcomes) / sum(run.seconds for run in outcomes)
