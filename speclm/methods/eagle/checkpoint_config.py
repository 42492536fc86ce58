"""Read the config of EAGLE heads from tensors and config.json, and write config.json."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from speclm.drafting.decoder import read_rope
from speclm.drafting.heads_config import (
    Shapes,
    count_layers,
    log_differences,
    matrix_shape,
    merge_objects,
    require_same_config,
    require_types,
    saved_rope,
    vocabularies,
    width_of_heads,
)
from speclm.drafting.heads_folder import CONFIG_NAME
from speclm.drafting.package import EXPORT_NAME
from speclm.errors import CheckpointError, OptionError, shown
from speclm.files.weights import read_json
from speclm.methods.eagle.config import NUM_FEATURES, EagleConfig, usual_layers
from speclm.tree.static import RankPaths

_LAYER_IDS = ("eagle_aux_hidden_state_layer_ids", "aux_hidden_state_layer_ids")
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(
        (
            *("num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
            *("hidden_size", "intermediate_size", "num_hidden_layers", "draft_vocab_size"),
            *("target_hidden_size", "num_aux_hidden_states", "max_position_embeddings"),
            *("max_sequence_length", "sliding_window", "hot_vocab_size"),
        ),
        (int,),
    ),
    **dict.fromkeys(("rms_norm_eps", "rope_theta", "logit_scale"), (int, float)),
    **dict.fromkeys(
        (
            *("norm_before_residual", "norm_before_fc", "fc_norm", "use_aux_norm"),
            *("norm_output", "use_sliding_window"),
        ),
        (bool,),
    ),
    **dict.fromkeys(("hidden_act", "base_model_name_or_path"), (str,)),
    **dict.fromkeys(("rope_scaling", "rope_parameters", "speculators_config", "speclm"), (dict,)),
    **dict.fromkeys((*_LAYER_IDS, "layer_types"), (list,)),
}
_ARCHITECTURES = {"eagle": "LlamaForCausalLM", "eagle3": "LlamaForCausalLMEagle3"}
_QWEN_ARCHITECTURES = {"eagle": "Qwen3ForCausalLM", "eagle3": "Eagle3Qwen3ForCausalLM"}
_SAME_NAMES = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "hidden_act", "rms_norm_eps", "max_position_embeddings"),
)
_SHOWING = ("self_attn.q", "self_attn.k", "mlp.gate")
_FLAGS = ("norm_before_residual", "fc_norm", "norm_before_fc", "norm_output")


def read_hints(folder: Path) -> dict[str, Any]:
    """Return the values in a folder's config.json, flattened and without nulls.

    Speculators nests the sizes of the layers, ModelOpt and vLLM nest the options of EAGLE, and
    vLLM before 0.7 nests the whole config.

    Raises:
        CheckpointError: If the file is not a JSON object, or a value has the wrong type.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        return {}
    parts = ("eagle_config", None, "model", "transformer_layer_config")
    hints = merge_objects(path, read_json(path), parts)
    export = folder / EXPORT_NAME
    layers = read_json(export).get("feature_layers") if export.is_file() else None
    if layers is not None:  # the config counts them as its software does
        hints[_LAYER_IDS[0]] = layers
    require_types(path, hints, _TYPES)
    return hints


