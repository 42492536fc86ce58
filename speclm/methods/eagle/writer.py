"""Writes EAGLE heads so that others read them too."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speclm.drafting.heads_folder import (
    CONFIG_NAME,
    require_folder,
    require_same_tensors,
    write_heads,
)
from speclm.errors import CheckpointError
from speclm.files.weights import weight_files
from speclm.methods.eagle.checkpoint import EagleCheckpoint, is_eagle, read_eagle
from speclm.methods.eagle.config import EagleConfig, read_rope, usual_layers
from speclm.methods.eagle.numbers import expected_shapes

WEIGHTS_NAME = "model.safetensors"

# Read in place of the weights, or before them, by one library or another.
_RIVALS = (*("pytorch_model.bin", "pytorch_model.bin.index.json", "model.safetensors.index.json"),)
_ARCHITECTURES = {"eagle": "LlamaForCausalLM", "eagle3": "LlamaForCausalLMEagle3"}
_QWEN_ARCHITECTURES = {"eagle": "Qwen3ForCausalLM", "eagle3": "Eagle3Qwen3ForCausalLM"}
_FLAGS = ("norm_before_residual", "fc_norm", "norm_before_fc", "norm_output")


def write_eagle(
    folder: str | Path,
    checkpoint: EagleCheckpoint,
    *,
    num_target_layers: int | None = None,
    card: str | None = None,
) -> None:
    """Write EAGLE heads into a folder, in the layout of SafeAILab and SpecForge.

    vLLM and SGLang read EAGLE-3 of one layer that reads the usual hidden states; vLLM reads
    EAGLE-1 without a bias after the joined inputs. The files are written aside, read back and
    compared bit by bit; only then do they appear together, or replace older ones, the config last.

    Args:
        folder: Created if it does not exist.
        checkpoint: What to write; `EagleCheckpoint.share` leaves out what the base has too.
        num_target_layers: Decoder layers of the base, if known. Hidden states that are the usual
            ones are then not named: libraries count named ones from different ends.
        card: Text of the model card; None leaves the card that is there.

    Raises:
        CheckpointError: If the folder is a file or holds another model, a tensor is missing,
            unknown or of another shape than the numbers say, or what was read back is not what was
            written.
    """
    folder = Path(folder)
    require_place_for_eagle(folder)
    if num_target_layers is not None:
        checkpoint = _with_usual_layers(checkpoint, num_target_layers)
    _require_whole(folder, checkpoint)

    def check(aside: Path) -> None:
        found, path = read_eagle(aside), folder / WEIGHTS_NAME
        require_same_tensors(path, checkpoint.tensors, found.tensors)
        _require_same_numbers(folder / CONFIG_NAME, checkpoint.config, found.config)

    write_heads(
        folder,
        weights_name=WEIGHTS_NAME,
        tensors=_named_tensors(checkpoint),
        config=_described(checkpoint),
        card=card,
        check=check,
    )


def require_place_for_eagle(folder: Path) -> None:
    """Check that EAGLE heads can be written into a folder without destroying anything.

    Raises:
        CheckpointError: If it is a file, or holds another model, or weights that others would read
            in place of the new ones.
    """
    require_folder(folder)
    for name in _RIVALS:
        if (folder / name).exists():
            raise CheckpointError(
                f"{folder / name}: found weights that are read in place of {WEIGHTS_NAME}, "
                "expected none; save the heads into a folder of their own"
            )
    weights = folder / WEIGHTS_NAME
    is_taken = (folder / CONFIG_NAME).is_file() or weights.is_file()
    is_mine = weights.is_file() and any(
        source.path == weights and is_eagle(source) for source in weight_files(folder)
    )
    if is_taken and not is_mine:
        raise CheckpointError(
            f"{folder}: found the config or weights of another model, expected none or those of "
            "EAGLE heads; save the heads into a folder of their own"
        )


def _with_usual_layers(checkpoint: EagleCheckpoint, num_target_layers: int) -> EagleCheckpoint:
    config = checkpoint.config
    if config.kind == "eagle" or config.feature_layers is None:
        return checkpoint
    layers = config.layers_to_read(num_target_layers)
    if layers != usual_layers(num_target_layers):
        return checkpoint
    return replace(checkpoint, config=replace(config, feature_layers=None))


def _require_whole(folder: Path, checkpoint: EagleCheckpoint) -> None:
    expected = expected_shapes(checkpoint.config)
    if checkpoint.config.has_draft_vocab:
        expected["draft_columns"] = (checkpoint.config.draft_vocab_size,)
    found = {name: tuple(tensor.shape) for name, tensor in checkpoint.tensors.items()}
    wrong = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{folder}: tensor {name!r} has shape {found.get(name)}, expected {expected.get(name)} "
            "as the numbers of the heads say; pass the numbers that the tensors were made with"
        )


def _require_same_numbers(path: Path, written: EagleConfig, found: EagleConfig) -> None:
    expected, actual = (
        asdict(
            replace(config, rope_parameters=read_rope({"rope_parameters": config.rope_parameters}))
        )
        for config in (written, found)
    )
    for name, value in expected.items():
        if actual[name] != value:
            raise CheckpointError(
                f"{path}: {name} reads back as {actual[name]!r}, expected {value!r} as it was "
                "written, the old files are kept; report it with these numbers"
            )


def _named_tensors(checkpoint: EagleCheckpoint) -> dict[str, Tensor]:
    """Return the tensors by the names that SafeAILab's code has for them."""
    config = checkpoint.config
    named = {}
    for name, tensor in checkpoint.tensors.items():
        if name == "draft_columns":
            continue
        key = name.replace("feature_norms.", "fc_norm.").replace("feature_norm.", "input_norm.")
        if config.kind == "eagle3":
            key = key.replace("layers.0.", "midlayer.")
        named[key] = tensor
    if config.kind == "eagle3" and config.has_own_lm_head:
        named |= _draft_lists(checkpoint)
    return named


