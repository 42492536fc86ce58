"""Draft models that are given as objects or folders, with options of both."""

import pytest

from speclm.errors import OptionError, UnsupportedModelError
from speclm.methods.draft_model.method import DraftModelMethod
from speclm.methods.draft_model.proposer import DraftModelProposer
from speclm.methods.finding import find_heads
from speclm.methods.ngram.proposer import NgramProposer
from speclm.self_check.verdict import SelfCheck, Verification
from tests.models import build_model, shared_model


def load(heads, **options):
    source = find_heads(heads, options)
    assert isinstance(source.method, DraftModelMethod)
    return source.method.load(source, shared_model("llama"))


def test_options_of_the_proposer_and_of_from_pretrained_are_told_apart(tmp_path):
    build_model("llama", seed=7, num_hidden_layers=1).save_pretrained(tmp_path)
    proposer = load(tmp_path, width=2, depth=3, dtype="float64")
    assert isinstance(proposer, DraftModelProposer)
    assert (proposer.config.width, proposer.config.depth) == (2, 3)
    assert str(proposer.view.model.dtype) == "torch.float64"
    with pytest.raises(OptionError, match=r"does not take \['widht'\].*did you mean 'width'"):
        load(tmp_path, widht=2)


def test_loaded_models_take_options_of_the_proposer_only():
    assert load(shared_model("llama", 7), width=2).config.width == 2
    with pytest.raises(OptionError, match=r"'dtype'.*no effect, known options are .*'width'"):
        load(shared_model("llama", 7), dtype="auto")


def test_proposers_of_draft_models_are_its_own():
    draft = DraftModelProposer(shared_model("llama", 7), target=shared_model("llama"))
    assert DraftModelMethod().owns(draft)
    assert not DraftModelMethod().owns(NgramProposer())


def test_models_that_draft_neither_trees_nor_chains_are_refused(monkeypatch):
    check = SelfCheck(Verification.REGULAR, "they draw", milliseconds=1.0)
    monkeypatch.setattr("speclm.self_check.check.check_model", lambda _: check)
    with pytest.raises(UnsupportedModelError, match="neither trees nor chains: they draw"):
        load(shared_model("llama", 7))
