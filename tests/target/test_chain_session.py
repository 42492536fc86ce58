"""Chains are the steps of regular generation, and what was not kept leaves no trace."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from speclm.cache import CACHE_NAME, cache_name
from speclm.errors import UnsupportedModelError
from speclm.target import TargetFeatures, TargetView
from speclm.target.chain_session import MAX_UNREAD, ChainReader, ChainSession
from speclm.tree.topology import chain
from tests.families import shared_family
from tests.models import VOCAB_SIZE, prompts, shared_model

SPREAD = 1e-4  # of logits and states, next to their own size: sums are taken in another order
# By slot; with states alone, next to attention and in one layer with it; a window before one;
# chunks; convolutions that remember tokens.
NAMES = ("bloom", "qwen3_next", "mamba2", "falcon_h1", "mistral", "llama4_text", "lfm2")
OWING = ("qwen3_next", "mamba2", "falcon_h1")
LENGTHS = ((9,), (12, 4, 1))
NUM_STEPS = 14
# Tokens of each feed, and how many of them all are kept: all, none, part, part of what follows
# what is owed, nothing behind what is owed, several feeds cut in the first and in the last.
ROUNDS = (
    ((2,), 2),
    ((3,), 0),
    ((4,), 1),
    ((3,), 2),
    ((2,), 0),
    ((1,), 1),
    ((1, 1, 2), 1),
    ((2, 3), 4),
    ((1, 1), 0),
    ((1, 1), 2),
)


def model(name: str) -> PreTrainedModel:
    return shared_model(name) if name in {"bloom", "qwen3_next", "mistral"} else shared_family(name)


def open_reader(name: str, lengths: tuple[int, ...]) -> ChainReader:
    inputs = prompts(*lengths)
    reader = ChainReader.of_prompt(TargetView(model(name)), inputs["attention_mask"])
    reader.prefill(inputs["input_ids"])
    return reader


def text(batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, VOCAB_SIZE, (batch, NUM_STEPS + 8), generator=generator)


@cache
@torch.no_grad()
def steps(name: str, lengths: tuple[int, ...]) -> tuple[Tensor, DynamicCache]:
    """Return logits behind each token, and the cache, of a text that is read one by one."""
    reader, tokens = open_reader(name, lengths), text(len(lengths))
    logits = []
    for step in range(NUM_STEPS):
        logits.append(reader.feed(tokens[:, [step]]))
        reader.keep(1)
    reader.settle()
    return torch.cat(logits, dim=1), reader.cache


def require_equal_states(found: Any, expected: Any, where: str = "cache") -> None:
    """Compare what two objects hold: tensors nearly, anything else exactly."""
    if isinstance(expected, Tensor):
        assert found.shape == expected.shape, where
        assert found.dtype == expected.dtype, where
        size = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        assert torch.allclose(found, expected, rtol=0.0, atol=SPREAD * size), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            require_equal_states(found[key], value, f"{where}.{key}")
    else:
        assert found == expected, where


def require_equal_caches(found: DynamicCache, expected: DynamicCache) -> None:
    assert len(found.layers) == len(expected.layers)
    for index, (one, other) in enumerate(zip(found.layers, expected.layers, strict=True)):
        assert type(one) is type(other)
        require_equal_states(vars(one), vars(other), f"layer {index}")


@pytest.mark.parametrize("lengths", LENGTHS, ids=["one row", "padded rows"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_chains_score_as_steps_do_and_leave_the_same_cache(name, lengths):
    wanted, cache_of_steps = steps(name, lengths)
    reader, tokens = open_reader(name, lengths), text(len(lengths))
    spread, at = float(wanted.std()), 0
    for feeds, num_kept in ROUNDS:
        start = at
        for num_tokens in feeds:
            drafted = tokens[:, start : start + num_tokens].clone()
            is_wrong = torch.arange(start, start + num_tokens) >= at + num_kept
            drafted[:, is_wrong] = (drafted[:, is_wrong] + 1) % VOCAB_SIZE
            logits = reader.feed(drafted)
            num_right = max(min(at + num_kept - start, num_tokens), 0)
            expected = wanted[:, start : start + num_right]
            assert logits.shape[1] == num_tokens
            assert torch.allclose(logits[:, :num_right], expected, atol=10 * SPREAD * spread)
            start += num_tokens
        reader.keep(num_kept)
        at += num_kept
        assert reader.num_unread == 0 or name in OWING
    reader.feed(tokens[:, at:NUM_STEPS])
    reader.keep(NUM_STEPS - at)
    reader.feed(tokens[:, :3])
    reader.keep(0)
    reader.settle()
    require_equal_caches(reader.cache, cache_of_steps)


@pytest.mark.parametrize("name", OWING)
@torch.no_grad()
def test_settling_reads_what_is_owed_once(name):
    reader, tokens = open_reader(name, (5, 3)), text(2)
    for at in range(0, NUM_STEPS, 2):
        reader.feed(torch.cat([tokens[:, at : at + 2], tokens[:, :1]], dim=1))
        reader.keep(2)
    assert reader.num_unread == NUM_STEPS
    reader.settle()
    assert reader.num_unread == 0
    require_equal_caches(reader.cache, steps(name, (5, 3))[1])
    reader.settle()
    require_equal_caches(reader.cache, steps(name, (5, 3))[1])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_prompt_that_is_settled_at_once_is_plain_decodings_prefill(name):
    base, inputs = model(name), prompts(11, 6)
    reader = open_reader(name, (11, 6))
    reader.keep(1)  # nothing was fed
    reader.settle()
    plain = base.generate(
        **inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True
    )[CACHE_NAME]
    require_equal_caches(reader.cache, plain)


@pytest.mark.parametrize("name", ["bloom", "qwen3_next"])
@torch.no_grad()
def test_features_are_those_of_the_last_nodes_whatever_was_owed(name):
    view, inputs, tokens = TargetView(model(name)), prompts(7, 4), text(2)
    with view.decoding(TargetFeatures.LAST_HIDDEN):
        reader = ChainReader.of_prompt(view, inputs["attention_mask"])
        reader.prefill(inputs["input_ids"])
        reader.feed(tokens[:, :5])
        whole = view.features
        reader.keep(3)
        reader.feed(tokens[:, 3:5])
        found = view.features
    assert torch.allclose(found[:, -2:], whole[:, 3:], atol=1e-4)


@torch.no_grad()
def test_positions_and_masks_go_on_behind_what_was_read():
    seen = []
    base, inputs, tokens = model("qwen3_next"), prompts(6, 2), text(2)
    reader = ChainReader.of_prompt(TargetView(base), inputs["attention_mask"])
    reader.prefill(inputs["input_ids"])
    handle = base.register_forward_pre_hook(
        lambda _, __, named: seen.append(named), with_kwargs=True
    )
    reader.feed(tokens[:, :3])
    reader.keep(1)
    reader.feed(tokens[:, 1:3])
    reader.feed(tokens[:, 3:4])
    reader.keep(3)
    reader.feed(tokens[:, 4:5])
    handle.remove()
    assert [one["input_ids"].shape[1] for one in seen] == [3, 3, 1, 1]
    assert [one["position_ids"].tolist() for one in seen] == [
        [[6, 7, 8], [2, 3, 4]],
        [[6, 7, 8], [2, 3, 4]],  # the first one is owed
        [[9], [5]],
        [[10], [6]],
    ]
    assert [one["attention_mask"].shape[1] for one in seen] == [9, 9, 10, 11]
    assert all(one["attention_mask"][1, :4].sum() == 0 for one in seen)
    assert all(one["attention_mask"][:, 4:].all() for one in seen)


def test_a_model_without_a_dynamic_cache_is_refused():
    view = TargetView(shared_family("rwkv"))
    with pytest.raises(UnsupportedModelError, match=r"type none.*one DynamicCache"):
        ChainReader.of_prompt(view, torch.ones(1, 4, dtype=torch.long))


def test_two_caches_are_refused():
    inputs = {CACHE_NAME: DynamicCache(), "cache_params": DynamicCache()}
    with pytest.raises(UnsupportedModelError, match="DynamicCache, DynamicCache, chains need one"):
        ChainReader(TargetView(shared_model("bloom")), inputs)


@torch.no_grad()
def test_a_session_is_behind_once_more_is_owed_than_the_bound():
    cache = DynamicCache(config=model("qwen3_next").config)
    inputs = {CACHE_NAME: cache, "use_cache": True, "logits_to_keep": 1}
    view = TargetView(model("qwen3_next"))
    session = ChainSession(view, inputs, num_cached=0, is_callers=False)
    session.prefill(prompts(5)["input_ids"])
    session.keep([[0]])
    tokens = text(1)
    for num_unread in range(2, MAX_UNREAD + 3, 2):
        session.verify(tokens[:, :3], chain(2))
        session.keep([[0, 1]])
        assert session.is_behind == (num_unread > MAX_UNREAD)
    session.verify(tokens[:, :1], chain(0))
    session.keep([[0]])
    assert not session.is_behind


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_an_error_leaves_a_callers_filled_cache_as_it_was(name):
    base, tokens = model(name), text(1)
    key = cache_name(base)
    given, untouched = (DynamicCache(config=base.config) for _ in range(2))
    for one in (given, untouched):
        base(input_ids=tokens[:, :10], use_cache=True, **{key: one})
    inputs = {
        key: given,
        "attention_mask": torch.ones(1, 13, dtype=torch.long),
        "use_cache": True,
        "logits_to_keep": 1,
    }
    session = ChainSession(TargetView(base), inputs, num_cached=10, is_callers=True)
    session.prefill(tokens[:, 10:13])
    session.keep([[0]])
    session.verify(tokens[:, :4], chain(3))
    session.keep([[0, 1]])
    session.verify(tokens[:, :4], chain(3))
    session.abandon()
    require_equal_caches(given, untouched)
