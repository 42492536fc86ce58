"""Which draft models run as a network, and that changes of a model are noticed."""

from copy import deepcopy

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers import GPT2Config, GPT2LMHeadModel

from speclm import SpecModel
from speclm.methods.draft_model.network import DraftNetwork
from speclm.methods.draft_model.proposer import DraftModelProposer
from speclm.methods.draft_model.structure import CurrentNetwork, computes_alike, find_obstacle
from speclm.target import TargetView
from tests.models import FAMILIES, build_model, generate, prompts, shared_model

DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}
YARN = {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0}}


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_known_families_run_as_networks_and_stay_as_they_are(family):
    model = build_model(family, num_hidden_layers=3)
    before, state = deepcopy(model.state_dict()), torch.get_rng_state()
    current = CurrentNetwork(TargetView(model))
    assert current.obstacle is None
    assert current.look() is not None
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_compute_alike(dtype):
    assert computes_alike(TargetView(build_model("llama", **YARN).to(dtype)))


def adapted(model):
    config = peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)


def hooked(model):
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)


def replaced(model):
    model.lm_head.forward = lambda states: states @ model.lm_head.weight.T


def wrapped(model):
    model.model.norm = nn.Sequential(model.model.norm)


def halved(parameter):
    return parameter / 2


class Half(nn.Module):
    def forward(self, weight):
        return halved(weight)


def parametrised(model):
    parametrize.register_parametrization(model.model.layers[0].mlp.up_proj, "weight", Half())


def pruned(model):
    prune.l1_unstructured(model.model.layers[1].self_attn.q_proj, "weight", amount=0.2)


def shortened(model):
    del model.model.layers[0]
    model.config.num_hidden_layers = 1


def narrowed(model):
    attention = model.model.layers[1].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        part = getattr(attention, name)
        setattr(attention, name, nn.Linear(40, part.out_features // 2).eval())
    attention.o_proj = nn.Linear(40, 40).eval()


def mixed(model):
    model.model.norm.double()


def in_training(model):
    model.model.layers[0].mlp.train()


def compiled(model):
    model._compiled_call_impl = model.forward


def activated(model):
    model.model.layers[0].mlp.act_fn = nn.PReLU()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (adapted, "v_proj' is a Linear"),
        (hooked, "up_proj' has a forward hook"),
        (replaced, "forward of 'lm_head' is replaced"),
        (wrapped, "'model.norm' is a Sequential"),
        (parametrised, "up_proj' is a ParametrizedLinear"),
        (pruned, "q_proj' is a Linear"),
        (shortened, "layers were removed"),
        (narrowed, "different numbers of heads"),
        (mixed, "several devices or dtypes"),
        (in_training, "'model.layers.0.mlp' is in training mode"),
        (compiled, "is compiled"),
        (activated, "act_fn' is a PReLU"),
    ],
)
def test_changed_models_are_left_to_their_own_forward(change, words):
    model = build_model("llama")
    current = CurrentNetwork(TargetView(model))
    network = current.look()
    assert network is not None
    assert current.look() is network
    change(model)
    assert current.look() is None
    assert words in current.obstacle


def test_models_of_other_structure_are_left_to_their_own_forward():
    shape = {"vocab_size": 40, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
    other = CurrentNetwork(TargetView(GPT2LMHeadModel(GPT2Config(**shape)).eval()))
    assert other.obstacle == "GPT2LMHeadModel is not a model of llama, mistral, qwen2, qwen3"
    long = CurrentNetwork(TargetView(build_model("llama", **DYNAMIC)))
    assert "depends on the length" in long.obstacle
    model = build_model("llama")
    model.model.embed_tokens.max_norm = 1.0
    assert "embed_tokens" in find_obstacle(TargetView(model))


def shifted(*args, **more):
    return own_logits(*args, **more).roll(1, -1)


def fails(*args, **more):
    raise RuntimeError("sizes do not fit")


own_logits = DraftNetwork.logits


@pytest.mark.parametrize("logits", [shifted, fails])
def test_models_that_compute_otherwise_are_left_to_their_own_forward(logits, monkeypatch):
    monkeypatch.setattr(DraftNetwork, "logits", logits)
    current = CurrentNetwork(TargetView(shared_model("llama")))
    assert current.look() is None
    assert "not those of the family" in current.obstacle


def test_model_is_read_again_once_it_is_as_it_was_moved_or_changed_in_place():
    model = build_model("llama")
    current = CurrentNetwork(TargetView(model))
    handle = model.model.register_forward_pre_hook(lambda *_: None)
    assert current.look() is None
    handle.remove()
    first = current.look()
    model.to(torch.bfloat16)
    second = current.look()
    assert second is not first
    assert second.dtype == torch.bfloat16
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    assert current.look() is not second
    model.lm_head = nn.Linear(40, 160, bias=False, dtype=torch.bfloat16)
    assert current.look() is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert current.look() is None
    assert find_obstacle(TargetView(model)) is None


@pytest.mark.parametrize("settings", [{"do_sample": True}, {"do_sample": False}])
def test_tokens_are_the_same_with_copies_windows_and_changes_between_calls(settings):
    target, inputs = shared_model("llama"), prompts(7, 3)
    draft = build_model("mistral", sliding_window=18)  # ends inside the text
    spec = SpecModel(target, DraftModelProposer(draft, target=target, width=2))
    expected = generate(target, inputs, max_new_tokens=16, **settings)
    twin = deepcopy(spec)
    for model, change in ((spec, None), (twin, None), (spec, hooked)):
        if change is not None:
            change(draft)
        found = generate(model, inputs, max_new_tokens=16, **settings)
        assert all(map(torch.equal, found, expected))
        assert (model.proposer.network is None) == (change is not None)
    assert twin.proposer.network is not spec.proposer.network
