import dataclasses

import numpy as np
import pytest
import torch

from speclm.config import (
    MAX_DEPTH,
    MAX_LEAD,
    MAX_NODES,
    ProposerConfig,
    require_count,
    require_depth,
    require_in_range,
    require_positive,
    require_size,
    require_unicode,
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


@pytest.mark.parametrize("value", ["a", None, [1], True, 1j, torch.tensor(3)])
def test_option_that_is_no_number_is_named_with_its_type(value):
    words = rf"share is .*, a {type(value).__name__}, expected a number from 0 to 1"
    with pytest.raises(OptionError, match=words):
        require_in_range("share", value, low=0, high=1)
    with pytest.raises(OptionError, match=r"rate is .*, expected a finite number above 0"):
        require_positive("rate", value)


@pytest.mark.parametrize("value", [2.5, 2.0, "2", None, True, float("nan")])
def test_count_that_is_no_whole_number_is_named_with_its_type(value):
    words = rf"width is .*, a {type(value).__name__}, expected a whole number from 1 to 9"
    with pytest.raises(OptionError, match=words):
        require_count("width", value, low=1, high=9)
    with pytest.raises(OptionError, match=rf"whole number from 1 to {MAX_DEPTH}"):
        require_depth("depth", value)


@pytest.mark.parametrize("value", [0, 10, 10**400])
def test_count_out_of_range_is_named_with_its_range(value):
    with pytest.raises(OptionError, match=f"width is {value}, expected 1 to 9"):
        require_count("width", value, low=1, high=9)


@pytest.mark.parametrize("value", [0, -3, 2.5, "2", None, True, float("nan")])
def test_size_that_is_no_whole_number_of_at_least_1_is_refused(value):
    with pytest.raises(OptionError, match=r"hidden_size is .* expected .*1"):
        require_size("hidden_size", value)
    require_size("hidden_size", 1)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), -float("inf")])
def test_number_that_is_not_above_0_and_finite_is_refused(value):
    with pytest.raises(OptionError, match=f"rate is {value!r}, expected a finite number above 0"):
        require_positive("rate", value)


def test_numbers_of_numpy_are_numbers():
    require_in_range("share", np.float32(0.5), low=0, high=1)
    require_count("width", np.int64(3), low=1, high=9)
    require_positive("rate", np.float64(3))


def test_text_with_half_a_surrogate_pair_is_refused():
    require_unicode("prompt", "a好🙂\0")
    with pytest.raises(OptionError, match=r"prompt is no Unicode text: '\\ud800' at character 1"):
        require_unicode("prompt", "a\ud800")
