"""Keys, shapes and configs of EAGLE heads, typed from what others publish."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

H, INNER, V, DRAFT = 8, 12, 20, 5
# SafeAILab's v1: hidden 8, four query and two key heads of width 2.
EAGLE1 = {
    "embed_tokens.weight": (20, 8),
    "fc.weight": (8, 16),
    "fc.bias": (8,),
    "layers.0.self_attn.q_proj.weight": (8, 8),
    "layers.0.self_attn.k_proj.weight": (4, 8),
    "layers.0.self_attn.v_proj.weight": (4, 8),
    "layers.0.self_attn.o_proj.weight": (8, 8),
    "layers.0.mlp.gate_proj.weight": (12, 8),
    "layers.0.mlp.up_proj.weight": (12, 8),
    "layers.0.mlp.down_proj.weight": (8, 12),
    "layers.0.post_attention_layernorm.weight": (8,),
}
# SafeAILab's and SpecForge's EAGLE-3 with head_dim 4, which is not 8 / 4 heads.
EAGLE3 = {
    "d2t": (5,),
    "t2d": (20,),
    "fc.weight": (8, 24),
    "lm_head.weight": (5, 8),
    "midlayer.hidden_norm.weight": (8,),
    "midlayer.input_layernorm.weight": (8,),
    "midlayer.mlp.down_proj.weight": (8, 12),
    "midlayer.mlp.gate_proj.weight": (12, 8),
    "midlayer.mlp.up_proj.weight": (12, 8),
    "midlayer.post_attention_layernorm.weight": (8,),
    "midlayer.self_attn.k_proj.weight": (8, 16),
    "midlayer.self_attn.o_proj.weight": (8, 16),
    "midlayer.self_attn.q_proj.weight": (16, 16),
    "midlayer.self_attn.v_proj.weight": (8, 16),
    "norm.weight": (8,),
}
EAGLE1_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-05,
    "hidden_act": "silu",
    "vocab_size": 20,
    "pad_token_id": 0,
    "torch_dtype": "float16",
}
EAGLE3_CONFIG = {
    **EAGLE1_CONFIG,
    "architectures": ["LlamaForCausalLMEagle3"],
    "head_dim": 4,
    "draft_vocab_size": 5,
    "bos_token_id": 1,
    "tie_word_embeddings": False,
}
SPECULATORS_CONFIG = {
    "speculators_model_type": "eagle3",
    "speculators_version": "0.9.0",
    "architectures": ["Eagle3Speculator"],
    "draft_vocab_size": 5,
    "norm_before_residual": True,
    "norm_before_fc": True,
    "fc_norm": False,
    "norm_output": True,
    "target_hidden_size": None,
    "tie_word_embeddings": False,
    "eagle_aux_hidden_state_layer_ids": [1, 4, 8],
    "speculators_config": {
        "algorithm": "eagle3",
        "default_proposal_method": "greedy",
        "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
        "verifier": {"name_or_path": "org/base", "architectures": ["LlamaForCausalLM"]},
    },
    "transformer_layer_config": {
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "num_hidden_layers": 1,
        "vocab_size": 20,
        "rms_norm_eps": 1e-6,
        "layer_types": ["sliding_attention"],
        "use_sliding_window": True,
        "sliding_window": 16,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    },
}
DRAFTED = [0, 3, 4, 11, 19]


def tensors(table, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    state = {k: torch.randn(shape, generator=generator).to(dtype) for k, shape in table.items()}
    if "d2t" in state:
        state["d2t"] = torch.tensor([0, 2, 2, 8, 15])
    if "t2d" in state:
        state["t2d"] = torch.tensor([token in DRAFTED for token in range(20)])
    return state


def save(folder: Path, state, *, name="model.safetensors", config=EAGLE3_CONFIG) -> Path:
    if name.endswith(".safetensors"):
        save_file(state, folder / name)
    else:
        torch.save(state, folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def renamed(table, old, new):
    return {key.replace(old, new): shape for key, shape in table.items()}
