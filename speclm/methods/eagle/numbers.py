"""Finds the numbers of EAGLE heads in their tensors, with their config as a hint."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speclm.errors import CheckpointError, OptionError, shown
from speclm.files.weights import MAX_COUNT, read_json
from speclm.methods.eagle.config import NUM_FEATURES, EagleConfig, read_rope

_log = logging.getLogger("speclm")

Shapes = Mapping[str, tuple[int, ...]]

_LAYER_IDS = ("eagle_aux_hidden_state_layer_ids", "aux_hidden_state_layer_ids")
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(
        (
            *("num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
            *("hidden_size", "intermediate_size", "num_hidden_layers", "draft_vocab_size"),
            *("target_hidden_size", "num_aux_hidden_states", "max_position_embeddings"),
            *("max_sequence_length", "sliding_window"),
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
_MAX_NUMBER = 1e30  # of what is no count


def read_hints(folder: Path) -> dict[str, Any]:
    """Return what a folder's config.json says of the heads, nested configs laid flat.

    Speculators nests the numbers of the layers, ModelOpt and vLLM the options of EAGLE, and vLLM
    before 0.7 the whole config. What is null is left out.

    Raises:
        CheckpointError: If the file is no JSON object, or a value of another type than meant.
    """
    path = folder / "config.json"
    if not path.is_file():
        return {}
    config = read_json(path)
    parts = []
    for name in ("eagle_config", None, "model", "transformer_layer_config"):
        part = config if name is None else config.get(name) or {}
        if not isinstance(part, dict):
            raise CheckpointError(
                f"{path}: {name} is {shown(part)}, expected an object; correct it"
            )
        parts.append(part)
    hints = {name: value for part in parts for name, value in part.items() if value is not None}
    for name, types in _TYPES.items():
        value = hints.get(name)
        is_wrong = not isinstance(value, types) or (isinstance(value, bool) and bool not in types)
        if value is not None and is_wrong:
            raise CheckpointError(
                f"{path}: {name} is {shown(value)}, expected {types[-1].__name__}; correct it"
            )
        most = MAX_COUNT if types == (int,) else _MAX_NUMBER
        if isinstance(value, int | float) and not abs(value) <= most:
            raise CheckpointError(
                f"{path}: {name} is {shown(value)}, expected a number up to {most}; correct it"
            )
    if any(not isinstance(kind, str) for kind in hints.get("layer_types", ())):
        raise CheckpointError(
            f"{path}: layer_types is {shown(hints['layer_types'])}, expected strings; correct it"
        )
    return hints


def infer_config(path: Path, shapes: Shapes, hints: Mapping[str, Any], kind: str) -> EagleConfig:
    """Return the numbers that the tensors show, and those of the config that they cannot show.

    Args:
        path: The file, for messages.
        shapes: Shape of each tensor, by our names, and of ``d2t`` and ``t2d``.
        hints: Result of `read_hints`.
        kind: ``"eagle"`` or ``"eagle3"``.

    Raises:
        CheckpointError: If a tensor that shows a number is missing, the config does not name what
            no tensor shows, or the numbers contradict each other.
    """
    fc, q_proj, k_proj, gate = (
        _matrix(path, shapes, name)
        for name in (
            "fc.weight",
            *(f"layers.0.self_attn.{part}_proj.weight" for part in "qk"),
            "layers.0.mlp.gate_proj.weight",
        )
    )
    hidden = fc[0]
    head_dim = _head_dim(path, shapes, hints, (q_proj[0], k_proj[0]))
    vocab_size, draft_vocab_size = _vocabularies(path, shapes, hints)
    layers = _feature_layers(path, hints) if kind == "eagle3" else None
    has = shapes.__contains__
    num_features, target_hidden = 1, hidden
    if kind == "eagle3":
        num_features, target_hidden = _features(
            path, fc, hints, layers, has_own_embeddings=has("embed_tokens.weight")
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
        "num_layers": _count_layers(path, shapes),
    }
    _compare(path, hints, config)
    is_eagle3 = kind == "eagle3"
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
            attention_bias=any(has(f"layers.0.self_attn.{part}_proj.bias") for part in "qkv"),
            attention_output_bias=has("layers.0.self_attn.o_proj.bias"),
            has_qk_norm=any(has(f"layers.0.self_attn.{part}_norm.weight") for part in "qk"),
            fc_bias=has("fc.bias"),
            norm_before_residual=is_eagle3 and hints.get("norm_before_residual", False),
            fc_norm=any(name.startswith("feature_norms.") for name in shapes)
            or (is_eagle3 and (hints.get("fc_norm") or hints.get("use_aux_norm", False))),
            norm_before_fc=has("feature_norm.weight")
            or (is_eagle3 and hints.get("norm_before_fc", False)),
            norm_output=is_eagle3 and hints.get("norm_output", False),
            logit_scale=float(hints.get("logit_scale", 1.0)),
            has_own_embeddings=has("embed_tokens.weight"),
            has_own_lm_head=has("lm_head.weight"),
        )
    except OptionError as error:
        raise CheckpointError(f"{path} or the config.json next to it: {error}") from error


def expected_shapes(config: EagleConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor that heads of some numbers have."""
    hidden, width = config.hidden_size, config.num_features * config.target_hidden_size
    is_eagle3 = config.kind == "eagle3"
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (hidden, width if is_eagle3 else 2 * hidden)}
    if config.fc_bias:
        shapes["fc.bias"] = (hidden,)
    if config.fc_norm:
        for index in range(config.num_features):
            shapes[f"feature_norms.{index}.weight"] = (config.target_hidden_size,)
    if config.norm_before_fc:
        shapes["feature_norm.weight"] = (width,)
    for index in range(config.num_layers):
        for name, shape in _layer_shapes(config, is_first=index == 0).items():
            shapes[f"layers.{index}.{name}"] = shape
    if is_eagle3:
        shapes["norm.weight"] = (hidden,)
    if config.has_own_lm_head:
        shapes["lm_head.weight"] = (config.draft_vocab_size, hidden)
    if config.has_own_embeddings:
        shapes["embed_tokens.weight"] = (config.vocab_size, hidden)
    return shapes


