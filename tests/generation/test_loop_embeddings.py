"""Prompts of vectors, which are read as they are; only new tokens are returned."""

from functools import cache

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    TextStreamer,
)
from transformers.generation import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from speclm import SpecModel
from speclm.cache import CACHE_NAME
from speclm.generation.regular import NeedsRegularGeneration, prompt_length
from speclm.target import TargetFeatures
from speclm.testing import ScriptedProposer
from tests.byte_tokenizer import byte_tokenizer
from tests.grids import turns
from tests.models import VOCAB_SIZE, build_model, prompts, randomise, shared_model
from tests.outcomes import observe, require_close, require_same
from tests.proposers import build_proposer

FAMILIES = ("llama", "gemma3", "gpt2")
LENGTHS = ((6,), (6, 3, 5))
KINDS = ("scripted", "random tree", "other draft", "joined")
MODES = (
    {"do_sample": False, "max_new_tokens": 11},
    {"do_sample": True, "max_new_tokens": 11},
    {
        "do_sample": True,
        "max_length": 20,
        "logits_processor": LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.2)]),
        "num_return_sequences": 2,
    },
)
# In an order in which each next one has another of both.
CASES = tuple((FAMILIES[at % 3], MODES[(at + at // 3) % 3]) for at in range(9))


@cache
def model_of(family):
    if family == "llama":
        return shared_model("llama")
    if family == "gpt2":
        config = GPT2Config(
            vocab_size=VOCAB_SIZE, n_embd=40, n_layer=2, n_head=4, n_positions=64, pad_token_id=0,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        return randomise(GPT2LMHeadModel(config))
    config = Gemma3TextConfig(
        vocab_size=VOCAB_SIZE, hidden_size=40, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=12, sliding_window=8,
        pad_token_id=0, bos_token_id=5, eos_token_id=None,
    )  # fmt: skip
    return randomise(Gemma3ForCausalLM(config))


@torch.no_grad()
def vectors(model, *lengths, with_tokens=False):
    """Return a prompt that no tokens have."""
    inputs = prompts(*lengths)
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    noise = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(1))
    inputs["inputs_embeds"] = embeddings + 0.3 * noise
    if not with_tokens:
        del inputs["input_ids"]
    return inputs


@pytest.mark.parametrize(
    ("kind", "lengths", "case"), turns((*KINDS, "scripted, with tokens"), LENGTHS, CASES)
)
def test_vectors_give_the_tokens_of_the_base(case, lengths, kind):
    family, mode = case
    kind, with_tokens = kind.split(",")[0], "with tokens" in kind
    base = model_of(family)
    inputs = vectors(base, *lengths, with_tokens=with_tokens)
    num_tokens = 6 if with_tokens else 0
    expected = observe(base, inputs, mode, base=base)
    reference = expected.sequences[:, num_tokens:].tolist()
    proposer = build_proposer(kind, reference, target=base, draft=shared_model("qwen3", 7))
    spec = SpecModel(base, proposer, adaptive=False)
    found = observe(spec, inputs, mode, base=base)
    require_same(found, expected)
    assert not spec.last_speculation.fallbacks
    if kind == "scripted":
        assert found.num_forwards < expected.num_forwards


@pytest.mark.parametrize("lengths", LENGTHS)
def test_scores_cache_and_stream_are_those_of_the_base(lengths, capsys):
    base = shared_model("llama")
    mode = {
        "max_new_tokens": 9,
        "min_new_tokens": 3,
        "do_sample": True,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    if len(lengths) == 1:
        mode["streamer"] = TextStreamer(byte_tokenizer())
    inputs = vectors(base, *lengths)
    torch.manual_seed(3)
    expected = base.generate(**inputs, **mode)
    printed = capsys.readouterr().out
    spec = SpecModel(base, ScriptedProposer(expected.sequences.tolist(), wrong_at=(4,)))
    torch.manual_seed(3)
    found = spec.generate(**inputs, **mode)
    assert torch.equal(found.sequences, expected.sequences)
    assert capsys.readouterr().out == printed
    require_close(found.scores, expected.scores)
    assert found[CACHE_NAME].get_seq_length() == 6 + 8
    layers = (found[CACHE_NAME].layers, expected[CACHE_NAME].layers)
    for layer, other in zip(*layers, strict=True):
        torch.testing.assert_close(layer.keys, other.keys, atol=1e-4, rtol=1e-4)


def test_mask_may_be_left_out_and_tokens_may_be_none():
    base = shared_model("llama")
    inputs = {"inputs_embeds": vectors(base, 6)["inputs_embeds"]}
    options = {"do_sample": False, "max_new_tokens": 5}
    spec = SpecModel(base, None)
    expected = base.generate(**inputs, **options)
    assert torch.equal(spec.generate(**inputs, **options), expected)
    empty = torch.zeros(1, 0, dtype=torch.long)
    assert torch.equal(spec.generate(empty, **inputs, **options), expected)
    assert not spec.last_speculation.fallbacks


@pytest.mark.parametrize("kind", ["ngram", "random Medusa"])
@pytest.mark.parametrize("bos_token_id", [None, 7])
def test_proposers_are_told_of_one_token(kind, bos_token_id, monkeypatch):
    base = build_model("llama", bos_token_id=bos_token_id)
    proposer = build_proposer(kind, [], target=base, draft=base)
    told = []
    begin = type(proposer).begin
    monkeypatch.setattr(
        type(proposer), "begin", lambda self, prompt: (told.append(prompt), begin(self, prompt))
    )
    SpecModel(base, proposer).generate(**vectors(base, 6, 4), max_new_tokens=3, do_sample=False)
    (prompt,) = told
    assert prompt.tokens.shape == (2, 0)
    assert prompt.num_padding.tolist() == [0, 0]
    assert prompt.first_tokens.tolist() == [bos_token_id or 0] * 2
    if proposer.features != TargetFeatures.NONE:
        assert prompt.features.shape == (2, 0, 40)


def test_vectors_beside_some_tokens_or_a_filled_cache_are_left_to_the_base():
    base, inputs = shared_model("llama"), vectors(shared_model("llama"), 6)
    spec = SpecModel(base, None)
    inputs["input_ids"] = prompts(4)["input_ids"]
    options = {"do_sample": False, "max_new_tokens": 5}
    expected = base.generate(**inputs, **options)
    assert torch.equal(spec.generate(**inputs, **options), expected)
    (reason,) = spec.last_speculation.fallbacks
    assert "inputs_embeds for 6 tokens next to 4 tokens and 0 cached ones" in reason


def test_filled_cache_beside_vectors_needs_plain_decoding():
    given = DynamicCache()
    given.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)
    tokens, embeddings = torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 6, 8)
    with pytest.raises(NeedsRegularGeneration, match="6 tokens next to 0 tokens and 2 cached ones"):
        prompt_length(tokens, None, GenerationConfig(), given, embeddings)
    assert prompt_length(tokens, torch.ones(1, 6), GenerationConfig(), None, embeddings) == 6
