"""The configs of published block drafters: read into `BlockConfig`, and written back."""

from collections.abc import Iterable, Mapping
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
    require_types,
    saved_rope,
    vocabularies,
    width_of_heads,
)
from speclm.drafting.heads_folder import CONFIG_NAME
from speclm.errors import CheckpointError, OptionError, shown
from speclm.files.weights import read_json
from speclm.methods.block.config import BlockConfig
from speclm.tree.static import RankPaths

_PARTS = ("transformer_layer_config", None, "dspark_config", "dflash_config")
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(
        (
            *("num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
            *("hidden_size", "intermediate_size", "num_hidden_layers", "draft_vocab_size"),
            *("max_position_embeddings", "sliding_window", "swa_window_size", "block_size"),
            *("mask_token_id", "markov_rank", "num_target_layers"),
        ),
        (int,),
    ),
    **dict.fromkeys(("rms_norm_eps", "rope_theta"), (int, float)),
    **dict.fromkeys(
        (
            *("is_causal", "causal", "causal_head", "sliding_window_non_causal", "use_swa"),
            *("use_sliding_window", "sample_from_anchor", "enable_confidence_head"),
        ),
        (bool,),
    ),
    **dict.fromkeys(
        (
            *("hidden_act", "base_model_name_or_path", "markov_head_type", "projector_type"),
            "speculators_model_type",
        ),
        (str,),
    ),
    **dict.fromkeys(("rope_scaling", "rope_parameters", "speculators_config", "speclm"), (dict,)),
    **dict.fromkeys(
        ("layer_types", "target_layer_ids", "aux_hidden_state_layer_ids", "architectures"), (list,)
    ),
}
_SHOWING = ("self_attn.q", "self_attn.k", "mlp.gate")
# Numbers that change what heads compute in a way that ours do not.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "attention_mode": ("gqa", "mha"),
    "attention_sink_bias": (False,),
    "attention_value_scale": (1,),
    "final_logit_softcapping": (0,),
    "input_embedding_scale": (1,),
    "is_neox_style": (True,),
    "logit_scale": (1,),
    "output_multiplier": (1,),
    "quantization_config": (),
    "rope_is_neox_style": (True,),
    "use_aux_hidden_state": (True,),
    "use_qk_norm": (True,),
}
# Parts of other drafters, by words in their keys, projector_type or speculators_model_type.
_OTHERS = {
    "domino": ("Domino", ("prefix_gru.", "embed_proj.")),
    "dflash2": ("DFlash 2", ("candidate_selector.", "attention_conv.", "mlp_conv.")),
    "peagle": ("P-EAGLE", ("mask_hidden",)),
    "mtp": ("multi-token prediction (MTP)", ("mtp.", "mtp_layers.", "eh_proj.")),
}


