"""Verdicts are found again in memory and in files, and never believed when damaged."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from speclm import SpecModel
from speclm.self_check import check as self_check
from speclm.self_check import store
from speclm.self_check.check import check_model
from speclm.self_check.fingerprint import Fingerprint
from speclm.self_check.store import cache_folder, find_verdict, keep_verdict
from speclm.self_check.verdict import Backend, SelfCheck
from speclm.target import TargetView
from tests.models import build_model

KIND = Fingerprint("abc", (), is_lasting=True)
CHECK = SelfCheck(Backend.CHAINS, "no trees: ALiBi; chains fit", 1e-6)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("SPECLM_CACHE", str(tmp_path / "new"))
    monkeypatch.setattr(store, "_IN_MEMORY", {})
    return tmp_path / "new"


def forget_memory():
    store._IN_MEMORY.clear()


def only_file(folder: Path) -> Path:
    (path,) = (folder / "self_check").iterdir()
    return path


@pytest.mark.parametrize(
    "check", [CHECK, SelfCheck(Backend.PLAIN, "tree forward failed", math.inf)]
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

    monkeypatch.setattr("speclm.files.os.fsync", fail)
    keep_verdict(KIND, CHECK)
    assert list((folder / "self_check").iterdir()) == []


def test_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SPECLM_CACHE", "~/mine")
    assert cache_folder() == Path.home() / "mine"
    monkeypatch.setenv("SPECLM_CACHE", "")
    assert cache_folder() is None
    monkeypatch.delenv("SPECLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "speclm"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == Path.home() / ".cache" / "speclm"

    def no_home():
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", no_home)
    assert cache_folder() is None


def test_tests_never_write_to_the_home():
    assert cache_folder() is not None
    assert Path.home() not in cache_folder().parents


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
    assert check_model(TargetView(build_model("mistral"))).backend is Backend.TREES
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
    assert check_model(TargetView(broken)).backend is Backend.PLAIN
    assert check_model(TargetView(build_model("llama"))).backend is Backend.TREES


def test_report_says_where_the_verdict_came_from(folder):
    lines: list[str] = []
    for _ in range(2):
        SpecModel(build_model("llama"), None).print_report(write=lines.append)
    text = "\n".join(lines)
    assert "checked in" in text
    assert "from an earlier check" in text