def _layer_shapes(config: EagleConfig, *, is_first: bool) -> dict[str, tuple[int, ...]]:
    hidden, wide = config.hidden_size, config.intermediate_size
    is_joining = is_first and config.kind == "eagle3"
    read = hidden * (1 + is_joining)
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {}
    for part, size in (("q", queries), ("k", keys), ("v", keys)):
        shapes[f"self_attn.{part}_proj.weight"] = (size, read)
        if config.attention_bias:
            shapes[f"self_attn.{part}_proj.bias"] = (size,)
    shapes["self_attn.o_proj.weight"] = (hidden, queries)
    if config.attention_output_bias:
        shapes["self_attn.o_proj.bias"] = (hidden,)
    if config.has_qk_norm:
        shapes |= dict.fromkeys(
            ("self_attn.q_norm.weight", "self_attn.k_norm.weight"), (config.head_dim,)
        )
    shapes |= dict.fromkeys(("mlp.gate_proj.weight", "mlp.up_proj.weight"), (wide, hidden))
    shapes["mlp.down_proj.weight"] = (hidden, wide)
    norms = ["post_attention_layernorm"]
    if is_joining:
        norms.append("hidden_norm")
    if is_joining or not is_first:
        norms.append("input_layernorm")
    return shapes | {f"{norm}.weight": (hidden,) for norm in norms}


def _matrix(path: Path, shapes: Shapes, name: str) -> tuple[int, int]:
    shape = shapes.get(name)
    if shape is None or len(shape) != 2 or 0 in shape:
        found = "is missing" if shape is None else f"has shape {list(shape)}"
        raise CheckpointError(
            f"{path}: key {name!r} {found}, expected a matrix; download the file again"
        )
    return shape[0], shape[1]


def _head_dim(path: Path, shapes: Shapes, hints: Mapping[str, Any], rows: tuple[int, int]) -> int:
    """Return the width of a head: of its norm, of the config, or of the queries by their number."""
    normed = shapes.get("layers.0.self_attn.q_norm.weight")
    num_heads, named = hints.get("num_attention_heads"), hints.get("head_dim")
    if normed:
        head_dim = normed[0]
    elif named and num_heads and named * num_heads != rows[0]:
        raise CheckpointError(
            f"{path}: queries are {rows[0]} wide, expected {named * num_heads} since config.json "
            f"names {num_heads} heads of head_dim {named}; correct config.json"
        )
    elif not (named or num_heads):
        raise CheckpointError(
            f"{path}: config.json names neither num_attention_heads nor head_dim, and queries "
            f"{rows[0]} wide do not show them; add one to config.json"
        )
    else:
        head_dim = named or max(1, rows[0] // hints["num_attention_heads"])
    if not head_dim or any(row % head_dim for row in rows):
        raise CheckpointError(
            f"{path}: queries and keys are {rows[0]} and {rows[1]} wide, expected multiples of "
            f"{head_dim}, the width of a head; correct num_attention_heads or head_dim in "
            "config.json"
        )
    return int(head_dim)


def _vocabularies(path: Path, shapes: Shapes, hints: Mapping[str, Any]) -> tuple[int, int]:
    lists = [shapes[name] for name in ("t2d", "embed_tokens.weight") if shapes.get(name)]
    columns = [shapes[name] for name in ("lm_head.weight", "d2t") if shapes.get(name)]
    vocab_size = lists[0][0] if lists else hints.get("vocab_size")
    if vocab_size is None:
        vocab_size = columns[0][0] if columns and "d2t" not in shapes else None
    if vocab_size is None:
        raise CheckpointError(
            f"{path}: neither config.json nor a tensor shows vocab_size, the width of the target's "
            "logits; add it to config.json"
        )
    return vocab_size, columns[0][0] if columns else vocab_size


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
    # Heads with embeddings of their own may read wider states, which no tensor shows.
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


def _count_layers(path: Path, shapes: Shapes) -> int:
    """Return how many layers there are tensors for, before anything counts to a number in a key."""
    indices = {int(name.split(".")[1]) for name in shapes if name.startswith("layers.")}
    missing = next((index for index in range(len(indices)) if index not in indices), None)
    if missing is not None:
        raise CheckpointError(
            f"{path}: key 'layers.{missing}.self_attn.q_proj.weight' is missing, found parts of "
            f"{len(indices)} layers up to number {max(indices)}, expected numbers from 0 without "
            "gaps; download the file again"
        )
    return len(indices)


def _sliding_window(hints: Mapping[str, Any]) -> int | None:
    # Configs copied from a base may name a window that nothing applies.
    kinds = set(hints.get("layer_types", ()))
    is_used = kinds == {"sliding_attention"} and hints.get("use_sliding_window", True)
    return hints.get("sliding_window") if is_used else None


def _compare(path: Path, hints: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Log where the config names other numbers than the tensors show."""
    names = {"num_layers": "num_hidden_layers"}
    wrong = [
        f"{names.get(name, name)} {hint!r} (found {number})"
        for name, number in config.items()
        if (hint := hints.get(names.get(name, name), number)) != number
    ]
    if wrong:
        _log.warning("%s goes by its tensors; config.json says %s", path, ", ".join(wrong))