def _draft_lists(checkpoint: EagleCheckpoint) -> dict[str, Tensor]:
    """Return which token each column is; SpecForge asks for it even where it is all of them."""
    config = checkpoint.config
    columns = checkpoint.tensors.get(
        "draft_columns", torch.arange(config.vocab_size, device="cpu")
    ).cpu()
    is_drafted = torch.zeros(config.vocab_size, dtype=torch.bool, device="cpu")
    is_drafted[columns] = True
    return {"d2t": columns - torch.arange(len(columns), device="cpu"), "t2d": is_drafted}


def _described(checkpoint: EagleCheckpoint) -> dict[str, Any]:
    """Return the config of a Llama, or Qwen where queries are normed, with EAGLE's numbers."""
    config = checkpoint.config
    names = _QWEN_ARCHITECTURES if config.has_qk_norm else _ARCHITECTURES
    described: dict[str, Any] = {
        "architectures": [names[config.kind]],
        "model_type": "qwen3" if config.has_qk_norm else "llama",
        "base_model_name_or_path": checkpoint.base_name_or_path,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "num_hidden_layers": config.num_layers,
        "vocab_size": config.vocab_size,
        "hidden_act": config.hidden_act,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        **_rope(config),
        **_window(config),
        "logit_scale": None if config.logit_scale == 1 else config.logit_scale,
        "tie_word_embeddings": False,
        "torch_dtype": str(checkpoint.dtype).removeprefix("torch."),
        **(_eagle3(config) if config.kind == "eagle3" else _eagle1(config)),
    }
    described = {name: value for name, value in described.items() if value is not None}
    if config.kind == "eagle3":
        # SGLang asks for it, and shares the target's output matrix where it is null.
        described["draft_vocab_size"] = config.draft_vocab_size if config.has_own_lm_head else None
    if checkpoint.choices is not None:
        described["speclm"] = {"choices": [list(path) for path in checkpoint.choices]}
    return described


def _eagle1(config: EagleConfig) -> dict[str, Any]:
    # Without a word on `bias`, SafeAILab's code makes one; vLLM takes it for that of attention
    # unless `qkv_bias` is there.
    return {
        "bias": config.fc_bias,
        "qkv_bias": config.attention_bias,
        "attention_bias": config.attention_output_bias,
    }


def _eagle3(config: EagleConfig) -> dict[str, Any]:
    described: dict[str, Any] = {
        "attention_bias": config.attention_bias,
        "bias": config.fc_bias or None,
        **{name: getattr(config, name) or None for name in _FLAGS},
    }
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


def _rope(config: EagleConfig) -> dict[str, Any]:
    """Return the rotation as Transformers 4 wrote it, which everybody reads."""
    rope = read_rope({"rope_parameters": config.rope_parameters})
    theta, rope_type = rope.pop("rope_theta"), rope.pop("rope_type")
    if rope_type == "default":
        return {"rope_theta": theta}
    # SafeAILab's code takes two keys and no others.
    key = "type" if rope_type in ("linear", "dynamic") and len(rope) == 1 else "rope_type"
    return {"rope_theta": theta, "rope_scaling": {key: rope_type, **rope}}


def _window(config: EagleConfig) -> dict[str, Any]:
    if config.sliding_window is None:
        return {}
    return {
        "sliding_window": config.sliding_window,
        "use_sliding_window": True,
        "layer_types": ["sliding_attention"] * config.num_layers,
    }
