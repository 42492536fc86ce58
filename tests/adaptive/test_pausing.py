"""When to draft: simulated rounds on a clock of their own."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean

import pytest

from speclm.adaptive.memory import Memory
from speclm.adaptive.pausing import Pausing, ledger_of
from speclm.stats import SpeculationStats

PLAIN = 0.008  # seconds of a plain round


@dataclass
class Machine:
    """A machine on which rounds take known times, give or take noise and outliers.

    Args:
        cost: Of a speculative round, in plain rounds.
        acceptance: Probability that the next draft token of a path is right; may change over
            tokens.
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
    machine: Machine, memory: Memory, *, num_tokens: int, batch: int = 1, proposer: object = 0
) -> Call:
    """Decode rows of equal length, each as fast as its drafts are accepted."""
    stats = SpeculationStats()
    pausing = Pausing(
        memory,
        batch=batch,
        num_prompt_tokens=100,
        proposer=proposer,
        stats=stats,
        clock=machine.clock,
    )
    start, position, drafted = machine.now, [0] * batch, []
    while min(position) < num_tokens:
        drafts = pausing.wants_draft()
        live = [row for row in range(batch) if position[row] < num_tokens]
        fewest = min(position[row] for row in live)
        before = machine.now
        gains = [machine.round(drafts=drafts, position=position[row]) for row in live]
        machine.now = before + (machine.now - before) / len(live)  # rows share a forward
        drafted.append((min(position), drafts))
        gains = [
            min(gain, num_tokens - position[row]) for row, gain in zip(live, gains, strict=True)
        ]
        pairs = zip(live, gains, strict=True)
        tokens = fmean(gain for row, gain in pairs if position[row] == fewest)
        for row, gain in zip(live, gains, strict=True):
            position[row] += gain
        pausing.record(tokens=tokens, drafted=drafts)
        stats.rounds += 1
    pausing.finish(max(position))
    return Call(machine.now - start, drafted, stats)


def slowdown(machine: Machine, *, num_tokens: int, calls: int, batch: int = 1) -> float:
    """Return the time of many calls over that of regular generation, first call left out."""
    memory = Memory()
    decode(machine, memory, num_tokens=num_tokens, batch=batch)  # as benchmarks do
    mean_noise = 1.0 + machine.noise * math.sqrt(2 / math.pi)
    plain = machine.plain * mean_noise * (1.0 + 5.0 * machine.outliers)
    spent = sum(
        decode(machine, memory, num_tokens=num_tokens, batch=batch).seconds for _ in range(calls)
    )
    return spent / (calls * num_tokens * plain)


def always(probability: float) -> Callable[[int], float]:
    return lambda _: probability


def plain_positions(call: Call) -> list[int]:
    return [position for position, has_draft in call.drafted if not has_draft]


@pytest.mark.parametrize(
    ("num_tokens", "cost", "batch"), [(30, 1.1, 1), (30, 2.0, 4), (30, 5.0, 1), (130, 2.0, 1)]
)
def test_useless_drafts_cost_less_than_a_twenty_fifth(num_tokens, cost, batch):
    machine = Machine(cost=cost, acceptance=always(0.0))
    assert slowdown(machine, num_tokens=num_tokens, calls=20, batch=batch) < 1.04


@pytest.mark.parametrize("cost", [1.1, 1.4, 2.0, 2.4])
@pytest.mark.parametrize("batch", [1, 4])
def test_first_call_loses_less_than_a_twentieth(cost, batch):
    machine = Machine(cost=cost, acceptance=always(0.0), noise=0.0, outliers=0.0)
    call = decode(machine, Memory(), num_tokens=31, batch=batch)
    assert call.seconds < 1.05 * 31 * PLAIN


