"""Small models of many kinds of attention, and how far their trees are from their paths."""

from collections.abc import Sequence

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from speclm.cache import TreeCache
from speclm.target import TargetView
from speclm.tree.topology import from_parents
from tests.models import VOCAB_SIZE, WINDOW, prompts, randomise

CPU = torch.device("cpu")
TOLERANCE = 2e-5
"""Of the logits' spread: float32 sums over other numbers of slots round differently, and a router
of experts magnifies that; 1.004e-5 was seen on one processor."""


SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
WIDE = {"head_dim": 8, "sliding_window": WINDOW}
KINDS = {"layer_types": ["sliding_attention", "full_attention"]}
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "softcap, window and full": ("gemma2", {**WIDE, **KINDS, "attn_logit_softcapping": 2.0}),
    "two rotations": ("gemma3_text", {**WIDE, **KINDS}),
    "sinks": ("gpt_oss", {**WIDE, **KINDS, **MIXTURE, "num_local_experts": 4}),
    "no interface": ("xglm", {"num_layers": 2, "attention_heads": 4, "ffn_dim": 48}),
    "by name": ("falcon", {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "window in the mask": ("phimoe", {"sliding_window": WINDOW, "num_local_experts": 4}),
    "window in some masks": (
        "qwen2_moe",
        {**MIXTURE, "num_experts": 4, "shared_expert_intermediate_size": 8}
        | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "mask of its own": ("doge", {"sliding_window": WINDOW, "keep_window_size": 5}),
    "latent": (
        "deepseek_v3",
        {**LATENT, **MIXTURE, "v_head_dim": 12, "num_key_value_heads": 4, "head_dim": 8}
        | {"n_group": 1, "topk_group": 1, "n_routed_experts": 4, "first_k_dense_replace": 1},
    ),
}


def build(name: str) -> PreTrainedModel:
    model_type, settings = MODELS[name]
    known = dir(AutoConfig.for_model(model_type))
    shape = {key: value for key, value in SHAPE.items() if key in known}
    config = AutoConfig.for_model(model_type, **{**shape, **settings})
    return randomise(AutoModelForCausalLM.from_config(config).float())


PARENTS = [0, 0, 0, 1, 1, 3, 5, 6, 2]
"""Deeper than a half window, so that it ends in the prompt, in the kept path and in the tree."""
KEPT = [[0, 1, 4], [0, 2]]


def largest_error(model: PreTrainedModel) -> float:
    """Return how far trees of two rounds are from the model's own forward over each path."""
    view, topology = TargetView(model), from_parents([PARENTS], device=CPU)
    inputs = prompts(13, 10)
    padding = (inputs["attention_mask"] == 0).sum(1)
    rows = [row[skip:] for row, skip in zip(inputs["input_ids"], padding.tolist(), strict=True)]
    cache, worst = view.new_cache(padding), 0.0
    view.prefill(inputs["input_ids"], cache, attention_mask=inputs["attention_mask"])
    for seed in (1, 2):
        tree = prompts(len(PARENTS), len(PARENTS), seed=seed)["input_ids"]
        logits = view.forward_tree(tree, topology, cache)
        for row, before in enumerate(rows):
            for path in topology.path_indices[0].tolist():
                nodes = [node for node in path if node >= 0]
                text = torch.cat([before, tree[row, nodes]])
                expected = model(input_ids=text[None], use_cache=False).logits[0, -len(nodes) :]
                error = (logits[row, nodes] - expected).abs().max() / expected.std()
                worst = max(worst, float(error))
        cache.keep(KEPT)
        rows = [torch.cat([rows[row], tree[row, path]]) for row, path in enumerate(KEPT)]
    return worst


def cache_of(lengths: Sequence[int], padding: Sequence[int], *, pending: int = 0) -> TreeCache:
    cache = TreeCache(num_layers=1, num_padding=torch.tensor(padding))
    cache._set_lengths(list(lengths))
    cache.append(pending)
    return cache
