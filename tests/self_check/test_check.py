"""A model is checked at load time, gets a backend with its reasons, and is left as it was found."""

import pytest
import torch
from transformers import LlamaForCausalLM

from speclm.errors import BusyError
from speclm.self_check import check as self_check
from speclm.self_check.check import check_model
from speclm.self_check.verdict import Backend, SelfCheck
from speclm.target import TargetView
from speclm.target.chain_session import ChainReader
from tests.models import build_model, shared_model

pytestmark = pytest.mark.usefixtures("no_verdicts")


def chains_give(monkeypatch, check):
    monkeypatch.setattr(self_check, "check_chains", lambda _: check)


def trees_give(monkeypatch, check):
    monkeypatch.setattr(self_check, "check_trees", lambda _: check)


def test_verdict_says_how_long_it_took_and_that_it_is_new():
    check = check_model(TargetView(shared_model("llama")))
    assert check.backend is Backend.TREES
    assert check.milliseconds > 0
    assert not check.is_cached


def test_chains_are_tried_where_trees_are_refused_and_both_reasons_are_given(monkeypatch):
    trees_give(monkeypatch, SelfCheck(Backend.PLAIN, "no mask", 0.5))
    chains_give(monkeypatch, SelfCheck(Backend.CHAINS, "chains fit", 1e-6))
    check = check_model(TargetView(shared_model("llama")))
    assert check.backend is Backend.CHAINS
    assert check.reason == "no trees: no mask; chains fit"
    assert check.error == 1e-6
    chains_give(monkeypatch, SelfCheck(Backend.PLAIN, "no cache", 0.7, is_lasting=False))
    check = check_model(TargetView(shared_model("llama")))
    assert check.backend is Backend.PLAIN
    assert check.reason == "no trees: no mask; no chains: no cache"
    assert not check.is_lasting


def state_of(model):
    return (
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [set(vars(module)) for module in model.modules()],
        [len(module._forward_hooks) for module in model.modules()],
        model.config._attn_implementation,
        model.config.to_dict(),
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize("failure", [None, RuntimeError("broken"), KeyboardInterrupt()])
def test_model_is_left_as_it_was_found(monkeypatch, failure):
    model = build_model("llama", attention_dropout=0.3).train()
    model.model.layers[0].eval()
    model.model.layers[1].self_attn.q_proj.weight.requires_grad_(False)
    before = state_of(model)
    forward = LlamaForCausalLM.forward
    calls = 0

    def fail(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls >= 2:
            raise failure
        return forward(self, *args, **kwargs)

    if failure is not None:
        monkeypatch.setattr(LlamaForCausalLM, "forward", fail)
    if isinstance(failure, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            check_model(TargetView(model))
    else:
        backend = Backend.TREES if failure is None else Backend.PLAIN
        assert check_model(TargetView(model)).backend is backend
    assert state_of(model) == before


def test_weights_on_the_meta_device_are_named(monkeypatch):
    with torch.device("meta"):
        model = LlamaForCausalLM(shared_model("llama").config)
    check = check_model(TargetView(model))
    assert check.backend is Backend.PLAIN
    assert "meta device" in check.reason
    assert not check.is_lasting


def test_weights_that_are_no_numbers_are_named_and_not_lasting():
    model = build_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0] = torch.nan
    check = check_model(TargetView(model))
    assert check.backend is Backend.PLAIN
    assert "not numbers" in check.reason
    assert not check.is_lasting


def test_attention_without_effect_proves_nothing_about_other_weights():
    model = build_model("llama", attention_bias=False)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    check = check_model(TargetView(model))
    assert check.backend is Backend.PLAIN
    assert "too little" in check.reason
    assert not check.is_lasting


@pytest.mark.parametrize("vocab_size", [3, 10, 37, 61])
def test_small_vocabularies_are_checked(vocab_size):
    check = check_model(TargetView(build_model("llama", vocab_size=vocab_size)))
    assert check.backend is Backend.TREES


def test_vocabulary_of_one_token_is_decoded_plainly():
    check = check_model(TargetView(build_model("llama", vocab_size=1)))
    assert check.backend is Backend.PLAIN


@pytest.mark.parametrize(
    ("failure", "is_lasting"),
    [
        (torch.OutOfMemoryError("no room"), False),
        (MemoryError(), False),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), False),
        (BusyError("another thread generates"), False),
        (OSError("offloaded weights are gone"), False),
        (RuntimeError("sizes do not match"), True),
        (NotImplementedError("no kernel"), True),
        (TypeError("unexpected keyword argument"), True),
    ],
)
def test_failures_of_the_moment_are_not_lasting(monkeypatch, failure, is_lasting):
    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(TargetView, "forward_tree", fail)
    monkeypatch.setattr(ChainReader, "feed", fail)
    check = check_model(TargetView(shared_model("llama")))
    assert check.backend is Backend.PLAIN
    assert str(failure) in check.reason
    assert check.is_lasting is is_lasting
