import math

import pytest
import torch

from speclm.adaptive.memory import Memory
from speclm.adaptive.planner import Estimate
from speclm.adaptive.tuner import TreeTuner, _Line, describe_tree
from speclm.drafting.interface import Draft
from speclm.tree.plan import TreePlan
from speclm.tree.topology import chain

MAX_DEPTH = 8


class Simulation:
    """Rounds of a proposer of chains, with times of its own.

    A token is right with `probability`; the proposer knows. A round takes `level` seconds for each
    level, and what `forward` says for the nodes.
    """

    def __init__(
        self, *, probability, level, forward, batch=1, has_probabilities=True, seed=0, memory=None
    ):
        self.probability, self.level, self.forward = probability, level, forward
        self.batch, self.has_probabilities = batch, has_probabilities
        self.memory = memory or Memory()
        self.generator = torch.Generator().manual_seed(seed)
        self.plans = []
        self.num_explored = 0
        self.seconds = self.tokens = 0.0
        self.begin()

    def begin(self):
        self.tuner = TreeTuner(
            self.memory, batch=self.batch, num_prompt_tokens=10, max_depth=MAX_DEPTH
        )
        self.tuner.timings = tuple((size, self.forward(size)) for size in (1, 2, 5, 9, 17, 33))

    def run(self, num_rounds):
        for _ in range(num_rounds):
            plan = self.tuner.next_plan()
            self.plans.append(plan)
            self.num_explored += self.tuner.is_exploring
            self.round(TreePlan(5, 5, min_confidence=0.2) if plan is None else plan)

    def round(self, plan):
        confidence = plan.min_confidence or 0.0
        depth = min(plan.depth, plan.num_draft_tokens)
        if self.has_probabilities and confidence > 0 and self.probability < 1:
            depth = min(depth, 1 + int(math.log(confidence) / math.log(self.probability)))
        paths = []
        for _ in range(self.batch):
            path = [0]
            while len(path) <= depth and self.draw() < self.probability:
                path.append(len(path))
            paths.append(path)
        probs = None
        if self.has_probabilities:
            probs = [[self.probability] * (depth + 1)] * self.batch
        tokens = torch.zeros(self.batch, depth + 1, dtype=torch.long)
        seconds = {
            "draft": 0.1 + self.level * depth,
            "verify": self.forward(depth + 1),
            "accept": 0.1,
            "commit": 0.0,
        }
        self.seconds += sum(seconds.values())
        self.tokens += sum(map(len, paths)) / self.batch
        self.tuner.record(
            Draft(tokens, chain(depth), probs), paths, is_whole=[True] * self.batch, seconds=seconds
        )

    def draw(self):
        return float(torch.rand((), generator=self.generator))


def best_depth(probability, level, forward):
    """Return the depth of most tokens a second, by the distributions of the simulation."""

    def rate(depth):
        tau = sum(probability**length for length in range(depth + 1))
        return tau / (0.2 + level * depth + forward(depth + 1))

    return max(range(1, MAX_DEPTH + 1), key=rate)


def test_the_first_rounds_are_the_proposers_own_and_explored_ones_in_turn():
    simulation = Simulation(probability=0.7, level=0.1, forward=lambda size: 1.0)

    simulation.run(6)

    own, explored = simulation.plans[::2], simulation.plans[1::2]
    assert own == [None] * 3
    assert all(plan.depth == MAX_DEPTH and plan.min_probability < 0.05 for plan in explored)
    assert simulation.tuner.best is None


@pytest.mark.parametrize("has_probabilities", [True, False])
@pytest.mark.parametrize(
    ("probability", "level", "slope"), [(0.9, 0.02, 0.02), (0.8, 0.2, 0.05), (0.5, 0.3, 0.2)]
)
def test_the_plan_comes_close_to_the_best_one(probability, level, slope, has_probabilities):
    def forward(size):
        return 1.0 + slope * size

    simulation = Simulation(
        probability=probability,
        level=level,
        forward=forward,
        has_probabilities=has_probabilities,
        batch=4,
    )
    simulation.run(60)

    def rate(depth):
        tau = sum(probability**length for length in range(depth + 1))
        return tau / (0.2 + level * depth + forward(depth + 1))

    plan = simulation.tuner.best.plan
    depth = min(plan.depth, plan.num_draft_tokens)
    if has_probabilities and plan.min_confidence > 0:
        depth = min(depth, 1 + int(math.log(plan.min_confidence) / math.log(probability)))
    assert rate(depth) >= 0.95 * rate(best_depth(probability, level, forward))


