"""Medusa heads in the folder of their base, as RTP-LLM loads them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from speclm.drafting.base_parts import BaseParts
from speclm.drafting.formats import Engine
from speclm.drafting.heads_folder import WEIGHTS_NAME
from speclm.drafting.package import Package, num_tensor_bytes
from speclm.errors import CheckpointError
from speclm.files.weights import WeightFiles
from speclm.methods.medusa.checkpoint import HeadKeys, MedusaCheckpoint, head_keys, naming
from speclm.methods.medusa.checkpoint_writing import (
    MedusaFormat,
    base_needed,
    output_matrices,
    says_counts,
    with_biases,
)
from speclm.methods.medusa.proposer import STATIC_TREE
from speclm.tree.static import trim_paths

# Options that RTP-LLM has by default. Source: its documentation until 2025-05.
_RTP_DEFAULTS = {"top_k": 10, "posterior_threshold": 0.09, "posterior_alpha": 0.3}
_RTP_TREE_DEPTH = 4  # of the tree that RTP-LLM has by default
_BASE_SHARD = "model-00001-of-00001.safetensors"
_HEADS_SHARD = "medusa_head.safetensors"
_INDEX_NAME = "model.safetensors.index.json"


class RtpLlm(MedusaFormat):
    """Layout of RTP-LLM until May 2025: a whole model, with the heads as one of its shards."""

    name = "rtp-llm"
    title = "RTP-LLM until May 2025: the base with the heads in a shard of their own"

    @override
    def detect(self, source: WeightFiles, config: Mapping[str, Any]) -> bool:
        found = config.get("medusa_config")
        if not isinstance(found, dict) or naming(source) != "model":
            return False
        keys = HeadKeys.of(source, head_keys(source))
        return (
            says_counts(source, found)
            and keys.num_layers == 1
            and bool(keys.biases and keys.lm_heads)
            and len(source.files) > len(head_keys(source))
        )

    @override
    def pack(self, checkpoint: MedusaCheckpoint, base: BaseParts | None) -> Package:
        if checkpoint.num_layers > 1:
            raise CheckpointError(
                f"found heads of {checkpoint.num_layers} residual layers, expected 1: RTP-LLM uses "
                "one layer several times; choose the format 'vllm' or 'tgi', or train heads with "
                "one layer"
            )
        if base is None:
            raise base_needed(self, "which is part of the folder")
        parts, added = with_biases(checkpoint)
        matrices, copied = output_matrices(checkpoint, base, self, copies=checkpoint.num_heads)
        parts |= matrices
        named = {f"medusa_head.{name}": part for name, part in parts.items()}
        source, small = base.whole()
        weight_map = {
            key: _BASE_SHARD if file.name == WEIGHTS_NAME else file.name
            for key, file in sorted(source.files.items())
        }
        files: dict[str, str | bytes | Path] = {path.name: path for path in small}
        for file in {*source.files.values()}:
            files[_BASE_SHARD if file.name == WEIGHTS_NAME else file.name] = file
        total = sum(map(num_tensor_bytes, {*source.files.values()}))
        weights = {} if _holds(source, named) else {_HEADS_SHARD: named}
        if weights:
            total += sum(part.numel() * part.element_size() for part in named.values())
            weight_map |= dict.fromkeys(named, _HEADS_SHARD)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        files[_INDEX_NAME] = json.dumps(index, indent=2) + "\n"
        config = {**base.config, "medusa_config": _medusa_config(checkpoint)}
        notes = ("The folder holds the whole base, whose files are linked where possible.",)
        return Package(config, weights, files, (*notes, *added, *copied))

    @override
    def engines(self, checkpoint: MedusaCheckpoint) -> tuple[Engine, ...]:
        return (
            Engine(
                "RTP-LLM",
                "until 2025-05-08, when it dropped Medusa",
                "CHECKPOINT_PATH=$heads TOKENIZER_PATH=$heads "
                'MODEL_TYPE="$$MODEL_TYPE" python3 -m maga_transformer.start_server',
                "MODEL_TYPE is its name of the base's family, such as llama or qwen_2.",
            ),
        )


def _medusa_config(checkpoint: MedusaCheckpoint) -> dict[str, Any]:
    """Return what RTP-LLM reads from the base's config."""
    choices = checkpoint.choices
    if choices is None and checkpoint.num_heads < _RTP_TREE_DEPTH:
        choices = trim_paths(STATIC_TREE, max_depth=checkpoint.num_heads)
    config: dict[str, Any] = {
        "medusa_num_heads": checkpoint.num_heads,
        "medusa_num_layers": checkpoint.num_layers,
    }
    config |= _RTP_DEFAULTS
    if choices is not None:
        config["medusa_choices"] = [list(path) for path in choices]
        highest = max(rank for path in choices for rank in path)
        config["top_k"] = max(_RTP_DEFAULTS["top_k"], 1 + highest)
    return config


def _holds(source: WeightFiles, named: Mapping[str, Tensor]) -> bool:
    """Return whether the base's files hold these heads; refuse those that hold others."""
    theirs = [key for key in source.files if key.startswith("medusa_head")]
    if not theirs:
        return False
    same = {*theirs} == {*named}
    if not same or any(
        not torch.equal(source.load([key])[key], part) for key, part in named.items()
    ):
        raise CheckpointError(
            f"{source.path}: the base holds other heads, found {min(theirs)!r}, expected "
            "none or those to be converted; name the base without heads"
        )
    return True
