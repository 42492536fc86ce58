"""Vocabularies that were resized or padded, and logits that are scaled or capped."""

from functools import cache

import pytest
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from speclm import SpecModel
from tests.exactness import MODES, require_exact, tiny
from tests.grids import turns
from tests.models import prompts, randomise

NUM_IDS = 70
LENGTHS = ((9,), (9, 4, 2))

RESIZED = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama, tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "gpt2": (GPT2LMHeadModel, GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "cohere": (CohereForCausalLM, CohereConfig, {}),
}
SCALED = {
    "cohere": (CohereForCausalLM, CohereConfig, {"logit_scale": 0.3}),
    "granite": (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 3.0}),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config,
        {
            "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 5.0,
            "sliding_window": 8,
            "query_pre_attn_scalar": 8,
        },
    ),
}


@cache
def resized(name):
    model_type, config_type, own = RESIZED[name]
    model = tiny(model_type, config_type, **own)
    model.resize_token_embeddings(NUM_IDS, pad_to_multiple_of=64)
    return SpecModel(randomise(model), None)


@cache
def scaled(name):
    model_type, config_type, own = SCALED[name]
    return SpecModel(tiny(model_type, config_type, **own), None)


@pytest.mark.parametrize(("name", "lengths", "mode"), turns(RESIZED, LENGTHS, MODES))
def test_base_with_resized_and_padded_embeddings(name, lengths, mode):
    spec = resized(name)
    assert spec.base.get_output_embeddings().weight.shape[0] == 128
    inputs = prompts(*lengths, vocab_size=NUM_IDS)
    require_exact(spec, inputs, max_new_tokens=10, **MODES[mode])


@pytest.mark.parametrize(("name", "lengths", "mode"), turns(SCALED, LENGTHS, MODES))
def test_base_whose_logits_are_scaled_or_capped(name, lengths, mode):
    inputs = prompts(*lengths, vocab_size=60)
    require_exact(scaled(name), inputs, max_new_tokens=10, **MODES[mode])