def test_exploring_costs_little_once_enough_is_known():
    simulation = Simulation(probability=0.5, level=0.3, forward=lambda size: 1.0 + 0.2 * size)
    simulation.run(200)
    simulation.seconds = simulation.tokens = 0.0

    simulation.run(400)
    rate = simulation.tokens / simulation.seconds

    ideal = best_depth(0.5, 0.3, lambda size: 1.0 + 0.2 * size)
    best = sum(0.5**n for n in range(ideal + 1)) / (1.4 + 0.5 * ideal)
    assert rate > 0.88 * best


def test_what_was_learned_serves_the_next_calls_of_the_same_proposer():
    simulation = Simulation(probability=0.7, level=0.1, forward=lambda size: 1.0)
    simulation.run(60)
    best = simulation.tuner.best

    simulation.begin()
    assert simulation.tuner.best == best
    other = TreeTuner(
        simulation.memory, batch=1, num_prompt_tokens=10, max_depth=8, proposer="another"
    )
    assert other.best is None


def test_calls_of_other_sizes_learn_for_themselves():
    simulation = Simulation(probability=0.7, level=0.1, forward=lambda size: 1.0)
    simulation.run(60)
    tuner = simulation.tuner

    assert tuner.next_plan() is not None
    assert TreeTuner(simulation.memory, batch=4, num_prompt_tokens=9, max_depth=8).best is None
    assert TreeTuner(simulation.memory, batch=1, num_prompt_tokens=9000, max_depth=8).best is None
    assert TreeTuner(simulation.memory, batch=8, num_prompt_tokens=9, max_depth=8).timings is None


def test_rows_that_ended_or_wait_are_not_learned_from():
    memory = Memory(explores_always=True)
    tuner = TreeTuner(memory, batch=3, num_prompt_tokens=4, max_depth=4)
    tuner.next_plan()
    draft = Draft(torch.zeros(3, 3, dtype=torch.long), chain(2))
    seconds = dict.fromkeys(("draft", "verify", "accept", "commit"), 0.1)

    tuner.record(draft, [[0, 1], [0], []], is_whole=[True, False, False], seconds=seconds)

    ((row,),) = tuner.observed
    assert row.is_accepted == (True, False)


def test_a_tuner_that_always_explores_makes_no_plan_but_estimates():
    memory = Memory(explores_always=True)
    tuner = TreeTuner(memory, batch=1, num_prompt_tokens=4, max_depth=4)
    seconds = dict.fromkeys(("draft", "verify", "accept", "commit"), 0.1)
    draft = Draft(torch.zeros(1, 4, dtype=torch.long), chain(3), [[0.9] * 4])
    for _ in range(20):
        assert tuner.next_plan().depth == 4
        tuner.record(draft, [[0, 1, 2, 3]], is_whole=[True], seconds=seconds)

    assert tuner.best is None
    assert tuner.estimates()[2].tau == pytest.approx(3.9, abs=0.2)


def test_lines_are_fitted_and_never_fall():
    line = _Line()
    assert line.fit() == (0.0, 0.0)
    for size in (1, 2, 4):
        line.add(size, 0.5 + 0.25 * size)
    assert line.fit() == pytest.approx((0.5, 0.25))

    falling, same = _Line(), _Line()
    for size in (1, 4):
        falling.add(size, 2.0 - 0.25 * size)
        same.add(3, 1.0)
    assert falling.fit()[1] == 0.0
    assert same.fit() == (1.0, 0.0)  # one size tells nothing of another


def test_plans_are_described_in_a_few_words():
    assert describe_tree(None) == ""
    assert describe_tree(TreePlan.of(((0,), (0, 0)))) == "static tree of 2 nodes on 2 levels"
    assert describe_tree(TreePlan(3, 5)) == "up to 5 nodes on 3 levels"
    plan = TreePlan(3, 5, min_probability=0.1, min_confidence=0.2)
    assert describe_tree(Estimate(plan, 2.0, 1.0)).endswith("probability of 0.10, levels from 0.20")
