"""Forwards over prompts and trees against the model's own over every path."""

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.llama import LlamaModel

from speclm.errors import PromptError, UnsupportedModelError
from speclm.target import TargetView
from speclm.tree.topology import chain, from_parents
from tests.models import FAMILIES, VOCAB_SIZE, build_model, prompts, shared_model

TOLERANCE = 2e-4  # of logits whose spread is about 3, over 11 positions in float32
PARENTS = [[0, 0, 0, 1, 3, 4, 5, 2], [0, 0, 1, 2, 3, 4, 5, 7]]  # the last node is padding


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_tree_logits_are_those_of_a_plain_forward_over_each_path(family):
    model, view = shared_model(family), TargetView(shared_model(family))
    inputs = prompts(9, 5)
    padding = (inputs["attention_mask"] == 0).sum(1)
    cache = view.new_cache(padding)
    view.prefill(inputs["input_ids"], cache, attention_mask=inputs["attention_mask"])
    rows = [inputs["input_ids"][row, int(padding[row]) :] for row in range(2)]
    topology = from_parents(PARENTS, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    for kept in ([[0, 1, 3], [0]], [[0, 2, 7], [0, 1, 2, 3]], [[], [0]]):
        tokens = torch.randint(1, VOCAB_SIZE, (2, 8), generator=generator)
        logits = view.forward_tree(tokens, topology, cache)
        for row, prefix in enumerate(rows):
            for node, path in enumerate(topology.path_indices[row].tolist()):
                above = [index for index in path if index >= 0]
                if above:
                    sequence = torch.cat([prefix, tokens[row, above]])[None]
                    expected = model(input_ids=sequence).logits[0, -1]
                    assert torch.allclose(logits[row, node], expected, atol=TOLERANCE)
        assert logits.isfinite().all()
        cache.keep(kept)
        rows = [torch.cat([rows[row], tokens[row, path]]) for row, path in enumerate(kept)]


@torch.no_grad()
def test_nodes_fed_level_by_level_are_those_of_one_tree():
    view = TargetView(shared_model("qwen2"))
    inputs = prompts(7)["input_ids"]
    tokens = torch.tensor([[4, 5, 6, 7]])
    topology = from_parents([[0, 0, 0, 1]], device=torch.device("cpu"))
    caches = [view.new_cache(torch.tensor([0])) for _ in range(2)]
    for cache in caches:
        view.prefill(inputs, cache)
    whole = view.forward_tree(tokens, topology, caches[0])
    parts = [
        view.forward_nodes(
            tokens[:, first:past],
            topology.ancestor_mask[:, first:past, :past],
            topology.depths[:, :past],
            caches[1],
        )
        for first, past in ((0, 1), (1, 3), (3, 4))
    ]
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=TOLERANCE)
    assert caches[1].num_pending == 4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_cached", [0, 1, 6, 12])
@torch.no_grad()
def test_prompt_and_tree_in_one_forward_behind_a_prefix_are_those_of_two(family, num_cached):
    view, inputs = TargetView(shared_model(family)), prompts(13, 5)
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    topology = from_parents(PARENTS, device=torch.device("cpu"))
    nodes = torch.arange(1, 17).view(2, 8)
    nodes[:, 0] = tokens[:, -1]
    caches = [view.new_cache((mask == 0).sum(1)) for _ in range(2)]
    for cache in caches:
        if num_cached:
            view.prefill(tokens[:, :num_cached], cache, attention_mask=mask[:, :num_cached].clone())
    merged = view.forward_tree(nodes, topology, caches[0], prompt=tokens[:, num_cached:-1])
    view.prefill(tokens[:, num_cached:], caches[1], attention_mask=mask)
    caches[1].split(12, num_pending=0)
    expected = view.forward_tree(nodes, topology, caches[1])
    assert torch.allclose(merged, expected, atol=TOLERANCE)
    assert caches[0].host_lengths == caches[1].host_lengths == [12, 12]
    assert caches[0].num_pending == caches[1].num_pending == 8
    for cache in caches:
        cache.keep([[0, 1, 3], [0]])
    logits = [view.forward_tree(nodes, topology, cache) for cache in caches]
    assert torch.allclose(logits[0], logits[1], atol=TOLERANCE)


@torch.no_grad()
def test_position_ids_may_cover_what_is_cached():
    view, inputs = TargetView(shared_model("llama")), prompts(9)["input_ids"]
    positions = torch.arange(9)[None]
    logits = []
    for given in (None, positions, positions[:, 5:]):
        cache = view.new_cache(torch.tensor([0]))
        view.prefill(inputs[:, :5], cache)
        logits.append(view.prefill(inputs[:, 5:], cache, position_ids=given))
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_facts_of_the_model():
    view = TargetView(shared_model("qwen2"))
    assert (view.vocab_size, view.num_layers, view.max_positions) == (VOCAB_SIZE, 3, 512)
    assert view.device == torch.device("cpu")
    assert view.name == "Qwen2ForCausalLM"
    named = build_model("llama")
    named.config._name_or_path = "org/model"
    assert TargetView(named).name == "org/model"


def test_prompt_as_long_as_the_models_positions_fits():
    view = TargetView(shared_model("llama"))
    view.require_prompt_fits(512)
    with pytest.raises(PromptError, match=r"513 tokens.*max_position_embeddings 512"):
        view.require_prompt_fits(513)


def test_models_without_a_causal_head_are_refused():
    seq2seq = T5ForConditionalGeneration(
        T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    for model in (seq2seq, LlamaModel(shared_model("llama").config)):
        with pytest.raises(UnsupportedModelError, match="decoder-only language model") as caught:
            TargetView(model)
        assert isinstance(caught.value, TypeError)


@torch.no_grad()
def test_failing_forward_leaves_the_model_as_it_was():
    model = build_model("llama")
    view = TargetView(model)
    cache = view.new_cache(torch.tensor([0]))
    view.prefill(prompts(5)["input_ids"], cache)
    with pytest.raises(IndexError):
        view.forward_tree(torch.tensor([[VOCAB_SIZE + 1]]), chain(0), cache)
    assert model.config._attn_implementation == "sdpa"
    assert not model.training
