"""What is not Transformers' own is named, and what replaces the decoding loop is refused."""

import pytest
import torch
from transformers import LlamaForCausalLM

from speclm.self_check.fingerprint import changes, loop_obstacle
from speclm.target import TargetFeatures, TargetView
from tests.models import build_model, shared_model


def of_class(**methods):
    kind = type("Mine", (LlamaForCausalLM,), methods)
    return kind(shared_model("llama").config)


def test_model_of_transformers_has_no_changes():
    model = shared_model("llama")
    assert changes(model) == []
    assert loop_obstacle(model) is None


def own_prepare(self, *args, **kwargs):
    return LlamaForCausalLM.prepare_inputs_for_generation(self, *args, **kwargs)


def test_overridden_method_of_a_class_is_named():
    found = changes(of_class(prepare_inputs_for_generation=own_prepare))
    assert found[:2] == [
        "Mine overrides prepare_inputs_for_generation",
        "Mine is not of Transformers",
    ]


def method_of_the_object(model):
    model._update_model_kwargs_for_generation = lambda *_, **__: {}


def forward_of_a_layer(model):
    layer = model.model.layers[1]
    layer.forward = lambda *args, **kwargs: type(layer).forward(layer, *args, **kwargs)


def hook(model):
    model.model.layers[0].register_forward_hook(lambda *_: None)


def pre_hook(model):
    model.register_forward_pre_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (method_of_the_object, "_update_model_kwargs_for_generation of the model object"),
        (forward_of_a_layer, "forward of 'model.layers.1' is replaced"),
        (hook, "'model.layers.0' has a forward hook"),
        (pre_hook, "the model has a forward hook"),
    ],
)
def test_changed_object_is_named(change, words):
    model = build_model("llama")
    change(model)
    (found,) = changes(model)
    assert words in found


def test_hooks_that_read_features_are_no_change():
    view = TargetView(build_model("llama"))
    with view.decoding(TargetFeatures((0, -1))):
        assert changes(view.model) == []


def test_hooks_of_all_modules_and_patched_classes_are_named(monkeypatch):
    model = shared_model("llama")
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert changes(model) == ["all modules have a forward hook"]
    finally:
        handle.remove()
    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", lambda _, hidden: hidden)
    assert changes(model) == ["forward of LlamaMLP is replaced"]


@pytest.mark.parametrize("name", ["_sample", "_has_unfinished_sequences"])
def test_own_loop_is_refused(name):
    def own(self, *args, **kwargs):
        return getattr(LlamaForCausalLM, name)(self, *args, **kwargs)

    assert f"Mine has its own {name}" in loop_obstacle(of_class(**{name: own}))


def test_loop_is_looked_up_on_the_class_and_its_methods_on_the_object():
    model = build_model("llama")
    model._sample = lambda *_, **__: None
    assert loop_obstacle(model) is None
    model._has_unfinished_sequences = lambda *_, **__: False
    assert "_has_unfinished_sequences" in loop_obstacle(model)