def read_hints(folder: Path) -> dict[str, Any]:
    """Return the values in a folder's config.json, flattened and without nulls.

    z-lab and SpecForge nest what concerns drafting, DeepSpec does not, and speculators nests the
    sizes of the layers.

    Raises:
        CheckpointError: If the file is not a JSON object, or a value has the wrong type.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        return {}
    hints = merge_objects(path, read_json(path), _PARTS)
    require_types(path, hints, _TYPES)
    return hints


def name_of_other(keys: Iterable[str], hints: Mapping[str, Any]) -> str | None:
    """Return the name of the method if keys or config are those of another one than ours."""
    declared = {hints.get("projector_type"), hints.get("speculators_model_type")}
    keys = [f".{key}" for key in keys]
    for kind, (name, words) in _OTHERS.items():
        if kind in declared or any(f".{word}" in key for key in keys for word in words):
            return name
    return None


def infer_config(path: Path, shapes: Shapes, hints: Mapping[str, Any]) -> BlockConfig:
    """Return the config: sizes from the tensors where they show them, the rest from the file.

    Args:
        path: The file, for messages.
        shapes: Shape of each tensor, by our names, and of ``d2t`` and ``t2d``.
        hints: Result of `read_hints`.

    Raises:
        CheckpointError: If a tensor or a value is missing, or two values contradict each other.
    """
    for name, neutral in _NEUTRAL.items():
        if hints.get(name) is not None and hints[name] not in neutral:
            raise CheckpointError(
                f"{path}: {name} in config.json is {shown(hints[name])}, expected none of what "
                "these heads cannot compute; load heads that were trained and saved without it"
            )
    fc, q_proj, k_proj, gate = (
        matrix_shape(path, shapes, name)
        for name in (
            "fc.weight",
            *(f"layers.0.{part}_proj.weight" for part in _SHOWING),
        )
    )
    head_dim = width_of_heads(path, shapes, hints, (q_proj[0], k_proj[0]))
    vocab_size, draft_vocab_size = _vocabularies(path, shapes, hints)
    num_layers = count_layers(path, shapes)
    sizes: dict[str, Any] = {
        "hidden_size": fc[0],
        "intermediate_size": gate[0],
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        "draft_vocab_size": draft_vocab_size,
    }
    heads = q_proj[0] // head_dim, k_proj[0] // head_dim
    counts = dict(zip(("num_attention_heads", "num_key_value_heads"), heads, strict=True))
    log_differences(path, hints, {**sizes, **counts, "num_hidden_layers": num_layers})
    feature_layers = _feature_layers(path, hints, fc)
    windows, is_causal = _layers(path, hints, num_layers)
    try:
        return BlockConfig(
            **sizes,
            num_layers=num_layers,
            num_heads=heads[0],
            num_kv_heads=heads[1],
            block_size=_required(path, hints, "block_size"),
            feature_layers=feature_layers,
            mask_token_id=_required(path, hints, "mask_token_id"),
            windows=windows,
            is_causal=is_causal,
            predicts_next=_predicts_next(path, shapes, hints),
            **_heads_of_block(shapes, hints),
            rms_norm_eps=float(hints.get("rms_norm_eps", 1e-6)),
            hidden_act=hints.get("hidden_act", "silu"),
            rope_parameters=read_rope(hints),
            max_position_embeddings=hints.get("max_position_embeddings", 2048),
            has_attention_bias="layers.0.self_attn.q_proj.bias" in shapes,
            has_own_embeddings="embed_tokens.weight" in shapes,
            has_own_lm_head="lm_head.weight" in shapes,
        )
    except OptionError as error:
        raise CheckpointError(f"{path} or the config.json next to it: {error}") from error


def _required(path: Path, hints: Mapping[str, Any], name: str) -> int:
    if name not in hints:
        raise CheckpointError(
            f"{path}: config.json names no {name}, and no tensor shows it; add what the heads "
            "were trained with, or download the file again"
        )
    return int(hints[name])


def _vocabularies(path: Path, shapes: Shapes, hints: Mapping[str, Any]) -> tuple[int, int]:
    embedded = shapes.get("markov_head.markov_w1.weight")
    if embedded:  # of the target's tokens
        hints = {**hints, "vocab_size": embedded[0]}
    vocab_size, draft_vocab_size = vocabularies(path, shapes, hints)
    num_columns = min(draft_vocab_size, hints.get("draft_vocab_size", draft_vocab_size))
    if num_columns < vocab_size and "lm_head.weight" not in shapes:
        raise CheckpointError(
            f"{path}: key 'lm_head.weight' is missing, expected it with {num_columns} rows for the "
            "draft vocabulary; download the file again, or correct draft_vocab_size in config.json"
        )
    return vocab_size, draft_vocab_size


def _feature_layers(path: Path, hints: Mapping[str, Any], fc: tuple[int, int]) -> tuple[int, ...]:
    """Return the hidden states that are read; they are never guessed."""
    # z-lab and DeepSpec count the layers from 0, speculators the hidden states.
    offset, name = 1, "target_layer_ids"
    if hints.get(name) is None and hints.get("aux_hidden_state_layer_ids") is not None:
        offset, name = 0, "aux_hidden_state_layer_ids"
    ids = hints.get(name)
    if not ids:
        raise CheckpointError(
            f"{path}: config.json names no target_layer_ids, the layers of the base that the heads "
            "read, and no tensor shows them; add those that the heads were trained on"
        )
    num_layers = hints.get("num_target_layers", 10_000)
    last = num_layers - offset
    are_ids = all(type(i) is int and -offset <= i <= last for i in ids)
    if not are_ids or len(set(ids)) < len(ids):
        raise CheckpointError(
            f"{path}: {name} in config.json is {shown(ids)}, expected different whole numbers from "
            f"{-offset} to {last} for a base of {num_layers} layers; correct it, or download it "
            "again"
        )
    if fc[1] != len(ids) * fc[0]:
        raise CheckpointError(
            f"{path}: 'fc.weight' reads {fc[1]} values, {fc[1] / fc[0]:g} hidden states {fc[0]} "
            f"wide, expected {len(ids)} of them as {name} {shown(ids)} in config.json says; "
            "correct it"
        )
    return tuple(i + offset for i in ids)


def _layers(
    path: Path, hints: Mapping[str, Any], num_layers: int
) -> tuple[tuple[int | None, ...], tuple[bool, ...]]:
    """Return the window of each layer, and whether it is causal within a block.

    Source: the code of vLLM and z-lab.
    """
    kinds = hints.get("layer_types", ["full_attention"] * num_layers)[:num_layers]
    unknown = [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]
    if unknown or len(kinds) < num_layers:
        raise CheckpointError(
            f"{path}: layer_types in config.json is {shown(kinds)}, expected 'full_attention' or "
            f"'sliding_attention' for each of {num_layers} layers; correct it"
        )
    if hints.get("use_swa", False) and "sliding_attention" not in kinds:
        kinds = ["sliding_attention"] * num_layers
    is_sliding = [kind == "sliding_attention" for kind in kinds]
    window = hints.get("swa_window_size", hints.get("sliding_window"))
    is_switched_off = hints.get("use_sliding_window") is False and not hints.get("use_swa", False)
    if any(is_sliding) and (window is None or is_switched_off):
        raise CheckpointError(
            f"{path}: config.json has layers of sliding_attention and no sliding_window in use, "
            "expected its width; add sliding_window and use_sliding_window, or name full layers"
        )
    names = ("is_causal", "causal", "causal_head")
    stated = next((hints[name] for name in names if name in hints), None)
    if stated is None and hints.get("sliding_window_non_causal", False):
        stated = False
    is_causal = is_sliding if stated is None else [stated] * num_layers
    windows = (window if slides else None for slides in is_sliding)
    return tuple(windows), tuple(is_causal)


def _predicts_next(path: Path, shapes: Shapes, hints: Mapping[str, Any]) -> bool:
    """Return whether a position drafts the token after it: usual for DSpark, not for DFlash."""
    if "sample_from_anchor" in hints:
        return bool(hints["sample_from_anchor"])
    declared = (*hints.get("architectures", ()), hints.get("projector_type", ""))
    has_sign = any("dspark" in str(name).lower() for name in declared)
    is_dspark = has_sign or any(key.startswith(("markov_", "confidence_")) for key in shapes)
    if "speculators_model_type" not in hints or not is_dspark:
        return is_dspark
    # Older versions of speculators trained DSpark heads in place, and did not say so.
    methods = hints.get("speculators_config", {}).get("proposal_methods")
    first = methods[0] if isinstance(methods, list) and methods else None
    num_drafts = first.get("speculative_tokens") if isinstance(first, Mapping) else None
    spare = hints.get("block_size", 0) - num_drafts if isinstance(num_drafts, int) else None
    if spare not in (0, 1):
        raise CheckpointError(
            f"{path}: config.json names neither sample_from_anchor nor speculative_tokens, found "
            f"{num_drafts!r}, expected block_size or one less; add sample_from_anchor: true if "
            "the first position of a block drafts a token"
        )
    return bool(spare == 0)


def _heads_of_block(shapes: Shapes, hints: Mapping[str, Any]) -> dict[str, Any]:
    """Return which of the Markov and confidence heads there are."""
    w1 = shapes.get("markov_head.markov_w1.weight")
    rank = w1[-1] if w1 else hints.get("markov_rank", 0)
    kind = None
    if rank or w1:
        shown_by = {"markov_head.gate_proj.weight": "gated", "markov_head.joint_proj.weight": "rnn"}
        found = next((kind for name, kind in shown_by.items() if name in shapes), "vanilla")
        kind = hints.get("markov_head_type", found).lower()
    has_confidence = any(name.startswith("confidence_head.") for name in shapes)
    return {
        "markov": kind,
        "markov_rank": rank,
        "has_confidence": has_confidence or hints.get("enable_confidence_head", False),
    }


def require_layers(path: Path, config: BlockConfig, num_target_layers: int) -> None:
    """Check that the base has the layers that heads read.

    Raises:
        CheckpointError: If it has fewer.
    """
    if max(config.feature_layers) > num_target_layers:
        raise CheckpointError(
            f"{path}: target_layer_ids is {[i - 1 for i in config.feature_layers]!r}, expected ids "
            f"up to {num_target_layers - 1}, the layers of the base; load the heads with the base "
            "they were trained on"
        )


def is_of_deepspec(config: BlockConfig) -> bool:
    """Return whether heads are written as DeepSpec does; z-lab's have no further heads."""
    return config.markov is not None or config.has_confidence or config.predicts_next


