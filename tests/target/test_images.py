"""Which inputs of a prompt later forwards need, and where positions go on."""

import pytest
import torch
from transformers import DynamicCache

from speclm.cache import CACHE_NAME
from speclm.target import images_obstacle, position_shift
from tests.models import build_model, shared_model
from tests.multimodal import shared_wrapper

TOKENS = torch.tensor([[5, 6, 7]])
POSITIONS = torch.tensor([[0, 1, 2]])


def obstacle(images, *, dropped=(), first=0, position_ids=POSITIONS):
    """Ask about a model that drops inputs from its steps, and counts positions from `first`."""

    def prepare(tokens, *, is_first_iteration, **inputs):
        assert not is_first_iteration
        assert tokens.tolist() == [[7]]
        if inputs.get("position_ids") is not None:
            inputs["position_ids"] = inputs["position_ids"][..., -1:] + first
        return {name: value for name, value in inputs.items() if name not in dropped}

    model = build_model("llama")
    model.prepare_inputs_for_generation = prepare
    inputs = {"position_ids": position_ids, "use_cache": True, **images}
    return images_obstacle(model, TOKENS, inputs, images)


def test_inputs_that_a_step_is_not_given_are_for_the_prompt_alone():
    pixels = {"pixels": 1}
    assert obstacle(pixels, dropped=("pixels",)) is None
    assert obstacle(pixels, dropped=("pixels",), position_ids=None) is None
    assert obstacle(pixels) == "model input 'pixels'"


def test_places_of_images_are_read_for_positions_alone():
    assert obstacle({"image_grid_thw": 1}) is None
    assert "counts positions itself" in obstacle({"image_grid_thw": 1}, position_ids=None)


def test_model_that_moves_positions_is_told_apart():
    found = obstacle({"pixels": 1}, dropped=("pixels",), first=1)
    assert found == "model input 'pixels', after which the model counts positions itself"


def test_real_models_are_asked_in_their_own_words():
    kinds = {"token_type_ids": torch.zeros_like(TOKENS)}
    inputs = {"position_ids": POSITIONS, CACHE_NAME: DynamicCache(), "use_cache": True}
    found = images_obstacle(shared_model("llama"), TOKENS, {**inputs, **kinds}, kinds)
    assert found == "model input 'token_type_ids'"
    assert images_obstacle(shared_wrapper("gemma3"), TOKENS, {**inputs, **kinds}, kinds) is None


@pytest.mark.parametrize("position_ids", [None, POSITIONS, POSITIONS.expand(4, 1, 3)])
def test_usual_positions_are_not_shifted(position_ids):
    assert position_shift(position_ids, torch.tensor([0]), num_tokens=3) is None


def test_shift_is_that_of_the_last_position_behind_padding_and_cached_slots():
    shift = position_shift(POSITIONS.expand(2, 3), torch.tensor([0, 1]), num_tokens=5)
    assert shift.tolist() == [-2, -1]
    axes = torch.stack([POSITIONS, POSITIONS - 1])
    assert position_shift(axes, torch.tensor([0]), num_tokens=3).tolist() == [[0], [-1]]