def infer_config(path: Path, shapes: Shapes, hints: Mapping[str, Any], kind: str) -> EagleConfig:
    """Return the config: sizes from the tensors where they show them, the rest from the file.

    Args:
        path: The file, for messages.
        shapes: Shape of each tensor, by our names, and of ``d2t`` and ``t2d``.
        hints: Result of `read_hints`.
        kind: ``"eagle"`` or ``"eagle3"``.

    Raises:
        CheckpointError: If a tensor or a value is missing, or two values contradict each other.
    """
    fc, q_proj, k_proj, gate = (
        matrix_shape(path, shapes, name)
        for name in ("fc.weight", *(f"layers.0.{part}_proj.weight" for part in _SHOWING))
    )
    hidden = fc[0]
    head_dim = width_of_heads(path, shapes, hints, (q_proj[0], k_proj[0]))
    vocab_size, draft_vocab_size = vocabularies(path, shapes, hints)
    is_eagle3 = kind == "eagle3"
    layers = _feature_layers(path, hints) if is_eagle3 else None
    num_features, target_hidden = 1, hidden
    if is_eagle3:
        num_features, target_hidden = _features(
            path, fc, hints, layers, has_own_embeddings="embed_tokens.weight" in shapes
        )
    config: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": gate[0],
        "num_attention_heads": q_proj[0] // head_dim,
        "num_key_value_heads": k_proj[0] // head_dim,
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        "draft_vocab_size": draft_vocab_size,
        "target_hidden_size": target_hidden,
        "num_layers": count_layers(path, shapes),
    }
    log_differences(path, hints, {**config, "num_hidden_layers": config["num_layers"]})
    try:
        return EagleConfig(
            kind=kind,
            **config,
            num_features=num_features,
            feature_layers=layers,
            rms_norm_eps=float(hints.get("rms_norm_eps", 1e-6)),
            hidden_act=hints.get("hidden_act", "silu"),
            rope_parameters=read_rope(hints),
            max_position_embeddings=hints.get(
                "max_position_embeddings", hints.get("max_sequence_length", 2048)
            ),
            sliding_window=_sliding_window(hints),
            logit_scale=float(hints.get("logit_scale", 1.0)),
            **_switches(shapes, hints if is_eagle3 else {}),
        )
    except OptionError as error:
        raise CheckpointError(f"{path} or the config.json next to it: {error}") from error


def _switches(shapes: Shapes, hints: Mapping[str, Any]) -> dict[str, bool]:
    """Return which parts the heads have; `hints` decide only where EAGLE-3's tensors do not."""
    has = shapes.__contains__
    has_feature_norms = any(name.startswith("feature_norms.") for name in shapes)
    return {
        "attention_bias": any(has(f"layers.0.self_attn.{part}_proj.bias") for part in "qkv"),
        "attention_output_bias": has("layers.0.self_attn.o_proj.bias"),
        "has_qk_norm": any(has(f"layers.0.self_attn.{part}_norm.weight") for part in "qk"),
        "fc_bias": has("fc.bias"),
        "norm_before_residual": hints.get("norm_before_residual", False),
        "fc_norm": has_feature_norms or hints.get("fc_norm") or hints.get("use_aux_norm", False),
        "norm_before_fc": has("feature_norm.weight") or hints.get("norm_before_fc", False),
        "norm_output": hints.get("norm_output", False),
        "has_own_embeddings": has("embed_tokens.weight"),
        "has_own_lm_head": has("lm_head.weight"),
    }


def _feature_layers(path: Path, hints: Mapping[str, Any]) -> tuple[int, ...] | None:
    ids = next((hints[name] for name in _LAYER_IDS if hints.get(name)), None)
    if ids is None:
        return None
    if any(not isinstance(layer, int) or isinstance(layer, bool) for layer in ids):
        raise CheckpointError(
            f"{path}: {_LAYER_IDS[0]} is {shown(ids)}, expected whole numbers; correct config.json"
        )
    return tuple(ids)


def _features(
    path: Path,
    fc: tuple[int, int],
    hints: Mapping[str, Any],
    layers: tuple[int, ...] | None,
    *,
    has_own_embeddings: bool,
) -> tuple[int, int]:
    """Return how many hidden states of the target are read, and how wide each is."""
    hidden, width = fc
    num_features = len(layers) if layers else hints.get("num_aux_hidden_states", NUM_FEATURES)
    one = hints.get("target_hidden_size") or hidden
    is_whole = num_features > 0 and width % num_features == 0
    # Heads with embeddings of their own may read wider hidden states, which no tensor shows.
    is_open = is_whole and has_own_embeddings and width != NUM_FEATURES * one
    if layers and width != len(layers) * one and not is_open:
        raise CheckpointError(
            f"{path}: 'fc.weight' reads {width} values, {width / one:g} hidden states {one} wide, "
            f"and {_LAYER_IDS[0]} in config.json is {shown(list(layers))}, {len(layers)} of them; "
            "expected one layer id for each hidden state, correct them"
        )
    if not is_whole:
        raise CheckpointError(
            f"{path}: 'fc.weight' reads {width} values, expected a multiple of {num_features}, the "
            f"hidden states that are joined; correct {_LAYER_IDS[0]} in config.json"
        )
    return num_features, width // num_features


