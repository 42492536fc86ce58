"""A module that draws random numbers in evaluation mode is found."""

import torch

from speclm.self_check.drawing import first_draw
from speclm.target import TargetView
from tests.models import build_model, prompts, shared_model


def forward(view):
    with torch.no_grad():
        view.model(**prompts(4))


def test_module_whose_hook_draws_is_named_with_attention_before_it_that_does_not():
    model = build_model("llama")
    model.model.layers[1].mlp.register_forward_hook(lambda _, __, out: out + torch.rand(1))
    assert first_draw(TargetView(model), forward) == "module 'model.layers.1.mlp'"


def test_nothing_is_named_where_nothing_draws():
    assert first_draw(TargetView(shared_model("llama")), forward) is None


def test_code_that_fails_after_it_has_drawn_is_found():
    def fail(_):
        torch.rand(1)
        raise ZeroDivisionError

    assert first_draw(TargetView(shared_model("llama")), fail) == "the model"