@pytest.mark.parametrize(
    ("cost", "acceptance", "batch"), [(1.2, 0.5, 1), (1.4, 0.6, 4), (1.8, 0.8, 1), (2.5, 0.9, 4)]
)
def test_good_drafts_lose_less_than_a_twentieth(cost, acceptance, batch):
    num_tokens = 30
    machine, memory = Machine(cost=cost, acceptance=always(acceptance)), Memory()
    spent = sum(
        decode(machine, memory, num_tokens=num_tokens, batch=batch).seconds for _ in range(50)
    )
    always_drafting = Machine(cost=cost, acceptance=always(acceptance))
    least = 0.0
    for _ in range(50):
        memory = Memory()
        ledger = ledger_of(memory, None, batch=batch, context=100)
        ledger.to_measure, ledger.balance = 0, 12.0
        least += decode(
            always_drafting, memory, num_tokens=num_tokens, batch=batch, proposer=None
        ).seconds
    assert spent < 1.05 * least


def test_rows_that_take_turns_at_being_last_are_not_overrated():
    # A row gets 1.8 tokens for 1.6 plain rounds, but four rows are done with the slowest.
    machine = Machine(cost=1.6, acceptance=always(0.45))
    assert slowdown(machine, num_tokens=31, calls=40, batch=4) < 1.03


def rounds_with_draft(call: Call) -> int:
    return sum(has_draft for _, has_draft in call.drafted)


def test_plain_rounds_are_measured_once_for_many_calls():
    machine = Machine(cost=1.2, acceptance=always(0.55), noise=0.01, outliers=0.0)
    memory = Memory()
    calls = [decode(machine, memory, num_tokens=30) for _ in range(5)]
    assert [call.stats.num_plain_rounds for call in calls] == [2, 0, 0, 0, 0]
    assert [has_draft for _, has_draft in calls[0].drafted[:3]] == [False, False, True]


def test_an_old_plain_time_is_measured_again():
    machine = Machine(cost=1.2, acceptance=always(0.55), noise=0.01, outliers=0.0)
    call = decode(machine, Memory(), num_tokens=1000)
    assert 4 <= call.stats.num_plain_rounds <= 8


@pytest.mark.parametrize("seed", range(2))
def test_drafts_resume_once_text_becomes_predictable(seed):
    machine = Machine(
        cost=1.6,
        acceptance=lambda position: 0.9 if position >= 200 else 0.0,
        dice=random.Random(seed),
    )
    call = decode(machine, Memory(), num_tokens=700)
    before = [position for position in plain_positions(call) if position < 200]
    assert len(before) > 180
    late = [has_draft for position, has_draft in call.drafted if position >= 400]
    assert sum(late) > 0.9 * len(late), (len(before), sum(late), len(late))


def test_drafts_pause_once_text_becomes_unpredictable():
    machine = Machine(cost=1.6, acceptance=lambda position: 0.9 if position < 200 else 0.0)
    call = decode(machine, Memory(), num_tokens=400)
    late = [has_draft for position, has_draft in call.drafted if position >= 230]
    assert sum(late) < 0.15 * len(late)


def test_next_call_drafts_again_soon_after_useless_ones():
    memory = Memory()
    machine = Machine(cost=2.0, acceptance=always(0.0))
    for _ in range(20):
        decode(machine, memory, num_tokens=60)
    machine.acceptance = always(0.9)
    calls = [decode(machine, memory, num_tokens=100) for _ in range(3)]
    assert plain_positions(calls[-1]) == []


def test_another_proposer_starts_anew():
    memory = Memory()
    machine = Machine(cost=2.0, acceptance=always(0.0))
    decode(machine, memory, num_tokens=30, proposer="a")
    machine.acceptance = always(0.9)
    call = decode(machine, memory, num_tokens=30, proposer="b")
    assert [has_draft for _, has_draft in call.drafted[:4]] == [False, False, True, True]


def run_rounds(
    pausing: Pausing, number: int, *, drafted: float, plain: float = 1.0, tokens: float = 1.0
) -> list[bool]:
    """Run rounds that take exactly so long; return which had a draft."""
    had_draft = []
    for _ in range(number):
        had_draft.append(pausing.wants_draft())
        pausing.record(
            tokens=tokens if had_draft[-1] else 1.0,
            drafted=had_draft[-1],
            seconds=drafted if had_draft[-1] else plain,
        )
    return had_draft


