"""Tiny random models, prompts and plain outputs that several tests share."""

from functools import cache

import torch
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

VOCAB_SIZE = 160
WINDOW = 8  # shorter than most prompts, so that it ends inside a draft
FAMILIES = ("llama", "qwen2", "qwen3", "mistral")

_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 40,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"head_dim": 20, "attention_bias": True}),
    "qwen2": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
        },
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 12, "num_key_value_heads": 1}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": WINDOW, "head_dim": 12}),
    # These take chains alone: positions by slot, and a recurrent state in every second layer.
    "bloom": (BloomForCausalLM, BloomConfig, {"n_layer": 2, "n_head": 4}),
    "qwen3_next": (
        Qwen3NextForCausalLM,
        Qwen3NextConfig,
        {
            "layer_types": ["linear_attention", "full_attention"],
            "head_dim": 12,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 0,
        },
    ),
}


def build_model(family: str, *, seed: int = 0, **settings: object) -> PreTrainedModel:
    """Return a new random model whose greedy output does not repeat itself at once."""
    model_type, config_type, own = _FAMILIES[family]
    model = model_type(config_type(**{**_SHAPE, **own, **settings}))
    return randomise(model, seed=seed)


def randomise(model: PreTrainedModel, *, seed: int = 0) -> PreTrainedModel:
    """Redraw the weights from a fixed seed, large enough for peaked and varied laws."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                scale = 1.0 if "embed" in name else 3.0 * parameter.shape[1] ** -0.5
                parameter.copy_(noise * scale)
            elif name.endswith("bias"):
                parameter.copy_(noise * 0.3)
            else:
                parameter.copy_(1.0 + 0.2 * noise)  # a norm
    return model.eval()


@cache
def shared_model(family: str, seed: int = 0) -> PreTrainedModel:
    """Return the same model to every test, which must leave it as it is."""
    return build_model(family, seed=seed)


def prompts(*lengths: int, vocab_size: int = VOCAB_SIZE, seed: int = 0) -> dict[str, Tensor]:
    """Return random prompts of the given lengths, padded on the left."""
    generator = torch.Generator().manual_seed(1000 + seed)
    longest = max(lengths)
    tokens = torch.zeros(len(lengths), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, length in enumerate(lengths):
        drawn = torch.randint(1, vocab_size, (length,), generator=generator)
        tokens[row, longest - length :] = drawn
        mask[row, longest - length :] = 1
    return {"input_ids": tokens, "attention_mask": mask}


def generate(model: object, inputs: dict[str, Tensor], *, seed: int = 5, **settings: object):
    """Return what `generate` returns under a seed, and the generator's state afterwards."""
    torch.manual_seed(seed)
    output = model.generate(**inputs, **settings)
    return output, torch.get_rng_state()
