"""What a generation leaves in a cache, against what regular generation leaves there."""

from functools import cache as cached

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from speclm.cache import TreeCache, import_cache
from speclm.target import TargetView
from speclm.target.tree_session import fill_rows, hand_over
from speclm.tree.topology import chain
from tests.models import VOCAB_SIZE, build_model, prompts, randomise

TOLERANCE = 2e-4  # of keys and values in float32
PROMPT, NEW = 12, 9
SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}


def gpt2(num_positions: int) -> GPT2LMHeadModel:
    shape = {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 2, "n_head": 2}
    return randomise(GPT2LMHeadModel(GPT2Config(**shape, **SPECIAL, n_positions=num_positions)))


@cached
def model_of(family: str) -> PreTrainedModel:
    return gpt2(PROMPT + NEW) if family == "gpt2" else build_model(family)


@torch.no_grad()
def decoded(
    view: TargetView, inputs: dict[str, Tensor], tokens: Tensor, counts: list[int]
) -> TreeCache:
    """Return a cache with `counts` new tokens of each row, each row at its own pace."""
    cache = view.new_cache((inputs["attention_mask"] == 0).sum(1))
    length = inputs["input_ids"].shape[1]
    view.prefill(inputs["input_ids"], cache, attention_mask=inputs["attention_mask"])
    for step in range(max(counts)):
        view.forward_tree(tokens[:, length + step, None], chain(0), cache)
        cache.keep([[0] if step < count else [] for count in counts])
    return cache


def require_equal(found: DynamicCache, expected: DynamicCache, padding: list[int]) -> None:
    assert found.get_seq_length() == expected.get_seq_length()
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert type(one) is type(other)
        assert one.keys.shape == other.keys.shape
        first = other.get_seq_length() - other.keys.shape[2]
        for row, count in enumerate(padding):
            skip = max(count - first, 0)  # what is at padding is of no meaning
            for stored, wanted in ((one.keys, other.keys), (one.values, other.values)):
                assert torch.allclose(stored[row, :, skip:], wanted[row, :, skip:], atol=TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gpt2"])
@pytest.mark.parametrize("ends", [(2, 6), (0, 8), (4, 4), ()])
@torch.no_grad()
def test_cache_is_that_of_plain_decoding_when_rows_end_apart(family, ends):
    model, inputs = model_of(family), prompts(PROMPT, PROMPT - 7, PROMPT - 3)
    free = model.generate(**inputs, max_new_tokens=NEW)[:, PROMPT:]
    stops = {"eos_token_id": [int(free[row, step]) for row, step in enumerate(ends)] or None}
    own = DynamicCache(config=model.config)
    tokens = model.generate(
        **inputs, past_key_values=own, max_new_tokens=NEW, pad_token_id=7, **stops
    )
    width = tokens.shape[1] - PROMPT - 1  # the last token is not fed
    counts = [min(step, width) for step in [*ends, width, width, width][:3]]
    view = TargetView(model)
    cache = decoded(view, inputs, tokens, counts)
    into = DynamicCache(config=model.config)
    hand_over(view, cache, into, tokens)
    require_equal(into, own, [0, 7, 3])


@torch.no_grad()
def test_rows_padded_alike_stay_within_learned_positions():
    model, inputs = gpt2(12), prompts(PROMPT)
    inputs["attention_mask"][:, :6] = 0
    inputs = {name: tensor.expand(2, -1) for name, tensor in inputs.items()}
    tokens = torch.cat([inputs["input_ids"], prompts(6, 6, seed=3)["input_ids"]], dim=1)
    view = TargetView(model)
    cache = decoded(view, inputs, tokens, [0, 5])  # the last of 5 is at position 10 of 0 to 11
    fill_rows(view, cache, tokens[:, :-1])
    assert cache.host_lengths == [PROMPT + 5] * 2


@torch.no_grad()
def test_pending_nodes_are_forgotten():
    view, inputs = TargetView(model_of("llama")), prompts(PROMPT, PROMPT)
    tokens = torch.cat([inputs["input_ids"], prompts(6, 6, seed=3)["input_ids"]], dim=1)
    caches = [decoded(view, inputs, tokens, [1, 3]) for _ in range(2)]
    view.forward_tree(torch.ones(2, 4, dtype=torch.long), chain(3), caches[1])
    outputs = [DynamicCache(), DynamicCache()]
    for cache, into in zip(caches, outputs, strict=True):
        hand_over(view, cache, into, tokens)
    require_equal(*outputs, [0, 0])


@torch.no_grad()
def test_nothing_runs_when_no_row_lacks_a_token(monkeypatch):
    model, inputs = model_of("llama"), prompts(PROMPT, 5)
    past = DynamicCache(config=model.config)
    model(**{name: tensor[:, :4] for name, tensor in inputs.items()}, past_key_values=past)
    view = TargetView(model)
    cache = view.new_cache(torch.tensor([0, 7]))
    import_cache(cache, past)
    view.prefill(inputs["input_ids"][:, 4:], cache, attention_mask=inputs["attention_mask"])
    monkeypatch.setattr(view, "forward_nodes", None)
    fill_rows(view, cache, inputs["input_ids"])
    hand_over(view, cache, past, inputs["input_ids"])
    assert past.get_seq_length() == PROMPT - 1