@pytest.mark.parametrize(
    "other", [{"setting": "greedy"}, {"batch": 2}, {"num_prompt_tokens": 900}], ids=str
)
def test_settings_batch_sizes_and_long_contexts_are_judged_separately(other):
    memory, usual = Memory(), {"setting": "sampled", "batch": 1, "num_prompt_tokens": 100}
    run_rounds(Pausing(memory, **usual), 30, drafted=3.0)
    near = usual | {"num_prompt_tokens": 400}
    assert run_rounds(Pausing(memory, **near), 3, drafted=3.0) == [False] * 3
    had_draft = run_rounds(Pausing(memory, **(usual | other)), 90, drafted=3.0)
    assert had_draft[:2] == [False] * 2
    assert any(had_draft)


def test_long_prompts_do_not_lose_what_short_ones_gain():
    memory = Memory()
    for num_prompt_tokens, drafted, tokens in ((50, 1.5, 4.0), (900, 2.0, 1.0)) * 4:
        pausing = Pausing(memory, batch=1, num_prompt_tokens=num_prompt_tokens)
        had_draft = run_rounds(pausing, 60, drafted=drafted, tokens=tokens)
    assert sum(had_draft) <= 2


def test_call_goes_on_in_the_ledger_of_a_longer_context_as_before():
    pausing = Pausing(Memory(), batch=4, num_prompt_tokens=300)
    had_draft = run_rounds(pausing, 150, drafted=1.5, tokens=4.0)
    first = had_draft.index(True)
    assert 4 * sum(had_draft[first:]) > 300  # the context grew beyond 512 and did not stop drafts
    assert all(had_draft[first:])


def test_first_draft_of_a_batch_waits_until_a_short_call_has_ended():
    memory = Memory()
    had_draft = run_rounds(Pausing(memory, batch=4, num_prompt_tokens=0), 31, drafted=4.0)
    assert had_draft == [False] * 31
    assert any(run_rounds(Pausing(memory, batch=4, num_prompt_tokens=0), 31, drafted=4.0))


def test_rounds_of_the_useless_in_order():
    stats = SpeculationStats()
    pausing = Pausing(Memory(), batch=1, num_prompt_tokens=0, stats=stats)
    drafted = run_rounds(pausing, 130, drafted=0.0015, plain=0.001)
    text = "".join("s" if has_draft else "." for has_draft in drafted)
    # Two to compare with, then a balance of half a plain round is lost. Each later draft waits
    # for it to be refilled: first by an eightieth a round, then more slowly.
    assert text.startswith("..s" + "." * 40 + "s" + "." * 81 + "s.")
    assert [pause.round for pause in stats.pauses] == [3, 44, 126]
    assert stats.pauses[0].reason == "round of 1.5 ms for 1.0 tokens, plain 1.0 ms"
    assert stats.num_plain_rounds == text.count(".")


def test_every_round_has_its_own_time():
    now = [0.0]
    memory = Memory()
    pausing = Pausing(memory, batch=1, num_prompt_tokens=0, clock=lambda: now[0])
    ledger_of(memory, None, batch=1, context=0).to_measure = 0
    for seconds, drafted in [(10.0, True), (10.0, True), (10.0, True), (1.0, False)]:
        assert pausing.wants_draft()  # asked in every round, whoever decides
        now[0] += seconds
        pausing.record(tokens=1, drafted=drafted)
    assert list(ledger_of(memory, None, batch=1, context=0).plain_times) == [1.0]


def test_clock_that_stands_still_leaves_drafts_on():
    machine = Machine(cost=0.0, plain=0.0, acceptance=always(0.0))
    call = decode(machine, Memory(), num_tokens=1000)
    assert rounds_with_draft(call) > 0.3 * len(call.drafted)
    assert call.stats.pauses == []


