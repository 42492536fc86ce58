"""Models share a fingerprint only if they compute alike, whatever was done to one of them."""

import functools

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama import modeling_llama

from speclm.self_check import fingerprint as module
from speclm.self_check.fingerprint import fingerprint
from speclm.target import TargetView
from tests.models import FAMILIES, build_model, randomise


def kind_of(model):
    return fingerprint(TargetView(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_one_kind_share_a_lasting_fingerprint(family):
    first, second = build_model(family), build_model(family)
    second.config.name_or_path = "elsewhere"
    second.train()
    assert kind_of(first) == kind_of(second)
    assert kind_of(first).is_lasting
    assert kind_of(first).foreign == ()


def test_other_kinds_have_other_fingerprints():
    models = [
        build_model("llama"),
        build_model("llama", seed=1),  # a verdict on chains may depend on weights
        build_model("qwen2"),
        build_model("llama", num_hidden_layers=3),
        build_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        build_model("llama", attn_implementation="eager"),
        build_model("llama").to(torch.bfloat16),
        build_model("llama").to("meta"),
    ]
    assert len({kind_of(model) for model in models}) == len(models)


@pytest.mark.parametrize("name", ["transformers", "torch"])
def test_other_versions_have_other_fingerprints(monkeypatch, name):
    before = kind_of(build_model("llama"))
    monkeypatch.setattr(getattr(module, name), "__version__", "99.0")
    assert kind_of(build_model("llama")).digest != before.digest


def test_development_versions_are_not_lasting(monkeypatch):
    monkeypatch.setattr(module.transformers, "__version__", "6.0.0.dev0")
    assert not kind_of(build_model("llama")).is_lasting


def hook(model):
    model.model.layers[0].register_forward_hook(lambda *_: None)


def pre_hook(model):
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: None)


def own_forward(model):
    attention = model.model.layers[0].self_attn
    attention.forward = functools.partial(attention.forward)


def own_method(model):
    model.prepare_inputs_for_generation = lambda *_, **__: {}


def own_private_method(model):
    model._update_model_kwargs_for_generation = lambda *_, **__: {}


def offloaded(model):
    model._hf_hook = object()


def compiled(model):
    model._compiled_call_impl = model.forward


@pytest.mark.parametrize(
    "change", [hook, pre_hook, own_forward, own_method, own_private_method, offloaded, compiled]
)
def test_models_changed_in_ways_without_a_name_have_none(change):
    model = build_model("llama")
    change(model)
    assert kind_of(model) is None


def own_setting(model):
    model.model.layers[1].self_attn.scaling *= 2


def int8_weight(model):
    linear = model.model.layers[0].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)


def other_module(model):
    model.model.layers[0].mlp.up_proj = nn.Sequential(model.model.layers[0].mlp.up_proj)


def parametrised(model):
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)


class Adapted(nn.Linear):
    """Stands for the layers of quantisation and adapter libraries."""


def adapted(model):
    model.model.layers[0].mlp.up_proj = Adapted(40, 48)


@pytest.mark.parametrize("change", [own_setting, int8_weight, other_module, parametrised, adapted])
def test_changed_modules_have_another_fingerprint(change):
    model = build_model("llama")
    before = kind_of(model)
    change(model)
    assert kind_of(model) != before


def test_classes_of_others_are_known_by_identity_in_this_process_alone():
    def define():
        class Mine(LlamaForCausalLM):
            pass

        return Mine

    config = build_model("llama").config
    first, second = define(), define()
    kind, again, other = (kind_of(randomise(model(config))) for model in (first, first, second))
    assert not kind.is_lasting
    assert first in kind.foreign
    assert kind == again
    assert kind != other


class Steered(LlamaForCausalLM):
    steering = None


def test_objects_of_other_classes_are_known_by_what_they_hold():
    config = build_model("llama").config
    models = [randomise(Steered(config)) for _ in range(4)]
    for model, steering in zip(models, ([1.0], [1.0], {"after": [2.0, None]}), strict=False):
        model.steering = steering
    first, again, other, none = map(kind_of, models)
    assert first == again
    assert len({first, other, none}) == 3
    models[0].steering = [torch.ones(2)]  # no words for it
    assert kind_of(models[0]) is None


def test_steps_that_are_patched_are_noticed(monkeypatch):
    before = kind_of(build_model("llama"))
    for name in ("prepare_inputs_for_generation", "_sample", "_prefill"):
        with monkeypatch.context() as patch:
            patch.setattr(LlamaForCausalLM, name, lambda *_, **__: None)
            kind = kind_of(build_model("llama"))
        assert kind != before
        assert not kind.is_lasting


def test_patched_classes_and_functions_of_transformers_are_noticed(monkeypatch):
    before = kind_of(build_model("llama"))
    rotate = modeling_llama.apply_rotary_pos_emb

    @functools.wraps(rotate)
    def patched(*args, **kwargs):
        return rotate(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(modeling_llama, "apply_rotary_pos_emb", patched)
        assert patched in kind_of(build_model("llama")).foreign
    with monkeypatch.context() as patch:
        patch.setattr(modeling_llama.LlamaMLP, "forward", lambda _, hidden: hidden)
        kind = kind_of(build_model("llama"))
        assert kind != before
        assert not kind.is_lasting
    assert kind_of(build_model("llama")) == before


def test_registered_attention_of_others_is_noticed(monkeypatch):
    model = build_model("llama")
    monkeypatch.setitem(
        module.ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", lambda *_, **__: None
    )
    assert not kind_of(model).is_lasting


def test_patched_base_keeps_its_fingerprint():
    model = build_model("llama")
    before = kind_of(model)
    model.generate = functools.partial(model.generate)
    assert kind_of(model) == before


def test_kernels_that_verify_trees_are_part_of_the_kind(monkeypatch):
    digests = set()
    for backend in ("sdpa", "reference", "triton"):
        monkeypatch.setenv("SPECLM_KERNELS", backend)
        found = fingerprint(TargetView(build_model("llama")))
        assert found is not None
        digests.add(found.digest)
    assert len(digests) == 3
