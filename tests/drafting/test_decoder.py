import math
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from speclm.drafting.decoder import (
    first_number,
    make_rotary,
    read_rope,
    require_activation,
    require_rope,
    rope_theta,
    unscaled_rope,
)
from speclm.drafting.decoder_parts import rotated, signed
from speclm.errors import OptionError


def config_of(rope, *, head_dim=4):
    return SimpleNamespace(rope_parameters=rope, head_dim=head_dim, max_position_embeddings=16)


def test_rotation_that_is_no_dict_is_refused():
    with pytest.raises(OptionError, match=r"the rotation is \[2\], expected a dict"):
        read_rope({"rope_scaling": [2]})


def test_rotation_is_read_from_old_and_new_configs():
    assert read_rope({}) == unscaled_rope()
    assert read_rope({"rope_theta": 5.0}) == unscaled_rope(5.0)
    old = {"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert read_rope(old) == {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}
    assert rope_theta(LlamaConfig(rope_parameters=unscaled_rope(6.0))) == 6.0


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"rope_theta": 1.0}, r"rope_type is None, expected one of"),
        ({"rope_type": "default"}, r"rope_theta is None"),
        ({"rope_type": "linear", "rope_theta": 1.0}, r"type 'linear' name no 'factor'.*add it"),
        (unscaled_rope() | {"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0.5"),
        (unscaled_rope() | {"factor": math.inf}, r"factor of rope_parameters is inf"),
        (
            {"rope_type": "linear", "rope_theta": 1.0, "factor": 0.0},
            r"give frequencies that are not finite|cannot be computed with",
        ),
    ],
)
def test_rotations_that_cannot_be_computed_are_refused(rope, words):
    with pytest.raises(OptionError, match=words):
        require_rope(config_of(rope))


def test_pairs_cannot_be_rotated_in_a_head_of_odd_width():
    with pytest.raises(OptionError, match=r"head_dim is 3, expected an even number"):
        require_rope(config_of(unscaled_rope(), head_dim=3))


def test_pairs_turn_by_the_angle_of_their_position():
    rotary = make_rotary(config_of(unscaled_rope(100.0)))
    states = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(1, 1, 2, 4)
    found = rotated(states, signed(*rotary(states, torch.tensor([[0, 3]]))))[0, 0]
    angles = [3.0, 0.3]  # of pairs (0, 2) and (1, 3)
    turned = [*map(math.cos, angles), *map(math.sin, angles)]
    torch.testing.assert_close(found, torch.tensor([[1.0, 1.0, 0.0, 0.0], turned]))


@pytest.mark.parametrize("name", ["no", "prelu", None])
def test_activations_that_are_unknown_or_learned_are_refused(name):
    with pytest.raises(OptionError, match=rf"hidden_act is {name!r}, expected an activation"):
        require_activation(name)


def test_first_number_skips_what_a_config_lacks():
    config = GPT2Config(n_inner=None, n_embd=12)
    assert first_number(config, "n_inner", "missing", "n_embd") == 12
    assert first_number(config, "missing") is None
