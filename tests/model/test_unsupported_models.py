"""Models that take no trees decode as they always do and say why, or are refused with an error."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from speclm import SpecModel
from speclm.cache import CACHE_NAME
from speclm.errors import UnsupportedModelError
from speclm.methods.ngram.proposer import NgramProposer
from speclm.self_check.verdict import Verification
from tests.grids import turns
from tests.models import VOCAB_SIZE, prompts, randomise

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def build(model_type: str, **settings: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **settings})
    return randomise(AutoModelForCausalLM.from_config(config))


class TinyConfig(PretrainedConfig):
    """Config of a model that a user wrote."""

    model_type = "tiny_of_a_user"

    def __init__(self, *, heeds_mask: bool = False, **kwargs: object) -> None:
        super().__init__(**{"num_hidden_layers": 1, **kwargs})
        self.vocab_size = VOCAB_SIZE
        self.hidden_size = 32
        self.num_hidden_layers = 1
        self.heeds_mask = heeds_mask


class Tiny(PreTrainedModel, GenerationMixin):
    """One layer of causal attention that knows no interface, and no mask but its own."""

    config_class = TinyConfig

    def __init__(self, config: TinyConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.embed = nn.Embedding(config.vocab_size, width)
        self.positions = nn.Embedding(64, width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.head = nn.Linear(width, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
        past_key_values: DynamicCache | None = None,  # before Transformers 5.24
        cache: DynamicCache | None = None,
        **_: object,
    ) -> CausalLMOutputWithPast:
        cache = past_key_values if cache is None else cache
        past = 0 if cache is None else cache.get_seq_length()
        num_new = input_ids.shape[1]
        slots = torch.arange(past, past + num_new)
        hidden = self.embed(input_ids) + self.positions(slots)
        query, key, value = (part[:, None] for part in self.qkv(hidden).chunk(3, dim=-1))
        if cache is not None:
            key, value = cache.update(key, value, 0)
        visible = torch.arange(key.shape[2]) <= slots[:, None]
        hidden = hidden + F.scaled_dot_product_attention(query, key, value, visible)[:, 0]
        logits = self.head(hidden[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=logits, **{CACHE_NAME: cache})


class WithoutPositions(Tiny):
    """Takes neither positions nor a number of logits, as older code does."""

    def forward(
        self,
        input_ids,
        attention_mask=None,
        use_cache=True,
        return_dict=None,
        past_key_values=None,
        cache=None,
    ):
        return super().forward(input_ids, past_key_values=past_key_values, cache=cache)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    # no key/value cache: every forward reads the whole text
    "openai-gpt": lambda: build("openai-gpt"),
    "xlm": lambda: build("xlm", causal=True, n_words=VOCAB_SIZE, emb_dim=32, n_layers=2, n_heads=4),
    # attention that takes no mask from outside, or adds positions by slot
    "bloom": lambda: build("bloom", n_layer=2, n_head=4),
    "mpt": lambda: build("mpt", d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    # recurrent, or with a cache of its own
    "mamba": lambda: build("mamba", state_size=4),
    "minimax": lambda: build(
        "minimax", layer_types=["linear_attention", "full_attention"], num_local_experts=2
    ),
    # code of others
    "ignores masks": lambda: randomise(Tiny(TinyConfig())),
    "old signature": lambda: randomise(WithoutPositions(TinyConfig())),
}


@pytest.mark.parametrize(
    ("name", "settings"),
    turns(MODELS, [{"do_sample": False}, {"do_sample": True, "top_k": 20}]),
)
def test_models_without_trees_give_their_own_tokens_and_the_reason(name, settings):
    model = MODELS[name]()
    spec = SpecModel(model, NgramProposer())
    check = spec.self_check
    assert check.verification is not Verification.TREES
    inputs = prompts(9, 9)
    torch.manual_seed(3)
    expected = model.generate(**inputs, **settings, max_new_tokens=8)
    torch.manual_seed(3)
    assert torch.equal(spec.generate(**inputs, **settings, max_new_tokens=8), expected)
    stats = spec.last_speculation
    assert stats.self_check == check.reason
    if check.verification is Verification.REGULAR:
        assert stats.verification == "regular generation"
        assert stats.fallbacks == [check.reason]
    lines: list[str] = []
    spec.print_report(write=lines.append)
    assert any(check.reason in line for line in lines)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("bert", {"is_decoder": True}),
        ("ctrl", {"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48, "n_positions": 64}),
    ],
)
def test_old_models_give_their_own_tokens_whatever_the_check_finds(model_type, settings):
    model = build(model_type, **settings)
    expected = model.generate(**prompts(9, 5), do_sample=False, max_new_tokens=8)
    spec = SpecModel(model, NgramProposer())
    output = spec.generate(**prompts(9, 5), do_sample=False, max_new_tokens=8)
    assert torch.equal(output, expected)


def test_encoder_decoders_are_refused():
    config = T5Config(vocab_size=32, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    with pytest.raises(UnsupportedModelError, match="not a decoder-only"):
        SpecModel(T5ForConditionalGeneration(config), None)


def test_models_that_cannot_generate_are_refused():
    with pytest.raises(UnsupportedModelError, match="not a decoder-only"):
        SpecModel(build("llama").model, None)
