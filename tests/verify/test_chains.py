"""Chains pass on models that decode step by step, and planted errors are found."""

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from speclm.target import ChainReader, TargetView
from speclm.verify import Backend
from speclm.verify.chains import check_chains
from tests.models import FAMILIES, VOCAB_SIZE, randomise, shared_model


@pytest.mark.parametrize("family", FAMILIES)
def test_models_that_take_trees_take_chains_too(family):
    check = check_chains(TargetView(shared_model(family)))
    assert check.backend is Backend.CHAINS
    assert check.error < 1e-4


def alibi():
    config = BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0)
    return randomise(BloomForCausalLM(config))


def test_model_with_alibi_takes_chains():
    assert check_chains(TargetView(alibi())).backend is Backend.CHAINS


def test_rejected_tokens_that_stay_are_found(monkeypatch):
    keep = ChainReader.keep
    fed = []

    def remember(reader, tokens):
        fed.append(tokens.shape[1])
        return feed(reader, tokens)

    feed = ChainReader.feed
    monkeypatch.setattr(ChainReader, "feed", remember)
    monkeypatch.setattr(ChainReader, "keep", lambda reader, _: keep(reader, fed[-1]))
    check = check_chains(TargetView(alibi()))
    assert check.backend is Backend.PLAIN
    assert "differ" in check.reason


def test_numbers_that_are_none_are_found(monkeypatch):
    feed = ChainReader.feed

    def broken(reader, tokens):
        logits = feed(reader, tokens)
        return logits if tokens.shape[1] == 1 else torch.full_like(logits, torch.nan)

    monkeypatch.setattr(ChainReader, "feed", broken)
    assert check_chains(TargetView(alibi())).backend is Backend.PLAIN
