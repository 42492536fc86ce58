"""Plans of trees."""

import pytest

from speclm.errors import OptionError, TopologyError, TreeBudgetError
from speclm.tree.plan import TreePlan


def test_plan_of_paths_is_as_large_as_they_are():
    plan = TreePlan.of(((0,), (1,), (0, 0)))
    assert (plan.depth, plan.num_draft_tokens) == (2, 3)


@pytest.mark.parametrize(
    ("numbers", "error", "words"),
    [
        ({"depth": 0}, TreeBudgetError, "depth is 0"),
        ({"num_draft_tokens": 0}, OptionError, "num_draft_tokens is 0"),
        ({"min_probability": 2.0}, OptionError, "min_probability is 2.0"),
        ({"min_confidence": -0.5}, OptionError, "min_confidence is -0.5"),
        ({"paths": ((0,), (0, 0))}, OptionError, "2 levels"),
        ({"paths": ()}, TopologyError, "no paths"),
        ({"paths": ((0, 0),), "depth": 2}, TopologyError, "hangs in the air"),
        ({"paths": ((-1,),)}, TopologyError, "negative rank"),
        ({"paths": ((),)}, TopologyError, "empty"),
    ],
)
def test_plans_that_cannot_be_are_refused(numbers, error, words):
    with pytest.raises(error, match=words):
        TreePlan(**{"depth": 1, "num_draft_tokens": 4, **numbers})


def test_paths_of_a_plan_are_brought_in_order():
    plan = TreePlan(2, 3, paths=((0, 1), (0,), (0, 0)))

    assert plan == TreePlan.of(((0, 0), (0,), (0, 1)))
    assert plan.paths == ((0,), (0, 0), (0, 1))
    assert hash(plan) == hash(TreePlan.of(plan.paths))
    with pytest.raises(TopologyError, match="no paths"):
        TreePlan.of(())
