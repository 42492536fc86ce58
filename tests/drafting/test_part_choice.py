from collections import Counter

from speclm.drafting.part_choice import PartChoice


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run(
    choice: PartChoice, clock: Clock, seconds, num_rounds: int, tokens=(2.0, 2.0, 2.0)
) -> list[int]:
    """Return the choices of some rounds, each of which takes the seconds of its choice."""
    chosen = []
    for _ in range(num_rounds):
        chosen.append(choice.next())
        clock.now += seconds[chosen[-1]]
        choice.record(tokens[chosen[-1]])
    return chosen


def test_every_choice_is_tried_and_then_the_fastest_is_used():
    clock = Clock()
    choice = PartChoice(3, clock)
    chosen = run(choice, clock, (3.0, 1.0, 2.0), 1000)
    assert set(chosen[:48]) == {0, 1, 2}
    assert Counter(chosen)[1] > 900


def test_more_tokens_count_as_much_as_less_time():
    clock = Clock()
    choice = PartChoice(3, clock)
    assert Counter(run(choice, clock, (3.0, 1.0, 2.0), 1000, tokens=(9.0, 2.0, 2.0)))[0] > 900


def test_another_choice_is_used_once_it_is_faster():
    clock = Clock()
    choice = PartChoice(2, clock)
    run(choice, clock, (1.0, 2.0), 300)
    assert Counter(run(choice, clock, (4.0, 2.0), 900))[1] > 600


def test_slow_first_round_of_a_choice_does_not_count():
    clock = Clock()
    choice, chosen = PartChoice(2, clock), []
    for _ in range(600):
        chosen.append(choice.next())
        has_changed = len(chosen) > 1 and chosen[-1] != chosen[-2]
        clock.now += (1.0 if chosen[-1] else 2.0) + 50 * has_changed
        choice.record(2.0)
    assert Counter(chosen)[1] > 450


def test_settings_are_learned_apart_and_can_be_forgotten():
    clock = Clock()
    choice = PartChoice(2, clock)
    choice.begin("greedy")
    run(choice, clock, (2.0, 1.0), 60)
    choice.begin("sampled")
    run(choice, clock, (1.0, 2.0), 60)
    assert choice.next() == 0
    choice.begin("greedy")
    assert choice.next() == 1
    choice.forget()
    assert choice.next() == 0


def test_rounds_without_a_draft_and_single_choices_change_nothing():
    clock = Clock()
    choice = PartChoice(1, clock)
    choice.record(1.0)
    assert set(run(choice, clock, (1.0,), 50, tokens=(1.0,))) == {0}
