import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from speclm.bench import make_calls, setting_options
from speclm.demo.bundle import assets

PROMPTS = ["one two three four one two", "a b", "SELECT a FROM b WHERE a", "x"]


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(assets()["base"])


@pytest.fixture(scope="session")
def tiny_base(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.3,  # confident enough for argmax to be far from its runner-up
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def calls_of(tiny_base, tokenizer):
    def make(setting="greedy", *, batch=1, max_new_tokens=8):
        options = {**setting_options(setting), "max_new_tokens": max_new_tokens}
        return make_calls(PROMPTS, tiny_base, tokenizer, options=options, batch=batch, seed=3)

    return make
