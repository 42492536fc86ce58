"""Layers of EAGLE heads are those of Llama."""

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from speclm.drafting.decoder_parts import signed
from speclm.methods.eagle.layer import EagleAttention
from tests.methods.eagle.test_network import HIDDEN, NUMBERS, heads_of, is_close


def test_later_layers_are_those_of_llama():
    heads = heads_of(num_layers=2, rms_norm_eps=1e-5)
    llama = LlamaConfig(
        **{name: NUMBERS[name] for name in NUMBERS if name != "draft_vocab_size"},
        rms_norm_eps=1e-5,
        attn_implementation="eager",
    )
    layer = LlamaDecoderLayer(llama, layer_idx=0)
    layer.load_state_dict(heads.layers[1].state_dict())
    hidden, positions = torch.randn(1, 1, HIDDEN), torch.tensor([[7]])
    rotation = LlamaRotaryEmbedding(llama)(hidden, positions)
    expected = layer(hidden, position_embeddings=rotation)
    found = heads.layers[1](
        hidden[0],
        hidden[0],
        batch=1,
        rotation=signed(*rotation),
        attention_mask=None,
        past_key_values=None,
    )
    assert is_close(found, expected[0])


def test_without_a_mask_each_position_sees_the_window_before_it():
    attention = EagleAttention(heads_of(sliding_window=2).config, input_size=HIDDEN, index=0)
    mask = attention._causal_mask(2, torch.zeros(1, 2, 4, 4))
    assert mask.tolist() == [[False, True, True, False], [False, False, True, True]]
