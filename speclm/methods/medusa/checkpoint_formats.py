"""Medusa heads in the layouts of other software."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from speclm.drafting.base_parts import BaseParts
from speclm.drafting.formats import Engine
from speclm.drafting.heads_folder import WEIGHTS_NAME
from speclm.drafting.package import Package
from speclm.files.weights import WeightFiles
from speclm.methods.medusa._rtp_llm import RtpLlm
from speclm.methods.medusa.checkpoint import (
    HeadKeys,
    MedusaCheckpoint,
    head_keys,
    naming,
)
from speclm.methods.medusa.checkpoint_writing import WEIGHTS_NAME as OWN_WEIGHTS_NAME
from speclm.methods.medusa.checkpoint_writing import (
    MedusaFormat,
    base_id,
    base_place,
    merged_notes,
    output_matrices,
    pack_medusa,
    says_counts,
    with_biases,
)

_VLLM_COMMAND = (
    'vllm serve $base --speculative-config \'{"method": "medusa", "model": "$heads_in_json", '
    '"num_speculative_tokens": %d}\''
)
_VLLM_NOTE = "vLLM drafts a chain with the first choice of each head, and 0.33 dropped Medusa."


class _Own(MedusaFormat):
    name = "speclm"
    title = "speclm, which is that of TGI, with the tree in config.json"

    @override
    def detect(self, source: WeightFiles, config: Mapping[str, Any]) -> bool:
        return True  # `read_medusa` reads every layout

    @override
    def pack(self, checkpoint: MedusaCheckpoint, base: BaseParts | None) -> Package:
        notes = merged_notes(checkpoint)
        if base is not None and checkpoint.has_own_lm_head and not base.has_output_bias():
            shared = checkpoint.share(base.output_matrix())
            if not shared.has_own_lm_head:
                notes += (
                    "The heads use the output matrix of the base; their copies of it are left out.",
                )
            checkpoint = shared
        return replace(pack_medusa(checkpoint), notes=notes)

    @override
    def engines(self, checkpoint: MedusaCheckpoint) -> tuple[Engine, ...]:
        return (Engine("speclm", "all", "speclm chat --base $base --heads $heads"),)


class _FasterDecoding(MedusaFormat):
    name = "medusa"
    title = "FasterDecoding's Medusa"

    @override
    def detect(self, source: WeightFiles, config: Mapping[str, Any]) -> bool:
        return (
            source.path.name == "medusa_lm_head.pt"
            and naming(source) == "medusa"
            and says_counts(source, config)
            and bool(HeadKeys.of(source, head_keys(source)).biases)
            and "base_model_name_or_path" in config
        )

    @override
    def pack(self, checkpoint: MedusaCheckpoint, base: BaseParts | None) -> Package:
        place, notes = base_place(checkpoint, base, self)
        parts, added = with_biases(checkpoint)
        notes += added
        if checkpoint.num_layers > 1 and not _repeats_one_layer(checkpoint):
            shared = (
                f"FasterDecoding's code uses one residual block for all {checkpoint.num_layers} "
                "layers of a head, the last one, so it drafts worse with these heads than others; "
                "its output stays right."
            )
            notes = (*notes, shared)
        config: dict[str, Any] = {
            "medusa_num_heads": checkpoint.num_heads,
            "medusa_num_layers": checkpoint.num_layers,
            "base_model_name_or_path": place,
        }
        if not checkpoint.has_own_lm_head:
            config["version"] = "2"
            if checkpoint.vocab_size is not None:  # no tensor shows it; their code ignores it
                config["vocab_size"] = checkpoint.vocab_size
        return Package(config, {"medusa_lm_head.pt": parts}, notes=notes)

    @override
    def engines(self, checkpoint: MedusaCheckpoint) -> tuple[Engine, ...]:
        note = "Its bases are of the Llama family, and it needs a Transformers of early 2024."
        if not checkpoint.has_own_lm_head:
            versions = "v0.1, and main with medusa_model_legacy.py"
            return (Engine("FasterDecoding/Medusa", versions, note=note),)
        command = "python -m medusa.inference.cli --model $heads"
        versions = "v0.1, and main" if checkpoint.num_heads == 5 else "v0.1"
        if checkpoint.num_heads != 5:
            note += " The code on main builds five heads whatever the config says."
        return (Engine("FasterDecoding/Medusa", versions, command, note),)


class _Tgi(MedusaFormat):
    name = "tgi"
    title = "TGI and vLLM up to 0.32, in one folder"

    @override
    def detect(self, source: WeightFiles, config: Mapping[str, Any]) -> bool:
        keys = HeadKeys.of(source, head_keys(source))
        return (
            source.path.name == OWN_WEIGHTS_NAME
            and naming(source) == "medusa"
            and bool(keys.biases and keys.lm_heads)
            and says_counts(source, config)
            # TGI does not speculate if the config names a class, and needs the place of the base.
            and "architectures" not in config
            and "base_model_name_or_path" in config
            and config.get("model_type") == "medusa"
            and config.get("medusa_fc_bias") is True
        )

    @override
    def pack(self, checkpoint: MedusaCheckpoint, base: BaseParts | None) -> Package:
        place, notes = base_place(checkpoint, base, self)
        parts, added = with_biases(checkpoint)
        matrices, copied = output_matrices(checkpoint, base, self, copies=checkpoint.num_heads)
        parts |= matrices
        # Neither `architectures`, nor another key with "num" and "heads" or "layers" in it, which
        # vLLM would take for the numbers of the heads.
        config = {
            "medusa_num_heads": checkpoint.num_heads,
            "medusa_num_layers": checkpoint.num_layers,
            "base_model_name_or_path": place,
            "model_type": "medusa",
            "hidden_size": checkpoint.hidden_size,
            "vocab_size": parts[f"0.{checkpoint.num_layers}.weight"].shape[0],
            "medusa_fc_bias": True,
            "version": "1",
        }
        return Package(config, {OWN_WEIGHTS_NAME: parts}, notes=(*notes, *added, *copied))

    @override
    def engines(self, checkpoint: MedusaCheckpoint) -> tuple[Engine, ...]:
        heads = checkpoint.num_heads
        return (
            Engine(
                "TGI",
                "those with Medusa, up to the last of 2026-01",
                f"text-generation-launcher --model-id $heads --speculate {heads}",
                "It drafts a chain with the first choice of each head, and takes the base from "
                "base_model_name_or_path in config.json.",
            ),
            Engine("vLLM", "0.25 to 0.32", _VLLM_COMMAND % heads, _VLLM_NOTE),
        )


class _Vllm(MedusaFormat):
    name = "vllm"
    title = "vLLM up to 0.32"

    @override
    def detect(self, source: WeightFiles, config: Mapping[str, Any]) -> bool:
        if config.get("model_type") != "medusa" or naming(source) != "vllm":
            return False
        keys = HeadKeys.of(source, head_keys(source))
        # vLLM takes the last key with these syllables in it.
        counts = [value for key, value in config.items() if "num" in key and "heads" in key]
        layers = [
            value
            for key, value in config.items()
            if "num" in key and "heads" not in key and "layers" in key
        ]
        matrices = {0} if config.get("original_lm_head") is True else {*range(keys.num_heads)}
        return (
            counts[-1:] == [keys.num_heads]
            and layers[-1:] == [keys.num_layers]
            and config.get("medusa_fc_bias", False) is bool(keys.biases)
            and {*keys.lm_heads} == matrices
        )

    @override
    def pack(self, checkpoint: MedusaCheckpoint, base: BaseParts | None) -> Package:
        heads, layers = checkpoint.num_heads, checkpoint.num_layers
        matrices, notes = output_matrices(checkpoint, base, self, copies=1)
        is_shared = len({matrix.data_ptr() for matrix in matrices.values()}) == 1
        named: dict[str, Tensor] = {}
        for head, layer in product(range(heads), range(layers)):
            for role in ("weight", "bias") if checkpoint.has_bias else ("weight",):
                part = checkpoint.parts[f"{head}.{layer}.linear.{role}"]
                named[f"blocks.{head}.layers.{layer}.{role}"] = part
        for head in range(1 if is_shared else heads):
            named[f"lm_heads.{head}.weight"] = matrices[f"{head}.{layers}.weight"]
        config: dict[str, Any] = {
            "model_type": "medusa",
            "architectures": ["MedusaModel"],
            "hidden_size": checkpoint.hidden_size,
            "vocab_size": named["lm_heads.0.weight"].shape[0],
            "num_heads": heads,
            "num_hidden_layers": layers,
            "medusa_fc_bias": checkpoint.has_bias,
        }
        if is_shared:
            config["original_lm_head"] = True
        name = base_id(checkpoint, base)
        if name is not None:
            config["base_model_name_or_path"] = name
        notes = (*merged_notes(checkpoint), *notes)
        return Package(config, {WEIGHTS_NAME: named}, notes=notes)

    @override
    def engines(self, checkpoint: MedusaCheckpoint) -> tuple[Engine, ...]:
        command = _VLLM_COMMAND % checkpoint.num_heads
        return (Engine("vLLM", "0.12 to 0.32", command, _VLLM_NOTE),)


MEDUSA_FORMATS = (_Own(), _FasterDecoding(), _Tgi(), _Vllm(), RtpLlm())


def _repeats_one_layer(checkpoint: MedusaCheckpoint) -> bool:
    """Return whether the layers of each head are equal, as in FasterDecoding's own files."""
    parts = checkpoint.parts
    return all(
        torch.equal(part, parts[f"{name.split('.')[0]}.0.linear.{name.split('.')[-1]}"])
        for name, part in parts.items()
        if ".linear." in name
    )
