"""The load-time check passes good models and finds planted errors in tree attention."""

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from speclm.attention import TreeStep
from speclm.target import TargetView
from speclm.verify import check_trees
from tests.models import FAMILIES, build_model, shared_model


@pytest.mark.parametrize("family", FAMILIES)
def test_supported_families_pass(family):
    check = check_trees(TargetView(shared_model(family)))
    assert check.passes
    assert check.error < 1e-4
    assert "passed" in check.reason


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_pass(dtype):
    assert check_trees(TargetView(build_model("qwen2").to(dtype))).passes


def require_refused(family: str = "llama") -> None:
    check = check_trees(TargetView(shared_model(family)))
    assert not check.passes
    assert check.error > 1e-3
    assert "differ" in check.reason


def plant_mask(monkeypatch: pytest.MonkeyPatch, change: object) -> None:
    original = TreeStep._build

    def build(step: TreeStep, window: int | None) -> Tensor | None:
        return change(step, original, window)

    monkeypatch.setattr(TreeStep, "_build", build)


def test_ignored_mask_is_found(monkeypatch):
    plant_mask(monkeypatch, lambda step, build, window: torch.ones_like(build(step, window)))
    require_refused()


def test_ignored_ancestors_are_found(monkeypatch):
    def causal(step, build, window):
        mask = build(step, window)
        nodes = mask.shape[2]
        mask[..., -nodes:] = torch.ones(nodes, nodes, dtype=torch.bool).tril()
        return mask

    plant_mask(monkeypatch, causal)
    require_refused()


def test_ignored_padding_is_found(monkeypatch):
    def see_padding(step, build, window):
        mask = build(step, window)
        mask[1, ..., 0] = True
        return mask

    plant_mask(monkeypatch, see_padding)
    require_refused()


def test_ignored_raggedness_is_found(monkeypatch):
    def see_gap(step, build, window):
        mask = build(step, window)
        lengths = step._cache.host_lengths
        for row, length in enumerate(lengths):
            mask[row, ..., length : max(lengths)] = True
        return mask

    plant_mask(monkeypatch, see_gap)
    require_refused()


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_window_by_slot_index_is_found(monkeypatch, family):
    def by_slot(step, build, window):
        mask = build(step, None)
        if window is not None:
            nodes, slots = mask.shape[2:]
            node_slots = torch.arange(slots - nodes, slots)[:, None]
            mask = mask & (node_slots - torch.arange(slots) < window)
        return mask

    plant_mask(monkeypatch, by_slot)
    require_refused(family)


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_ignored_window_is_found(monkeypatch, family):
    plant_mask(monkeypatch, lambda step, build, window: build(step, None))
    require_refused(family)


@pytest.mark.parametrize("shift", [1, -1])
def test_shifted_positions_are_found(monkeypatch, shift):
    # Rotary attention knows distances alone: nodes are shifted against the prefix.
    original = TargetView.forward_nodes

    def shifted(view, tokens, visible, slot_depths, cache, **options):
        cache.num_padding -= shift
        try:
            return original(view, tokens, visible, slot_depths, cache, **options)
        finally:
            cache.num_padding += shift

    monkeypatch.setattr(TargetView, "forward_nodes", shifted)
    require_refused()


def test_nan_in_the_tree_alone_is_found(monkeypatch):
    original = TargetView.forward_tree

    def broken(view, tokens, topology, cache, **options):
        logits = original(view, tokens, topology, cache, **options)
        logits[0, 3, 5] = torch.nan
        return logits

    monkeypatch.setattr(TargetView, "forward_tree", broken)
    assert not check_trees(TargetView(shared_model("llama"))).passes


def test_failing_forward_is_a_refusal_with_its_reason(monkeypatch):
    def fail(*_: object, **__: object) -> Tensor:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(TargetView, "forward_tree", fail)
    check = check_trees(TargetView(shared_model("llama")))
    assert not check.passes
    assert "ZeroDivisionError: planted" in check.reason


LOCAL_BY_SLOT = {
    "attention_types": [[["global", "local"], 1]],
    "num_layers": 2,
    "num_heads": 4,
    "window_size": 64,  # longer than the prompts of the check
}


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("gpt_neo", LOCAL_BY_SLOT, "bias masks by slot"),
        ("llama", {"layer_types": ["indexed_attention"] * 2}, "layers of type indexed_attention"),
    ],
)
def test_what_a_short_check_cannot_see_is_refused_by_the_config(model_type, settings, reason):
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        **settings,
    }
    config = AutoConfig.for_model(model_type, **sizes)
    check = check_trees(TargetView(AutoModelForCausalLM.from_config(config).eval()))
    assert not check.passes
    assert reason in check.reason
