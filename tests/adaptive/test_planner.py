from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speclm.adaptive.planner import (
    Estimate,
    ObservedRow,
    RoundCosts,
    estimates_by_size,
    fastest,
)

FLAT = RoundCosts(((1, 1.0), (65, 1.0)))
STEEP = RoundCosts(((1, 1.0), (65, 65.0)))
LIMITS = {"max_depth": 4, "max_nodes": 6}

# A chain with a sibling at every level, best first: node, sibling, next node...
CHAINS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), min_size=1, max_size=4)


def best_plan(rounds, costs, *, has_probabilities):
    estimates = estimates_by_size(rounds, costs, **LIMITS, has_probabilities=has_probabilities)
    return fastest(estimates)


def chain_row(accepted_length, *, length=4, probability=0.8):
    """Return a chain of which the first nodes were accepted."""
    depths = tuple(range(1, length + 1))
    probabilities = tuple(probability**depth for depth in depths)
    return ObservedRow(depths, probabilities, tuple(depth <= accepted_length for depth in depths))


def brute_force(rounds, costs, *, depth, size):
    """Return tokens a second of chains cut to a depth and a size, without thresholds."""
    rows = [row for rows in rounds for row in rows]
    taus, seconds = 0.0, 0.0
    for row in rows:
        nodes = [place for place, own in enumerate(row.depths) if own <= depth][:size]
        taus += 1 + sum(row.is_accepted[place] for place in nodes)
    for group in rounds:
        drafted = [min(sum(own <= depth for own in row.depths), size) for row in group]
        levels = sorted((min(max(row.depths) + 1, depth) for row in group), reverse=True)
        seconds += costs.round(max(drafted), float(levels[-(-len(group) // 2) - 1]))
    return (taus / len(rows)) / (seconds / len(rounds))


def test_nothing_observed_makes_no_plan():
    assert best_plan([], FLAT, has_probabilities=True) is None
    assert best_plan([[]], FLAT, has_probabilities=False) is None


@given(
    lengths=CHAINS,
    node=st.floats(0.0, 1.0),
    level=st.floats(0.0, 1.0),
    draft=st.floats(0.0, 2.0),
)
@settings(max_examples=30)
def test_the_choice_is_that_of_brute_force(lengths, node, level, draft):
    rounds = [[chain_row(length) for length in group] for group in lengths]
    costs = RoundCosts(((1, 1.0), (9, 1.0 + 8 * node)), draft=draft, level=level)

    found = best_plan(rounds, costs, has_probabilities=False)

    rates = {
        (depth, size): brute_force(rounds, costs, depth=depth, size=size)
        for depth in range(1, 5)
        for size in range(1, 7)
    }
    assert found.rate == pytest.approx(max(rates.values()))
    assert rates[found.plan.depth, found.plan.num_draft_tokens] == pytest.approx(found.rate)
    assert found.plan.min_probability is None
    assert found.plan.min_confidence is None


def test_free_nodes_are_all_taken_and_costly_ones_are_not():
    rounds = [[chain_row(length)] for length in (4, 4, 3, 4)]

    assert best_plan(rounds, FLAT, has_probabilities=False).plan.num_draft_tokens == 4
    assert best_plan(rounds, STEEP, has_probabilities=False).plan.num_draft_tokens == 1


@given(slow=st.floats(0.0, 0.5), more=st.floats(0.01, 1.0))
@settings(max_examples=15)
def test_costlier_levels_never_make_deeper_trees(slow, more):
    rounds = [[chain_row(length)] for length in (4, 1, 3, 4, 0, 2)]
    cheap = replace(FLAT, level=slow)

    depths = [
        best_plan(rounds, costs, has_probabilities=False).plan.depth
        for costs in (cheap, replace(cheap, level=slow + more))
    ]

    assert depths[1] <= depths[0]


def test_of_equal_plans_the_smallest_is_taken():
    rounds = [[chain_row(0)], [chain_row(0)]]

    plan = best_plan(rounds, FLAT, has_probabilities=False).plan

    assert (plan.depth, plan.num_draft_tokens) == (1, 1)


def test_thresholds_part_rounds_worth_a_large_tree_from_others():
    sure = ObservedRow((1, 2, 3), (0.9, 0.8, 0.7), (True, True, True))
    unsure = ObservedRow((1, 2, 3), (0.05, 0.04, 0.03), (False, False, False))
    rounds = [[sure], [unsure]] * 40
    costs = RoundCosts(((1, 1.0), (4, 2.0)), level=0.2)

    found = best_plan(rounds, costs, has_probabilities=True)

    assert found.plan.num_draft_tokens == 3
    assert 0.05 < found.plan.min_probability <= 0.7
    assert 0.05 < found.plan.min_confidence <= 0.8
    assert found.tau == pytest.approx(2.5, abs=0.1)
    assert found.seconds == pytest.approx(1.5 + 0.2 * 2, abs=0.01)  # 3 levels, and 1


def test_a_batch_pays_for_its_largest_row_and_drafts_as_deep_as_half_of_it():
    deep, flat = chain_row(4), ObservedRow((1,), (0.3,), (False,))
    rounds = [[deep, flat, flat]]

    largest = estimates_by_size(rounds, FLAT, **LIMITS, has_probabilities=False)[-1]
    single = estimates_by_size([[deep]], FLAT, **LIMITS, has_probabilities=False)[-1]

    assert largest.tau == pytest.approx(1 + 2 / 3)  # two levels of the deep row
    assert single.tau == 5.0


def test_plans_of_every_size_are_listed_and_tau_grows_with_it():
    rounds = [[chain_row(length)] for length in (4, 2, 3, 1)]

    found = estimates_by_size(rounds, FLAT, **LIMITS, has_probabilities=False)

    assert [one.plan.num_draft_tokens for one in found] == [1, 2, 3, 4, 5, 6]
    assert [one.tau for one in found] == pytest.approx([2.0, 2.75, 3.25, 3.5, 3.5, 3.5])


def test_a_few_rows_do_not_outweigh_the_probabilities_of_the_proposer():
    unlucky = [[ObservedRow((1,), (0.9,), (False,))]] * 2
    costs = RoundCosts(((1, 1.0), (2, 1.0)))

    few = best_plan(unlucky, costs, has_probabilities=True)
    many = best_plan(unlucky * 100, costs, has_probabilities=True)

    assert few.tau > 1.6
    assert many.tau < 1.1


def test_forwards_between_and_beyond_the_measured_sizes_are_estimated():
    costs = RoundCosts(((1, 2.0), (4, 5.0), (8, 7.0)))

    assert [costs.forward(size) for size in (1, 2, 4, 6, 8, 10)] == [2.0, 3.0, 5.0, 6.0, 7.0, 8.0]
    assert RoundCosts(((1, 2.0),)).forward(9) == 2.0
    assert replace(costs, draft=1.0, level=0.5, overhead=0.25, node=0.125).round(3, 2.0) == 7.625


def test_rows_are_observed_best_first_without_root_and_padding():
    row = ObservedRow.of([0, 1, 1, 2, 0], [1.0, 0.3, 0.6, 0.5, 0.0], [0, 2, 3])

    assert row == ObservedRow((1, 2, 1), (0.6, 0.5, 0.3), (True, True, False))
    assert ObservedRow.of([0, 1, 1], None, [0]) == ObservedRow((1, 1), (1.0, 1.0), (False, False))


def test_an_estimate_knows_its_rate():
    plan = best_plan([[chain_row(1)]], FLAT, has_probabilities=False).plan
    assert Estimate(plan, 3.0, 0.5).rate == 6.0
