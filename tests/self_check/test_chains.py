"""Chains pass on models that decode step by step, and planted errors are found."""

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from speclm.self_check.comparison import check_chains
from speclm.self_check.verdict import Backend
from speclm.target import TargetView
from speclm.target.chain_session import ChainReader
from tests.families import FAMILIES as FAMILY_ROWS
from tests.families import build_family, build_type
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


def nemotron_h():
    return build_family("nemotron_h").bfloat16()  # rounds by more than its bound changes


def bounded_mamba2():
    settings = FAMILY_ROWS["mamba2"].settings
    return randomise(build_type("mamba2", {**settings, "time_step_limit": (0.0, 1e4)}))


@pytest.mark.parametrize("build", [nemotron_h, bounded_mamba2])
def test_time_steps_that_are_bounded_in_chains_alone_are_refused_where_the_check_sees_none(build):
    check = check_chains(TargetView(build()))
    assert check.backend is Backend.PLAIN
    assert check.error < 0.1
    assert "time steps are bounded" in check.reason
