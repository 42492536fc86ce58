"""Tiny random models, prompts and plain outputs that several tests share."""

from functools import cache

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 160
WINDOW = 8  # shorter than most prompts, so that it ends inside a draft

SHAPE: dict[str, object] = {
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
SETTINGS: dict[str, dict[str, object]] = {
    "llama": {"head_dim": 20, "attention_bias": True},
    "qwen2": {
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
    },
    "qwen3": {"head_dim": 12, "num_key_value_heads": 1},
    "mistral": {"sliding_window": WINDOW, "head_dim": 12},
    # These take chains alone: positions by slot, and a recurrent state in every second layer.
    "bloom": {"n_layer": 2, "n_head": 4},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 12,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 0,
    },
}
FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
"""Families that stand for all with trees where a test is long; the rest are in tests/families."""


def build_model(family: str, *, seed: int = 0, **settings: object) -> PreTrainedModel:
    """Return a new random model whose greedy output does not repeat itself at once."""
    config = AutoConfig.for_model(family, **{**SHAPE, **SETTINGS[family], **settings})
    return randomise(AutoModelForCausalLM.from_config(config), seed=seed)


def randomise(
    model: PreTrainedModel, *, seed: int = 0, embedding_scale: float = 1.0
) -> PreTrainedModel:
    """Redraw the weights from a fixed seed, large enough for peaked and varied distributions.

    Args:
        model: Changed in place.
        seed: Of the weights.
        embedding_scale: Standard deviation of embeddings. Where they are the head too, large ones
            let every token repeat itself.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                inputs = parameter.shape[1 if parameter.dim() == 2 else -1]
                parameter.copy_(noise * (embedding_scale if "embed" in name else 3 * inputs**-0.5))
            elif name.endswith("bias"):
                parameter.copy_(noise * 0.3)
            else:
                parameter.copy_(1.0 + 0.2 * noise)  # a norm, a sink, a step of a recurrence
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