def _sliding_window(hints: Mapping[str, Any]) -> int | None:
    # A config copied from a base may name a window that is not used.
    kinds = set(hints.get("layer_types", ()))
    is_used = kinds == {"sliding_attention"} and hints.get("use_sliding_window", True)
    return hints.get("sliding_window") if is_used else None


def without_usual_layers(config: EagleConfig, num_target_layers: int | None) -> EagleConfig:
    """Return a config that leaves out the feature layers if they are the usual ones of a base."""
    if num_target_layers is None or config.kind != "eagle3" or config.feature_layers is None:
        return config
    if config.layers_to_read(num_target_layers) == usual_layers(num_target_layers):
        return replace(config, feature_layers=None)
    return config


def require_written(path: Path, written: EagleConfig, found: EagleConfig) -> None:
    """Check that a config reads back as it was written, else raise a `CheckpointError`."""
    expected, actual = (
        asdict(
            replace(config, rope_parameters=read_rope({"rope_parameters": config.rope_parameters}))
        )
        for config in (written, found)
    )
    require_same_config(path, expected, actual)


def describe(
    config: EagleConfig,
    *,
    dtype: torch.dtype,
    base_name_or_path: str | None,
    choices: RankPaths | None,
) -> dict[str, Any]:
    """Return the config of a Llama (a Qwen if queries are normed) with EAGLE's values."""
    names = _QWEN_ARCHITECTURES if config.has_qk_norm else _ARCHITECTURES
    described: dict[str, Any] = {
        "architectures": [names[config.kind]],
        "model_type": "qwen3" if config.has_qk_norm else "llama",
        "base_model_name_or_path": base_name_or_path,
        "num_hidden_layers": config.num_layers,
        **{name: getattr(config, name) for name in _SAME_NAMES},
        **saved_rope(config.rope_parameters),
        **_window(config),
        "logit_scale": None if config.logit_scale == 1 else config.logit_scale,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **(_eagle3(config) if config.kind == "eagle3" else _eagle1(config)),
    }
    described = {name: value for name, value in described.items() if value is not None}
    if config.kind == "eagle3":
        # SGLang needs it, and shares the target's output matrix if it is null.
        described["draft_vocab_size"] = config.draft_vocab_size if config.has_own_lm_head else None
    if choices is not None:
        described["speclm"] = {"choices": [list(path) for path in choices]}
    return described


def _eagle1(config: EagleConfig) -> dict[str, Any]:
    # SafeAILab's code adds a bias unless `bias` is false; vLLM takes `bias` for the bias of
    # attention unless `qkv_bias` is present.
    return {
        "bias": config.fc_bias,
        "qkv_bias": config.attention_bias,
        "attention_bias": config.attention_output_bias,
    }


def _eagle3(config: EagleConfig) -> dict[str, Any]:
    flags: dict[str, Any] = {name: getattr(config, name) or None for name in _FLAGS}
    described = {"attention_bias": config.attention_bias, "bias": config.fc_bias or None, **flags}
    if config.target_hidden_size != config.hidden_size:
        described["target_hidden_size"] = config.target_hidden_size
    if config.feature_layers is not None:
        layers = list(config.feature_layers)
        described["num_aux_hidden_states"] = len(layers)
        described["eagle_config"] = {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": layers,
        }
    return described


def _window(config: EagleConfig) -> dict[str, Any]:
    if config.sliding_window is None:
        return {}
    return {
        "sliding_window": config.sliding_window,
        "use_sliding_window": True,
        "layer_types": ["sliding_attention"] * config.num_layers,
    }