@pytest.mark.parametrize("jump", [-3600.0, 3600.0, math.inf, math.nan])
@pytest.mark.parametrize("at", [2, 5, 40])
def test_clock_that_jumps_does_not_end_drafts(jump, at):
    machine = Machine(cost=1.2, acceptance=always(0.8), noise=0.0, outliers=0.0)
    jumps = {"left": at}

    def clock() -> float:
        jumps["left"] -= 1
        if jumps["left"] == 0:
            return machine.now + jump  # one reading; the next is right again
        return machine.now

    pausing = Pausing(Memory(), batch=1, num_prompt_tokens=0, clock=clock)
    drafted = []
    for position in range(150):
        drafted.append(pausing.wants_draft())
        tokens = machine.round(drafts=drafted[-1], position=position)
        pausing.record(tokens=tokens, drafted=drafted[-1])
    assert sum(drafted) > 0.9 * len(drafted)


def test_reading_the_prompt_counts_once_two_calls_have_shown_it():
    memory, drafted = Memory(), []
    for _ in range(12):
        pausing = Pausing(memory, batch=1, num_prompt_tokens=0)
        for index in range(6):  # a draft gives 4 tokens for 2 plain rounds, after 30 of reading
            drafted.append(pausing.wants_draft())
            seconds = (32.0 if index == 0 or not drafted[-2] else 2.0) if drafted[-1] else 1.0
            pausing.record(tokens=4 if drafted[-1] else 1, drafted=drafted[-1], seconds=seconds)
    assert all(drafted[2:6])
    assert sum(drafted[-36:]) < 6


def test_draft_that_the_prompt_verified_counts_with_its_time():
    memory = Memory()
    run_rounds(Pausing(memory, batch=1, num_prompt_tokens=0), 6, drafted=1.5, tokens=2.0)
    for seconds, expected in [(0.5, True), (9.0, False)]:
        for _ in range(2):  # once may be bad luck
            pausing = Pausing(memory, batch=1, num_prompt_tokens=0)
            pausing.record_prefill(tokens=1, seconds=seconds)
        assert pausing.wants_draft() is expected


def test_calls_that_ended_before_their_first_draft_leave_nothing_undefined():
    memory, stats = Memory(), SpeculationStats()
    run_rounds(Pausing(memory, batch=1, num_prompt_tokens=0, stats=stats), 2, drafted=1.0)
    for _ in range(3):
        pausing = Pausing(memory, batch=1, num_prompt_tokens=0, stats=stats)
        pausing.record_prefill(tokens=1, seconds=50.0)
        pausing.record(tokens=1, drafted=False, seconds=1.0)
    assert not pausing.wants_draft()
    assert stats.pauses == []


def test_machine_that_becomes_slower_interrupts_drafts_only_briefly():
    machine = Machine(cost=1.3, acceptance=always(0.7), outliers=0.0)
    memory = Memory()
    decode(machine, memory, num_tokens=100)
    machine.plain *= 3.0
    call = decode(machine, memory, num_tokens=100)
    assert len(plain_positions(call)) <= 4


def test_catching_up_once_does_not_count_against_the_proposer():
    pausing = Pausing(Memory(), batch=1, num_prompt_tokens=0)
    run_rounds(pausing, 8, drafted=1.8)
    while not pausing.wants_draft():
        pausing.record(tokens=1, drafted=False, seconds=1.0)
    pausing.record(tokens=4, drafted=True, seconds=3.0)  # it reads what it missed
    assert pausing.wants_draft()


def test_settings_that_are_never_seen_again_are_forgotten():
    memory = Memory()
    run_rounds(Pausing(memory, batch=1, num_prompt_tokens=0, setting=-1), 30, drafted=2.0)
    for setting in range(200):
        Pausing(memory, batch=1, num_prompt_tokens=0, setting=setting)
    assert ledger_of(memory, -1, batch=1, context=0).to_measure == 2
