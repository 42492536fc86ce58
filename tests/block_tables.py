"""Keys, shapes and configs of block drafters, typed from what others publish."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

H, INNER, V, DRAFT, RANK = 8, 12, 20, 5, 3
LAYER = {
    "input_layernorm.weight": (8,),
    "mlp.down_proj.weight": (8, 12),
    "mlp.gate_proj.weight": (12, 8),
    "mlp.up_proj.weight": (12, 8),
    "post_attention_layernorm.weight": (8,),
    "self_attn.k_norm.weight": (4,),
    "self_attn.k_proj.weight": (8, 8),
    "self_attn.o_proj.weight": (8, 16),
    "self_attn.q_norm.weight": (4,),
    "self_attn.q_proj.weight": (16, 8),
    "self_attn.v_proj.weight": (8, 8),
}
# z-lab's DFlash: five layers that read five hidden states, head_dim 4, which is not 8 / 4 heads.
DFLASH = {
    "fc.weight": (8, 40),
    "hidden_norm.weight": (8,),
    **{f"layers.{i}.{name}": shape for i in range(5) for name, shape in LAYER.items()},
    "norm.weight": (8,),
}
MARKOV = {"markov_head.markov_w1.weight": (20, 3), "markov_head.markov_w2.weight": (20, 3)}
CONFIDENCE = {"confidence_head.proj.bias": (1,), "confidence_head.proj.weight": (1, 11)}
# DeepSpec's DSpark keeps frozen copies of the base's embeddings and output matrix.
DSPARK = {
    **DFLASH,
    **MARKOV,
    **CONFIDENCE,
    "embed_tokens.weight": (20, 8),
    "lm_head.weight": (20, 8),
}
GATED = {"markov_head.gate_proj.bias": (3,), "markov_head.gate_proj.weight": (3, 11)}
RNN = {"markov_head.joint_proj.bias": (9,), "markov_head.joint_proj.weight": (9, 14)}
LISTS = {"d2t": (5,), "t2d": (20,)}
QWEN3 = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 4,
    "hidden_act": "silu",
    "hidden_size": 8,
    "initializer_range": 0.02,
    "intermediate_size": 12,
    "layer_types": ["full_attention"] * 5,
    "max_position_embeddings": 64,
    "max_window_layers": 5,
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_hidden_layers": 5,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 20,
}
ZLAB_CONFIG = {
    **QWEN3,
    "architectures": ["DFlashDraftModel"],
    "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
    "block_size": 16,
    "dflash_config": {"mask_token_id": 19, "target_layer_ids": [1, 9, 17, 25, 33]},
    "dtype": "bfloat16",
    "num_target_layers": 36,
    "rope_scaling": None,
}
DEEPSPEC_CONFIG = {
    **QWEN3,
    "architectures": ["Qwen3DSparkModel"],
    "block_size": 7,
    "confidence_head_with_markov": True,
    "enable_confidence_head": True,
    "markov_head_type": "vanilla",
    "markov_rank": 3,
    "mask_token_id": 19,
    "num_anchors": 512,
    "num_target_layers": 36,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    "target_layer_ids": [1, 9, 17, 25, 33],
}
SPECFORGE_CONFIG = {
    **QWEN3,
    "architectures": ["DSparkDraftModel"],
    "block_size": 16,
    "dflash_config": {
        "mask_token_id": 19,
        "target_layer_ids": [1, 9, 17, 25, 33],
        "projector_type": "dspark",
        "markov_rank": 3,
        "markov_head_type": "vanilla",
        "confidence_head_alpha": 1.0,
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
    },
    "num_target_layers": 36,
}
JETSPEC_CONFIG = {
    **ZLAB_CONFIG,
    "dflash_config": {**ZLAB_CONFIG["dflash_config"], "causal_head": True},
}
SPECULATORS_CONFIG = {
    "speculators_model_type": "dflash",
    "speculators_version": "0.9.0",
    "architectures": ["DFlashSpeculator"],
    "aux_hidden_state_layer_ids": [2, 10, 18, 26, 34],
    "block_size": 8,
    "draft_vocab_size": 5,
    "dtype": "bfloat16",
    "mask_token_id": 19,
    "sample_from_anchor": False,
    "sliding_window_non_causal": False,
    "target_hidden_size": None,
    "tie_word_embeddings": False,
    "speculators_config": {
        "algorithm": "dflash",
        "default_proposal_method": "greedy",
        "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 7}],
        "verifier": {"name_or_path": "org/base", "architectures": ["Qwen3ForCausalLM"]},
    },
    "transformer_layer_config": {
        **{name: value for name, value in QWEN3.items() if name != "rope_theta"},
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    },
}
SPECULATORS = {**DFLASH, **LISTS, "lm_head.weight": (5, 8)}
DRAFTED = [0, 3, 4, 11, 19]
LAYOUTS = {
    "z-lab": (DFLASH, ZLAB_CONFIG),
    "DeepSpec": (DSPARK, DEEPSPEC_CONFIG),
    "SpecForge": ({**DFLASH, **MARKOV, **CONFIDENCE}, SPECFORGE_CONFIG),
    "JetSpec": (DFLASH, JETSPEC_CONFIG),
    "speculators": (SPECULATORS, SPECULATORS_CONFIG),
}


def tensors(table, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    state = {k: torch.randn(shape, generator=generator).to(dtype) for k, shape in table.items()}
    if "d2t" in state:
        state["d2t"] = torch.tensor([0, 2, 2, 8, 15])
    if "t2d" in state:
        state["t2d"] = torch.tensor([token in DRAFTED for token in range(20)])
    return state


def save(folder: Path, state, *, name="model.safetensors", config=ZLAB_CONFIG) -> Path:
    if name.endswith(".safetensors"):
        save_file(state, folder / name)
    else:
        torch.save(state, folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def changed(config, **changes):
    """Return a config with other values, of `dflash_config` where it has them; None removes one."""
    config = {
        **config,
        **({"dflash_config": {**config["dflash_config"]}} if "dflash_config" in config else {}),
    }
    for name, value in changes.items():
        inner = config.get("dflash_config", {})
        part = inner if name in inner else config
        part[name] = value
        if value is None:
            del part[name]
    return config
