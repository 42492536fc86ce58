"""Families with recurrent layers, alone or beside attention."""

from speclm.verify import Backend
from tests.families.family import EXPERTS, GLOBAL, LATENT, Family
from tests.models import WINDOW

_STATE_SPACE: dict[str, object] = {
    "mamba_n_heads": 4,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 16,
}
_DELTA: dict[str, object] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_HALF_LINEAR: dict[str, object] = {"layer_types": ["linear_attention", GLOBAL]}

RECURRENT_ROWS = (
    Family(
        "bamba",
        {**_STATE_SPACE, "mamba_d_head": 20, "attn_layer_indices": [1]},
        "Bamba 9B",
        backend=Backend.CHAINS,
        reason="layers of type linear_attention",
    ),
    Family(
        "falcon_h1",
        {**_STATE_SPACE, "head_dim": 12, "mamba_d_ssm": 40, "mamba_d_head": 10},
        "Falcon-H1",
        backend=Backend.CHAINS,
        reason="layers of type hybrid",
    ),
    Family(
        "falcon_mamba",
        {"state_size": 8},
        "Falcon Mamba 7B",
        backend=Backend.PLAIN,
        reason="no chains: chain logits differ",
    ),
    Family(
        "granitemoehybrid",
        {
            **EXPERTS,
            **_STATE_SPACE,
            "layer_types": ["mamba", "attention"],
            "mamba_d_head": 20,
            "shared_intermediate_size": 16,
            "logits_scaling": 4.0,
        },
        "Granite 4 H",
        backend=Backend.CHAINS,
        reason="layers of type linear_attention",
    ),
    Family(
        "jamba",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        "Jamba, Jamba 1.5",
        backend=Backend.PLAIN,
        reason="no chains: chain logits differ",
    ),
    Family(
        "kimi_linear",
        {
            **EXPERTS,
            **LATENT,
            **_HALF_LINEAR,
            "q_lora_rank": None,
            "num_experts_per_token": 2,
            "mlp_layer_types": ["dense", "sparse"],
            "linear_head_dim": 8,
            "linear_num_heads": 4,
        },
        "Kimi Linear",
        backend=Backend.CHAINS,
        reason="layers of type linear_attention",
    ),
    Family(
        "lfm2",
        {
            "num_hidden_layers": 3,
            "layer_types": ["conv", GLOBAL, "conv"],
            "block_multiple_of": 16,
        },
        "LFM2",
        backend=Backend.CHAINS,
        reason="layers of type conv",
    ),
    Family(
        "mamba",
        {"state_size": 8},
        "Mamba",
        backend=Backend.PLAIN,
        reason="no chains: chain logits differ",
    ),
    Family(
        "mamba2",
        {"state_size": 8, "num_heads": 8, "head_dim": 10, "n_groups": 2, "chunk_size": 16},
        "Mamba 2, Codestral Mamba",
        backend=Backend.CHAINS,
        reason="layers of type linear_attention",
    ),
    Family(
        "minimax",
        {**EXPERTS, **_HALF_LINEAR, "head_dim": 12, "block_size": 16},
        "MiniMax-Text-01, MiniMax-M1",
        backend=Backend.PLAIN,
        reason="no chains: MiniMaxForCausalLM decodes with a cache",
    ),
    Family(
        "nemotron_h",
        {
            "num_hidden_layers": 3,
            "hybrid_override_pattern": "M*-",
            "head_dim": 12,
            "mamba_num_heads": 4,
            "mamba_head_dim": 10,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 16,
        },
        "Nemotron-H, Nemotron Nano 2",
        seed=1,
        backend=Backend.PLAIN,
        reason="no chains: chain logits differ",
    ),
    Family(
        "olmo_hybrid",
        {**_DELTA, **_HALF_LINEAR, "linear_num_value_heads": 2},
        "Olmo Hybrid",
        backend=Backend.CHAINS,
        reason="layers of type linear_attention",
    ),
    Family(
        "qwen3_5_text",
        {**_DELTA, **_HALF_LINEAR, "head_dim": 16},
        "Qwen3.5, text alone",
        backend=Backend.CHAINS,
        reason="layers of type linear_attention",
    ),
    Family(
        "qwen3_next",
        {**EXPERTS, **_DELTA, **_HALF_LINEAR, "head_dim": 12, "decoder_sparse_step": 1},
        "Qwen3-Next 80B-A3B",
        backend=Backend.CHAINS,
        reason="layers of type linear_attention",
    ),
    Family(
        "recurrent_gemma",
        {
            "lru_width": 40,
            "attention_window_size": WINDOW,
            "block_types": ["recurrent", "attention"],
        },
        "RecurrentGemma",
        embedding_scale=0.5,
        backend=Backend.PLAIN,
        reason="no chains",
    ),
    Family(
        "rwkv",
        {"attention_hidden_size": 40},
        "RWKV-4",
        backend=Backend.PLAIN,
        reason="no chains: RwkvForCausalLM decodes with a cache",
    ),
    Family(
        "zamba2",
        {
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "hybrid", "mamba"],
            "num_mem_blocks": 1,
            "use_mem_rope": True,
            "adapter_rank": 8,
            "mamba_d_state": 8,
            "n_mamba_heads": 4,
            "mamba_ngroups": 1,
            "chunk_size": 16,
        },
        "Zamba2",
        backend=Backend.PLAIN,
        reason="no chains: chain logits differ",
    ),
)
