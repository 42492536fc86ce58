"""Small block heads with weights that matter, and what they compute one position at a time."""

import math

import torch

from speclm.methods.block.config import BlockConfig
from speclm.methods.block.network import BlockHeads

NUMBERS = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 4,
    "vocab_size": 20,
    "draft_vocab_size": 20,
    "block_size": 4,
    "feature_layers": (2, 4),
    "mask_token_id": 3,
    "windows": (None, None),
    "is_causal": (True, True),
    "predicts_next": True,
}
MARKOV = {"markov": "vanilla", "markov_rank": 3, "has_confidence": True}


def make_heads(*, dtype=torch.float64, seed=0, **changes):
    """Return heads whose every weight is random, norms included."""
    heads = BlockHeads(BlockConfig(**{**NUMBERS, **changes}), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in heads.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4
            parameter.copy_(drawn + 1 if "norm" in name else drawn)
    return heads.requires_grad_(requires_grad=False)


def rotate(vector, position, theta):
    half = len(vector) // 2
    turned = vector.clone()
    for pair in range(half):
        angle = position * theta ** (-pair / half)
        first, second = vector[pair], vector[pair + half]
        turned[pair] = first * math.cos(angle) - second * math.sin(angle)
        turned[pair + half] = second * math.cos(angle) + first * math.sin(angle)
    return turned


def draft_by_loop(heads, features, embeds, anchor):
    """Return the states of one block, computed by position, head and key.

    `features` are those of positions 0 to anchor - 1, `embeds` the inputs of the block.
    """
    config, weights = heads.config, dict(heads.named_parameters())

    def norm(vector, name):
        scale = (vector.square().mean() + config.rms_norm_eps).rsqrt()
        return vector * scale * weights[f"{name}.weight"]

    def linear(vector, name):
        bias = weights.get(f"{name}.bias", 0)
        return weights[f"{name}.weight"] @ vector + bias

    dim, theta = config.head_dim, config.rope_parameters["rope_theta"]
    states = [norm(linear(row, "fc"), "hidden_norm") for row in features]
    positions = range(anchor, anchor + len(embeds))
    block = list(embeds)
    for index in range(config.num_layers):
        name = f"layers.{index}"
        attention = f"{name}.self_attn"

        def heads_of(vector, part, position, attention=attention):
            split = linear(vector, f"{attention}.{part}_proj").view(-1, dim)
            if part == "v":
                return split
            normed = [norm(head, f"{attention}.{part}_norm") for head in split]
            return torch.stack([rotate(head, position, theta) for head in normed])

        normed = [norm(vector, f"{name}.input_layernorm") for vector in block]
        sources = [*enumerate(states), *zip(positions, normed, strict=True)]
        keys = [heads_of(vector, "k", position) for position, vector in sources]
        values = [heads_of(vector, "v", position) for position, vector in sources]
        window = config.windows[index]
        group = config.num_heads // config.num_kv_heads
        new_block = []
        for own, (position, vector) in enumerate(zip(positions, normed, strict=True)):
            queries = heads_of(vector, "q", position)
            seen = [
                at
                for at, (other, _) in enumerate(sources)
                if (at < len(states) or not config.is_causal[index] or other <= position)
                and (window is None or abs(position - other) < window)
            ]
            outputs = []
            for head, query in enumerate(queries):
                scores = torch.stack([query @ keys[at][head // group] for at in seen])
                shares = (scores / math.sqrt(dim)).softmax(0)
                outputs.append(
                    sum(s * values[at][head // group] for s, at in zip(shares, seen, strict=True))
                )
            hidden = block[own] + linear(torch.cat(outputs), f"{attention}.o_proj")
            inner = norm(hidden, f"{name}.post_attention_layernorm")
            gate = torch.nn.functional.silu(linear(inner, f"{name}.mlp.gate_proj"))
            inner = gate * linear(inner, f"{name}.mlp.up_proj")
            new_block.append(hidden + linear(inner, f"{name}.mlp.down_proj"))
        block = new_block
    first = 0 if config.predicts_next else 1
    return torch.stack([norm(vector, "norm") for vector in block[first:]])
