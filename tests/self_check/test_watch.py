"""A change of a model is noticed at the next look, and what changes nothing is not."""

import copy
import pickle
from functools import partial

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama import modeling_llama

import speclm
from speclm.self_check import watch
from speclm.self_check.verdict import SelfCheck, Verification
from speclm.self_check.watch import Watch, first_in_training, may_draw
from speclm.target import TargetFeatures, TargetView
from tests.models import build_model


@pytest.fixture
def checks(monkeypatch):
    """Return the verdicts that are made, each of which has a number."""
    made = []

    def check(target):
        made.append(SelfCheck(Verification.TREES, f"check {len(made)}"))
        return made[-1]

    monkeypatch.setattr(watch, "check_model", check)
    return made


@pytest.fixture
def view():
    return TargetView(build_model("llama"))


def hook(model):
    model.model.layers[0].register_forward_hook(lambda *_: None)


def pre_hook(model):
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: None)


def forward_of_the_model(model):
    model.forward = partial(model.forward)


def forward_of_a_layer(model):
    attention = model.model.layers[0].self_attn
    attention.forward = partial(attention.forward)


def step_method(model):
    model.prepare_inputs_for_generation = partial(model.prepare_inputs_for_generation)


def method_of_a_module(model):
    model.model.layers[0].helper = lambda: None


def other_module(model):
    model.model.layers[1].mlp.up_proj = nn.Linear(40, 48, bias=False).eval()


def other_class(model):
    model.model.layers[1].mlp.__class__ = type("Mine", (modeling_llama.LlamaMLP,), {})


def attention(model):
    model.set_attn_implementation("eager")


def setting(model):
    model.config.sliding_window = 4


def dtype(model):
    model.to(torch.bfloat16)


def adapter(model):
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), model)


def compiled(model):
    model._compiled_call_impl = model.forward  # as `compile` does


@pytest.mark.parametrize(
    "change",
    [
        hook,
        pre_hook,
        forward_of_the_model,
        forward_of_a_layer,
        step_method,
        method_of_a_module,
        other_module,
        other_class,
        attention,
        setting,
        dtype,
        adapter,
        compiled,
    ],
)
def test_change_has_the_model_checked_again_once(view, checks, change):
    seen = Watch(view)
    change(view.model)
    for _ in range(2):
        seen.look(view)
    assert seen.check is checks[1]
    assert len(checks) == 2


def test_another_function_under_the_same_name_is_a_change(view, checks):
    step_method(view.model)
    seen = Watch(view)
    step_method(view.model)
    seen.look(view)
    assert len(checks) == 2


@pytest.mark.parametrize("name", ["prepare_inputs_for_generation", "_sample", "forward"])
def test_patched_class_is_a_change(view, checks, monkeypatch, name):
    seen = Watch(view)
    monkeypatch.setattr(LlamaForCausalLM, name, lambda *_, **__: None)
    seen.look(view)
    assert len(checks) == 2


def test_hook_of_all_modules_is_a_change_until_it_is_removed(view, checks):
    seen = Watch(view)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        seen.look(view)
    finally:
        handle.remove()
    assert seen.check is checks[1]
    seen.look(view)
    assert seen.check is checks[0]
    assert len(checks) == 2


class Steering:
    def __call__(self, module, arguments, output):
        return None

    def method(self, module, arguments, output):
        return None


def test_verdicts_on_states_that_were_seen_are_kept(view, checks):
    seen, steering = Watch(view), Steering()
    for _ in range(2):
        handle = view.model.model.register_forward_hook(steering.method)
        seen.look(view)
        assert seen.check is checks[1]
        handle.remove()
        seen.look(view)
        assert seen.check is checks[0]
    view.model.model.register_forward_pre_hook(steering.method)  # the same, at another time
    seen.look(view)
    assert len(checks) == 3


def test_what_speclm_does_meanwhile_is_no_change(view, checks):
    model = view.model
    seen, spec = Watch(view), speclm.SpecModel(model, None)
    checks.pop()
    with view.decoding(TargetFeatures((0, -1))), view.steps(), spec:
        seen.look(view)
        handle = model.model.layers[0].register_forward_hook(lambda *_: seen.look(view) or None)
        seen.look(view)
        assert len(checks) == 2
        view.prefill(torch.tensor([[3, 4]]), view.new_cache(torch.tensor([0])))  # attaches trees
    handle.remove()
    seen.look(view)
    assert len(checks) == 2


def test_stub_over_the_decoder_is_no_change(view, checks):
    view.model.config.final_logit_softcapping = 30.0  # has logits computed by the model's forward
    seen = Watch(view)
    handle = view.model.lm_head.register_forward_hook(lambda *_: seen.look(view) or None)
    seen.look(view)
    view.head_logits(torch.zeros(2, 40))
    assert len(checks) == 2
    handle.remove()


def test_recording_of_hidden_states_is_no_change(view, checks):
    seen = Watch(view)
    view.model(torch.tensor([[3, 4]]), output_hidden_states=True)
    assert any(module._forward_hooks for module in view.model.modules())  # of Transformers
    seen.look(view)
    assert len(checks) == 1


def test_attributes_that_are_no_functions_are_no_change(view, checks):
    seen = Watch(view)
    view.model.model.layers[0].counter = 3
    view.model.model.layers[0].remembered = torch.zeros(2)
    seen.look(view)
    assert len(checks) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copy_keeps_the_verdict_and_looks_at_its_own_model(view, checks, copied):
    seen = copied(Watch(view))
    assert seen.check == checks[0]
    seen.look(TargetView(build_model("llama")))
    assert seen.check is checks[1]


def test_replaced_modules_are_not_kept_in_memory(view, checks):
    seen = Watch(view)
    gone = torch.utils.weak.WeakTensorKeyDictionary()
    gone[view.model.model.layers[1].mlp.up_proj.weight] = True
    other_module(view.model)
    assert len(gone) == 0
    seen.look(view)
    assert len(checks) == 2


def test_module_in_training_mode_is_named(view, checks):
    model = view.model
    seen = Watch(view)
    assert (seen.in_training, first_in_training(model)) == (None, None)
    model.model.layers[1].mlp.train()
    seen.look(view)
    assert seen.in_training == first_in_training(model) == "module 'model.layers.1.mlp'"
    model.train()
    seen.look(view)
    assert seen.in_training == "the model"
    assert len(checks) == 1


class Odd(nn.Linear):
    """Of a package that nobody knows."""


def strange(model):
    model.lm_head.__class__ = Odd


@pytest.mark.parametrize("change", [hook, forward_of_a_layer, strange, nn.Module.train])
def test_networks_that_may_draw_are_told_from_those_that_do_not(change):
    model = build_model("llama")
    assert not may_draw(model)
    change(model)
    assert may_draw(model)
