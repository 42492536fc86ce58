import dataclasses

import pytest

from speclm.config import (
    MAX_DEPTH,
    MAX_LEAD,
    MAX_NODES,
    ProposerConfig,
    require_depth,
    require_in_range,
)
from speclm.errors import OptionError, TreeBudgetError


def test_round_does_not_get_further_ahead_than_noise_is_kept():
    assert MAX_DEPTH <= MAX_LEAD < MAX_NODES


@pytest.mark.parametrize("depth", [1, MAX_DEPTH])
def test_depths_at_the_bounds_are_allowed(depth):
    assert ProposerConfig(depth=depth).depth == depth


@pytest.mark.parametrize("depth", [0, -1, MAX_DEPTH + 1])
def test_depth_beyond_the_bounds_is_refused(depth):
    with pytest.raises(TreeBudgetError, match=f"depth is {depth}, .*1 to {MAX_DEPTH}.*lower depth"):
        ProposerConfig(depth=depth)
    with pytest.raises(TreeBudgetError, match="levels is"):
        require_depth("levels", depth)


@pytest.mark.parametrize("value", [0, 1, 0.5])
def test_values_in_range_pass(value):
    require_in_range("share", value, low=0, high=1)


@pytest.mark.parametrize("value", [-1, 1.5, float("nan")])
def test_value_out_of_range_is_named_with_its_range(value):
    with pytest.raises(OptionError, match=f"share is {value!r}, expected 0 to 1"):
        require_in_range("share", value, low=0, high=1)


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ProposerConfig().depth = 3