def describe(
    config: BlockConfig,
    *,
    dtype: torch.dtype,
    num_target_layers: int | None = None,
    base_name_or_path: str | None = None,
    choices: RankPaths | None = None,
) -> dict[str, Any]:
    """Return the config of a Qwen3 with DeepSpec's or z-lab's values; see `is_of_deepspec`.

    Raises:
        CheckpointError: If the layers differ in a way that no library can read.
    """
    is_dspark = is_of_deepspec(config)
    drafting: dict[str, Any] = {
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": [layer - 1 for layer in config.feature_layers],
    }
    if is_dspark and not config.predicts_next:
        drafting["sample_from_anchor"] = False
    described: dict[str, Any] = {
        "architectures": ["Qwen3DSparkModel" if is_dspark else "DFlashDraftModel"],
        "model_type": "qwen3",
        "base_model_name_or_path": base_name_or_path,
        "num_target_layers": num_target_layers,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": config.draft_vocab_size if config.has_draft_vocab else None,
        "hidden_act": config.hidden_act,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        **saved_rope(config.rope_parameters),
        "attention_bias": config.has_attention_bias,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **_attention(config),
    }
    if is_dspark:
        described |= drafting | {
            "markov_rank": config.markov_rank,
            "markov_head_type": config.markov,
            "enable_confidence_head": config.has_confidence,
            "confidence_head_with_markov": config.markov is not None,
            "num_anchors": 512,  # DeepSpec's class asks for it
        }
    else:
        if all(config.is_causal):
            drafting["causal_head"] = True  # that of JetSpec
        # vLLM and SGLang read either; older files and code have the size of a block at the top.
        described |= {"block_size": config.block_size, "dflash_config": drafting}
    described = {name: value for name, value in described.items() if value is not None}
    if choices is not None:
        described["speclm"] = {"choices": [list(path) for path in choices]}
    return described


def _attention(config: BlockConfig) -> dict[str, Any]:
    is_sliding = tuple(window is not None for window in config.windows)
    widths = {window for window in config.windows if window is not None}
    causal = set(config.is_causal)
    if len(widths) > 1 or (len(causal) > 1 and config.is_causal != is_sliding):
        raise CheckpointError(
            f"windows are {config.windows!r} and is_causal {config.is_causal!r}, expected one "
            "width, and layers that are alike or causal where they have a window; no library "
            "reads other heads, build them so"
        )
    kinds = ["sliding_attention" if slides else "full_attention" for slides in is_sliding]
    described: dict[str, Any] = {"layer_types": kinds}
    if widths:
        described |= {"sliding_window": widths.pop(), "use_sliding_window": True}
    if config.is_causal != is_sliding:
        described["is_causal"] = causal.pop()
    return described
