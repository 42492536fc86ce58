"""A model is checked at load time and not changed; damaged verdicts are never trusted."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from speclm import SpecModel
from speclm.errors import BusyError
from speclm.self_check import check as self_check
from speclm.self_check.check import check_model, find_verdict, keep_verdict
from speclm.self_check.fingerprint import Fingerprint
from speclm.self_check.verdict import SelfCheck, Verification
from speclm.target import TargetView
from speclm.target.chain_session import ChainReader
from tests.models import build_model, shared_model

KIND = Fingerprint("abc", (), is_lasting=True)
CHECK = SelfCheck(Verification.CHAINS, "no trees: ALiBi; chains fit", 1e-6)


def chains_give(monkeypatch, check):
    monkeypatch.setattr(self_check, "check_chains", lambda _: check)


def trees_give(monkeypatch, check):
    monkeypatch.setattr(self_check, "check_trees", lambda _: check)


@pytest.mark.usefixtures("no_verdicts")
def test_verdict_says_how_long_it_took_and_that_it_is_new():
    check = check_model(TargetView(shared_model("llama")))
    assert check.verification is Verification.TREES
    assert check.milliseconds > 0
    assert not check.is_cached


@pytest.mark.usefixtures("no_verdicts")
def test_chains_are_tried_where_trees_are_refused_and_both_reasons_are_given(monkeypatch):
    trees_give(monkeypatch, SelfCheck(Verification.REGULAR, "no mask", 0.5))
    chains_give(monkeypatch, SelfCheck(Verification.CHAINS, "chains fit", 1e-6))
    check = check_model(TargetView(shared_model("llama")))
    assert check.verification is Verification.CHAINS
    assert check.reason == "no trees: no mask; chains fit"
    assert check.error == 1e-6
    chains_give(monkeypatch, SelfCheck(Verification.REGULAR, "no cache", 0.7, is_lasting=False))
    check = check_model(TargetView(shared_model("llama")))
    assert check.verification is Verification.REGULAR
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


@pytest.mark.usefixtures("no_verdicts")
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
        backend = Verification.TREES if failure is None else Verification.REGULAR
        assert check_model(TargetView(model)).verification is backend
    assert state_of(model) == before


@pytest.mark.usefixtures("no_verdicts")
def test_weights_on_the_meta_device_are_named(monkeypatch):
    with torch.device("meta"):
        model = LlamaForCausalLM(shared_model("llama").config)
    check = check_model(TargetView(model))
    assert check.verification is Verification.REGULAR
    assert "meta device" in check.reason
    assert not check.is_lasting


@pytest.mark.usefixtures("no_verdicts")
def test_weights_that_are_no_numbers_are_named_and_not_lasting():
    model = build_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0] = torch.nan
    check = check_model(TargetView(model))
    assert check.verification is Verification.REGULAR
    assert "not numbers" in check.reason
    assert not check.is_lasting


@pytest.mark.usefixtures("no_verdicts")
def test_attention_without_effect_proves_nothing_about_other_weights():
    model = build_model("llama", attention_bias=False)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    check = check_model(TargetView(model))
    assert check.verification is Verification.REGULAR
    assert "too little" in check.reason
    assert not check.is_lasting


@pytest.mark.usefixtures("no_verdicts")
@pytest.mark.parametrize("vocab_size", [3, 10, 37, 61])
def test_small_vocabularies_are_checked(vocab_size):
    check = check_model(TargetView(build_model("llama", vocab_size=vocab_size)))
    assert check.verification is Verification.TREES


@pytest.mark.usefixtures("no_verdicts")
def test_vocabulary_of_one_token_is_decoded_plainly():
    check = check_model(TargetView(build_model("llama", vocab_size=1)))
    assert check.verification is Verification.REGULAR


@pytest.mark.usefixtures("no_verdicts")
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
    assert check.verification is Verification.REGULAR
    assert str(failure) in check.reason
    assert check.is_lasting is is_lasting


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("SPECLM_CACHE", str(tmp_path / "new"))
    monkeypatch.setattr(self_check, "_IN_MEMORY", {})
    return tmp_path / "new"


def forget_memory():
    self_check._IN_MEMORY.clear()


def only_file(folder: Path) -> Path:
    (path,) = (folder / "self_check").iterdir()
    return path


@pytest.mark.parametrize(
    "check", [CHECK, SelfCheck(Verification.REGULAR, "tree forward failed", math.inf)]
)
def test_verdict_outlives_the_process(folder, check):
    keep_verdict(KIND, check)
    assert find_verdict(KIND) == replace(check, is_cached=True)
    forget_memory()
    assert find_verdict(KIND) == replace(check, is_cached=True)
    assert find_verdict(replace(KIND, digest="other")) is None


def test_kinds_known_by_identity_stay_in_memory(folder):
    kind = Fingerprint("abc", (object(),), is_lasting=False)
    keep_verdict(kind, CHECK)
    assert find_verdict(kind) == replace(CHECK, is_cached=True)
    assert not folder.exists()
    forget_memory()
    assert find_verdict(kind) is None


def test_verdicts_that_are_not_lasting_are_not_kept(folder):
    keep_verdict(KIND, replace(CHECK, is_lasting=False))
    assert find_verdict(KIND) is None
    assert not folder.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("CHAINS", "TREES"),
        lambda text: text.replace("CHAINS", "OTHER"),
        lambda text: "[]",
        lambda text: json.dumps({"checksum": "", "verdict": None}),
        lambda text: "\udcff".encode("utf-8", "surrogateescape"),
    ],
)
def test_damaged_file_is_ignored_and_written_again(folder, damage):
    keep_verdict(KIND, CHECK)
    path = only_file(folder)
    damaged = damage(path.read_text())
    path.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    forget_memory()
    assert find_verdict(KIND) is None
    keep_verdict(KIND, CHECK)
    forget_memory()
    assert find_verdict(KIND) is not None


def test_file_of_another_kind_is_not_believed(folder):
    keep_verdict(KIND, CHECK)
    path = only_file(folder)
    path.rename(path.with_stem("other"))
    forget_memory()
    assert find_verdict(replace(KIND, digest="other")) is None


def test_folder_that_cannot_be_written_is_no_error(folder):
    folder.write_text("a file, where a folder should be")
    keep_verdict(KIND, CHECK)
    forget_memory()
    assert find_verdict(KIND) is None


def test_no_half_written_file_is_left(folder, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("speclm.files.atomic.os.fsync", fail)
    keep_verdict(KIND, CHECK)
    assert list((folder / "self_check").iterdir()) == []


@pytest.fixture
def count(monkeypatch):
    counted = []
    original = self_check.check_trees

    def counting(target):
        counted.append(target)
        return original(target)

    monkeypatch.setattr(self_check, "check_trees", counting)
    return counted


def test_model_that_was_checked_before_is_not_checked_again(folder, count):
    first = check_model(TargetView(build_model("llama", seed=1)))
    second = check_model(TargetView(build_model("llama", seed=1)))
    forget_memory()
    third = check_model(TargetView(build_model("llama", seed=1)))
    assert len(count) == 1
    assert [check.is_cached for check in (first, second, third)] == [False, True, True]
    assert {check.reason for check in (first, second, third)} == {first.reason}
    assert second.milliseconds > 0


def test_hooked_models_and_an_empty_variable_are_checked_anew(folder, count, monkeypatch):
    check_model(TargetView(build_model("llama")))
    hooked = build_model("llama")
    hooked.model.layers[0].register_forward_hook(lambda *_: None)
    assert not check_model(TargetView(hooked)).is_cached
    monkeypatch.setenv("SPECLM_CACHE", "")
    assert not check_model(TargetView(build_model("llama"))).is_cached
    assert len(count) == 3


def test_patched_attention_does_not_inherit_the_verdict(folder, monkeypatch):
    assert check_model(TargetView(build_model("mistral"))).verification is Verification.TREES
    monkeypatch.setitem(
        self_check_functions(),
        "sdpa",
        lambda module, query, *_, **__: (query.transpose(1, 2).cumsum(1), None),
    )
    check = check_model(TargetView(build_model("mistral")))
    assert not check.is_cached


def self_check_functions():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS._global_mapping


def test_verdicts_of_weights_without_numbers_are_not_inherited(folder):
    broken = build_model("llama")
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.nan)
    assert check_model(TargetView(broken)).verification is Verification.REGULAR
    assert check_model(TargetView(build_model("llama"))).verification is Verification.TREES


def test_report_says_where_the_verdict_came_from(folder):
    lines: list[str] = []
    for _ in range(2):
        SpecModel(build_model("llama"), None).print_report(write=lines.append)
    text = "\n".join(lines)
    assert "checked in" in text
    assert "from an earlier check" in text
