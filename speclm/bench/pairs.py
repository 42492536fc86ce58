"""Measure in pairs with regular generation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, quantiles
from time import monotonic

from transformers import PreTrainedModel

from speclm.bench.decoders import Answer, Call, Decoder, Outcome, Task
from speclm.bench.divergence import Divergence, explain
from speclm.errors import MeasurementError
from speclm.files.questions import Question
from speclm.stats import SpeculationStats

NUM_QUANTILES = 20
"""Parts into which `Latency.quantiles` divides the calls."""


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
class Latency:
    """Seconds of a call, prefill included.

    Args:
        mean: Mean over the calls.
        p50: Median.
        p90: 90th percentile, interpolated between calls.
        quantiles: The fastest call, 1/20, 2/20 ... of the calls, and the slowest call.
    """

    mean: float
    p50: float
    p90: float
    quantiles: list[float]

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> "Latency":
        """Summarise at least one call."""
        seconds = [outcome.seconds for outcome in outcomes]
        many = seconds if len(seconds) > 1 else seconds * 2
        inner = quantiles(many, n=NUM_QUANTILES, method="inclusive")
        found = [min(seconds), *inner, max(seconds)]
        half, most = found[NUM_QUANTILES // 2], found[NUM_QUANTILES * 9 // 10]
        return cls(mean=fmean(seconds), p50=half, p90=most, quantiles=found)


@dataclass(frozen=True, slots=True)
class Pair:
    """One call, or one turn of a question, answered by regular generation and by a method.

    Args:
        plain: The outcome of regular generation.
        method: The outcome of the method.
        call: What regular generation was asked; None if it is not known.
        question: The question that has the turn, if there is one.
        turn: Index of the turn.
    """

    plain: Outcome
    method: Outcome
    call: Call | None = None
    question: Question | None = None
    turn: int = 0

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
        pairs: One for each call, or for each turn of a question. Turns after one whose outputs
            differ have other prompts, and are left out if identity is promised.
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
    def latency(self) -> Latency:
        """Seconds of a call by the method."""
        return Latency.of([pair.method for pair in self.pairs])

    @property
    def plain_latency(self) -> Latency:
        """Seconds of a call by regular generation."""
        return Latency.of([pair.plain for pair in self.pairs])

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

    def by_group(self) -> "dict[str, Comparison]":
        """Return the parts of the groups of questions, in order; nothing if there is only one."""
        found: dict[str, list[int]] = {}
        for index, pair in enumerate(self.pairs):
            found.setdefault("" if pair.question is None else pair.question.group, []).append(index)
        return {name: self._part(indices) for name, indices in found.items() if len(found) > 1}

    def _part(self, indices: Sequence[int]) -> "Comparison":
        places = {index: place for place, index in enumerate(indices)}
        divergences = [
            replace(found, call=places[found.call])
            for found in self.divergences
            if found.call in places
        ]
        return replace(
            self, pairs=[self.pairs[index] for index in indices], divergences=divergences
        )


def compare(
    plain: Decoder,
    methods: Sequence[Decoder],
    tasks: Sequence[Task],
    *,
    base: PreTrainedModel,
    num_warmup: int = 1,
    max_seconds: float | None = None,
    on_pair: Callable[[Pair], object] | None = None,
) -> list[Comparison]:
    """Run every task by regular generation and by all methods, and check the outputs.

    The order rotates from task to task, so that no run always comes first. Before the first pair,
    every method forgets what earlier calls taught it, so that it knows no answer beforehand. In a
    question of several turns, each run continues its own answers.

    Args:
        plain: Regular generation.
        methods: The methods to measure.
        tasks: What is generated; each gives one pair per method, or one for each turn.
        base: The model, which explains divergences.
        num_warmup: Number of tasks that are run once by all before anything is counted.
        max_seconds: No further task is begun after this time; None for all tasks.
        on_pair: Called with every pair, for example to show progress.

    Raises:
        MeasurementError: If there is no task.
    """
    if not tasks:
        raise MeasurementError("no prompts to measure on, expected at least one; pass more")
    everyone = [plain, *methods]
    for task in tasks[:num_warmup]:
        for decoder in everyone:
            task.answered_by(decoder)
    for decoder in everyone:
        decoder.forget()  # the answers of the warm-up, and of earlier measurements
    pairs: list[list[Pair]] = [[] for _ in methods]
    start = monotonic()
    for index, task in enumerate(tasks):
        if index > 0 and max_seconds is not None and monotonic() - start > max_seconds:
            break
        turn = index % len(everyone)
        order = [*range(turn, len(everyone)), *range(turn)]
        answers = {number: task.answered_by(everyone[number]) for number in order}
        for number, method in enumerate(methods, 1):
            for pair in _paired(answers[0], answers[number], method):
                pairs[number - 1].append(pair)
                if on_pair is not None:
                    on_pair(pair)
    return [
        Comparison(method.name, method.promises_identity, found, _divergences(base, method, found))
        for method, found in zip(methods, pairs, strict=True)
    ]


def _paired(plain: Sequence[Answer], other: Sequence[Answer], method: Decoder) -> list[Pair]:
    """Return the pairs of turns, up to the first that differs if the method promises identity."""
    found: list[Pair] = []
    for one, two in zip(plain, other, strict=False):
        found.append(Pair(one.outcome, two.outcome, one.call, one.question, one.turn))
        if method.promises_identity and not found[-1].is_identical:
            break
    return found


def _divergences(base: PreTrainedModel, method: Decoder, pairs: Sequence[Pair]) -> list[Divergence]:
    """Return where a method's outputs differ, if it promises that they do not."""
    if not method.promises_identity:
        return []
    return [
        found
        for index, pair in enumerate(pairs)
        if pair.call is not None
        for found in explain(
            base, pair.call, index=index, plain=pair.plain.tokens, other=pair.method.tokens
        )
    ]


def _rate(outcomes: Sequence[Outcome]) -> float:
    return sum(run.num_tokens for run in outcomes) / sum(run.seconds for run in outcomes)
