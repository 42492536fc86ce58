"""Tokens are taken back out of Transformers' caches without a trace."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from speclm.cache import Rewind, held, put_back
from tests.models import VOCAB_SIZE, prompts, shared_model

LENGTHS = (11, 6)


def tensors_of(cache: DynamicCache) -> list[Tensor]:
    found: list[Tensor] = []
    for layer in cache.layers:
        for value in vars(layer).values():
            parts = value.values() if isinstance(value, dict) else [value]
            found += [part.clone() for part in parts if isinstance(part, Tensor)]
    return found


def attributes_of(cache: DynamicCache) -> list[dict[str, Any]]:
    plain = int | bool | None
    return [
        {n: v for n, v in vars(layer).items() if isinstance(v, plain)} for layer in cache.layers
    ]


@torch.no_grad()
def read(model: PreTrainedModel, cache: DynamicCache, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, past_key_values=cache, use_cache=True).logits


def filled(model: PreTrainedModel) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    read(model, cache, prompts(LENGTHS[0], LENGTHS[0])["input_ids"])
    return cache


def some_tokens(num_tokens: int) -> Tensor:
    return torch.arange(2 * num_tokens).view(2, -1) * 7 % VOCAB_SIZE


def require_same(found: DynamicCache, expected: DynamicCache) -> None:
    for one, other in zip(tensors_of(found), tensors_of(expected), strict=True):
        assert torch.equal(one, other)
    assert attributes_of(found) == attributes_of(expected)


@pytest.mark.parametrize("num_dropped", [0, 1, 3])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_dropped_slots_leave_what_a_shorter_text_leaves(family, num_dropped):
    model, tokens = shared_model(family), some_tokens(3)
    cache, expected = filled(model), filled(model)
    rewind = Rewind(cache)
    assert rewind.drops_slots
    rewind.mark()
    read(model, cache, tokens)
    rewind.drop(num_dropped)
    if num_dropped < 3:
        read(model, expected, tokens[:, : 3 - num_dropped])
    rewind.release()
    assert cache.get_seq_length() == LENGTHS[0] + 3 - num_dropped
    for one, other in zip(tensors_of(cache), tensors_of(expected), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert attributes_of(cache) == attributes_of(expected)


def test_recurrent_states_are_restored_as_often_as_they_are_marked():
    model = shared_model("qwen3_next")
    cache, expected = filled(model), filled(model)
    rewind = Rewind(cache)
    assert not rewind.drops_slots
    for num_tokens in (1, 4):
        rewind.mark()
        read(model, cache, some_tokens(num_tokens))
        rewind.restore()
        require_same(cache, expected)
    rewind.release()
    require_same(cache, expected)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3_next"])
@pytest.mark.parametrize("is_empty", [True, False])
def test_what_was_held_is_put_back(family, is_empty):
    model = shared_model(family)
    cache, expected = (
        DynamicCache(config=model.config) if is_empty else filled(model) for _ in range(2)
    )
    states = held(cache)
    read(model, cache, some_tokens(5))
    put_back(cache, states)
    require_same(cache, expected)


def test_layers_that_were_added_meanwhile_are_removed():
    model, cache = shared_model("llama"), DynamicCache()
    states = held(cache)
    read(model, cache, some_tokens(5))
    put_back(cache, states)
    assert cache.layers == []


@torch.no_grad()
def test_a_further_forward_is_shown_no_more_of_a_window_than_it_asks_for():
    model, tokens = shared_model("mistral"), some_tokens(5)
    cache, expected = filled(model), filled(model)
    rewind = Rewind(cache)
    rewind.mark()
    read(model, cache, tokens[:, :3])
    for step in (3, 4):
        rewind.narrow()
        assert all(layer.keys.shape[-2] == layer.sliding_window - 1 for layer in cache.layers)
        read(model, cache, tokens[:, [step]])
    rewind.drop(2)
    rewind.release()
    read(model, expected, tokens[:, :3])
    require_same(cache, expected)
