"""When to speculate: simulated rounds on a clock of their own."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from speclm.generation.pace import Pace, PaceMemory
from speclm.stats import SpeculationStats

PLAIN = 0.008  # seconds of a plain round


@dataclass
class Machine:
    """A machine on which rounds take known times, give or take noise and outliers.

    Args:
        cost: Of a speculative round, in plain rounds.
        acceptance: Chance that the next draft token of a path is right; may change over tokens.
        depth: Draft tokens on a path.
        noise: Relative spread of times.
        outliers: Share of rounds that take several times as long.
    """

    cost: float
    acceptance: Callable[[int], float]
    depth: int = 4
    noise: float = 0.05
    outliers: float = 0.01
    plain: float = PLAIN
    now: float = 0.0
    dice: random.Random = field(default_factory=lambda: random.Random(0))

    def clock(self) -> float:
        return self.now

    def round(self, *, drafts: bool, position: int) -> int:
        """Pass the time of a round of one row; return its tokens."""
        seconds = self.plain * (self.cost if drafts else 1.0)
        seconds *= 1.0 + abs(self.dice.gauss(0.0, self.noise))
        if self.dice.random() < self.outliers:
            seconds *= self.dice.uniform(2.0, 10.0)
        self.now += seconds
        tokens = 1
        while drafts and tokens <= self.depth and self.dice.random() < self.acceptance(position):
            tokens += 1
        return tokens


@dataclass
class Call:
    """What a simulated call did."""

    seconds: float
    drafted: list[tuple[int, bool]]  # position of each round, and whether it had a draft
    stats: SpeculationStats


def decode(
    machine: Machine, memory: PaceMemory, *, num_tokens: int, batch: int = 1, proposer: object = 0
) -> Call:
    """Decode rows of equal length, which end with the same round as in a lockstep."""
    stats = SpeculationStats()
    pace = Pace(
        memory,
        batch=batch,
        num_prompt_tokens=100,
        proposer=proposer,
        stats=stats,
        clock=machine.clock,
    )
    start, position, drafted = machine.now, [0] * batch, []
    while min(position) < num_tokens:
        drafts = pace.wants_draft()
        live = [row for row in range(batch) if position[row] < num_tokens]
        before = machine.now
        gains = [machine.round(drafts=drafts, position=position[row]) for row in live]
        machine.now = before + (machine.now - before) / len(live)  # rows share a forward
        drafted.append((min(position), drafts))
        for row, gain in zip(live, gains, strict=True):
            position[row] += gain
        pace.record(tokens=sum(gains), drafted=drafts, num_live=len(live))
        stats.rounds += 1
    return Call(machine.now - start, drafted, stats)


def slowdown(machine: Machine, *, num_tokens: int, calls: int, batch: int = 1) -> float:
    """Return the time of many calls over that of plain decoding, first call left out."""
    memory = PaceMemory()
    decode(machine, memory, num_tokens=num_tokens, batch=batch)  # as benchmarks do
    mean_noise = 1.0 + machine.noise * math.sqrt(2 / math.pi)
    plain = machine.plain * mean_noise * (1.0 + 5.0 * machine.outliers)
    spent = sum(
        decode(machine, memory, num_tokens=num_tokens, batch=batch).seconds for _ in range(calls)
    )
    return spent / (calls * num_tokens * plain)


def always(chance: float) -> Callable[[int], float]:
    return lambda _: chance


def plain_positions(call: Call) -> list[int]:
    return [position for position, has_draft in call.drafted if not has_draft]


@pytest.mark.parametrize("num_tokens", [30, 130])
@pytest.mark.parametrize("cost", [1.1, 1.6, 2.0, 5.0])
@pytest.mark.parametrize("batch", [1, 4])
def test_useless_drafts_cost_less_than_a_tenth(num_tokens, cost, batch):
    machine = Machine(cost=cost, acceptance=always(0.0))
    assert slowdown(machine, num_tokens=num_tokens, calls=40, batch=batch) < 1.08


@pytest.mark.parametrize("num_tokens", [30, 130])
@pytest.mark.parametrize(
    ("cost", "acceptance"), [(1.2, 0.5), (1.4, 0.6), (1.5, 0.7), (1.8, 0.8), (2.5, 0.9)]
)
@pytest.mark.parametrize("batch", [1, 4])
def test_good_drafts_lose_less_than_a_fiftieth(num_tokens, cost, acceptance, batch):
    machine = Machine(cost=cost, acceptance=always(acceptance))
    memory, drafts, rounds = PaceMemory(), 0, 0
    for _ in range(80):
        call = decode(machine, memory, num_tokens=num_tokens, batch=batch)
        rounds += len(call.drafted)
        drafts += rounds_with_draft(call)
    tau = sum(acceptance**depth for depth in range(machine.depth + 1))
    assert (1 - drafts / rounds) * (1 - cost / tau) < 0.02


def rounds_with_draft(call: Call) -> int:
    return sum(has_draft for _, has_draft in call.drafted)


def test_what_obviously_pays_is_not_interrupted_in_a_short_call():
    machine = Machine(cost=1.3, acceptance=always(0.95), outliers=0.0)
    call = decode(machine, PaceMemory(), num_tokens=100)
    assert plain_positions(call) == []
    assert call.stats.num_plain_rounds == 0
    assert call.stats.pauses == []


def test_plain_rounds_are_measured_once_for_many_calls():
    machine = Machine(cost=1.2, acceptance=always(0.55), noise=0.01, outliers=0.0)
    memory = PaceMemory()
    calls = [decode(machine, memory, num_tokens=30) for _ in range(5)]
    assert [call.stats.num_plain_rounds for call in calls] == [2, 0, 0, 0, 0]


def test_an_old_plain_time_is_measured_again():
    machine = Machine(cost=1.2, acceptance=always(0.55), noise=0.01, outliers=0.0)
    call = decode(machine, PaceMemory(), num_tokens=1000)
    assert 4 <= call.stats.num_plain_rounds <= 8


@pytest.mark.parametrize("seed", range(5))
def test_speculation_resumes_once_text_becomes_predictable(seed):
    machine = Machine(
        cost=1.6,
        acceptance=lambda position: 0.9 if position >= 200 else 0.0,
        dice=random.Random(seed),
    )
    call = decode(machine, PaceMemory(), num_tokens=600)
    before = [position for position in plain_positions(call) if position < 200]
    assert len(before) > 160
    late = [has_draft for position, has_draft in call.drafted if position >= 300]
    assert sum(late) > 0.9 * len(late), (len(before), sum(late), len(late))


def test_speculation_pauses_once_text_becomes_unpredictable():
    machine = Machine(cost=1.6, acceptance=lambda position: 0.9 if position < 200 else 0.0)
    call = decode(machine, PaceMemory(), num_tokens=400)
    late = [has_draft for position, has_draft in call.drafted if position >= 225]
    assert sum(late) < 0.15 * len(late)


def test_next_call_speculates_again_soon_after_useless_ones():
    memory = PaceMemory()
    machine = Machine(cost=2.0, acceptance=always(0.0))
    for _ in range(20):
        decode(machine, memory, num_tokens=60)
    machine.acceptance = always(0.9)
    call = decode(machine, memory, num_tokens=200)
    assert max(plain_positions(call), default=0) < 60


def test_another_proposer_starts_anew():
    memory = PaceMemory()
    machine = Machine(cost=2.0, acceptance=always(0.0))
    decode(machine, memory, num_tokens=30, proposer="a")
    machine.acceptance = always(0.9)
    call = decode(machine, memory, num_tokens=30, proposer="b")
    assert call.drafted[0] == (0, True)


def test_settings_are_told_apart():
    memory = PaceMemory()
    paused = Pace(memory, batch=1, num_prompt_tokens=0, setting="sampled")
    run_rounds(paused, 30, speculative=2.0)
    assert not paused.wants_draft()
    assert Pace(memory, batch=1, num_prompt_tokens=0, setting="greedy").wants_draft()
    assert not Pace(memory, batch=1, num_prompt_tokens=0, setting="sampled").wants_draft()


def run_rounds(
    pace: Pace, number: int, *, speculative: float, plain: float = 1.0, num_live: int = 1
) -> list[bool]:
    """Run rounds of one token a row that take exactly so long; return which had a draft."""
    drafted = []
    for _ in range(number):
        drafted.append(pace.wants_draft())
        pace.record(
            tokens=num_live,
            drafted=drafted[-1],
            num_live=num_live,
            seconds=speculative if drafted[-1] else plain,
        )
    return drafted


def test_rounds_of_the_useless_in_order():
    stats = SpeculationStats()
    pace = Pace(PaceMemory(), batch=1, num_prompt_tokens=0, stats=stats)
    drafted = run_rounds(pace, 90, speculative=0.002, plain=0.001)
    text = "".join("s" if has_draft else "." for has_draft in drafted)
    # One round that is not timed, three timed ones, two plain ones to compare with, and five more
    # until eight plain rounds are lost.
    assert text.startswith("ssss..sssss" + "." * 24 + "ss" + "." * 48 + "ss" + ".")
    assert [pause.round for pause in stats.pauses] == [11, 37, 87]
    assert stats.pauses[0].reason == "round of 2.0 ms for 1.0 tokens, plain 1.0 ms"
    assert stats.num_plain_rounds == text.count(".")


def test_rows_that_end_are_judged_on_their_own():
    memory = PaceMemory()
    pace = Pace(memory, batch=4, num_prompt_tokens=0)
    run_rounds(pace, 30, speculative=2.0, num_live=4)
    assert not pace.wants_draft()
    pace.record(tokens=1, drafted=False, num_live=1, seconds=1.0)
    assert pace.wants_draft()  # a single row may well pay
    assert not Pace(memory, batch=3, num_prompt_tokens=0).wants_draft()  # as four rows did not


def test_tokens_are_a_mean_over_rows():
    pace = Pace(PaceMemory(), batch=4, num_prompt_tokens=0)
    for _ in range(100):  # twice the time, for two tokens a row
        drafted = pace.wants_draft()
        pace.record(tokens=9 if drafted else 4, drafted=drafted, num_live=4, seconds=1.0 + drafted)
    assert pace.wants_draft()


def test_long_contexts_are_judged_on_their_own():
    memory = PaceMemory()
    run_rounds(Pace(memory, batch=1, num_prompt_tokens=100), 30, speculative=2.0)
    assert not Pace(memory, batch=1, num_prompt_tokens=1000).wants_draft()
    assert Pace(memory, batch=1, num_prompt_tokens=5000).wants_draft()


def test_clock_that_stands_still_leaves_speculation_on():
    machine = Machine(cost=0.0, plain=0.0, acceptance=always(0.0))
    call = decode(machine, PaceMemory(), num_tokens=1000)
    assert rounds_with_draft(call) > 0.3 * len(call.drafted)
    assert call.stats.pauses == []


@pytest.mark.parametrize("jump", [-3600.0, 3600.0, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("at", [2, 5, 6, 40])
def test_clock_that_jumps_does_not_end_speculation(jump, at):
    machine = Machine(cost=1.2, acceptance=always(0.8), noise=0.0, outliers=0.0)
    jumps = {"left": at}

    def clock() -> float:
        jumps["left"] -= 1
        if jumps["left"] == 0:
            return machine.now + jump  # one reading; the next is right again
        return machine.now

    pace = Pace(PaceMemory(), batch=1, num_prompt_tokens=0, clock=clock)
    drafted = []
    for position in range(300):
        drafted.append(pace.wants_draft())
        pace.record(
            tokens=machine.round(drafts=drafted[-1], position=position),
            drafted=drafted[-1],
            num_live=1,
        )
    assert sum(drafted) > 0.9 * len(drafted)


def test_slow_first_round_of_a_call_says_nothing():
    memory = PaceMemory()
    for _ in range(20):
        pace = Pace(memory, batch=1, num_prompt_tokens=0)
        drafted = pace.wants_draft()
        pace.record(tokens=1, drafted=drafted, num_live=1, seconds=100.0)
        drafted = pace.wants_draft()
        pace.record(tokens=1 + drafted, drafted=drafted, num_live=1, seconds=1.0 + drafted / 2)
    assert Pace(memory, batch=1, num_prompt_tokens=0).wants_draft()


def test_machine_that_becomes_slower_interrupts_speculation_only_briefly():
    machine = Machine(cost=1.3, acceptance=always(0.7), outliers=0.0)
    memory = PaceMemory()
    decode(machine, memory, num_tokens=100)
    machine.plain *= 3.0
    call = decode(machine, memory, num_tokens=100)
    assert len(plain_positions(call)) <= 4


def test_catching_up_after_a_pause_does_not_count_against_the_proposer():
    pace = Pace(PaceMemory(), batch=1, num_prompt_tokens=0)
    run_rounds(pace, 8, speculative=1.8)
    while not pace.wants_draft():
        pace.record(tokens=1, drafted=False, num_live=1, seconds=1.0)
    pace.record(tokens=4, drafted=True, num_live=1, seconds=20.0)  # it reads what it missed
    assert pace.wants_draft()


def test_round_without_rows_is_nothing():
    pace = Pace(PaceMemory(), batch=1, num_prompt_tokens=0)
    pace.record(tokens=0, drafted=True, num_live=0, seconds=1.0)
    assert pace.wants_draft()


def test_settings_that_are_never_seen_again_are_forgotten():
    memory = PaceMemory()
    run_rounds(Pace(memory, batch=1, num_prompt_tokens=0, setting=-1), 30, speculative=2.0)
    for setting in range(100):
        Pace(memory, batch=1, num_prompt_tokens=0, setting=setting)
    assert Pace(memory, batch=1, num_prompt_tokens=0, setting=-1).wants_draft()
