"""Block heads in the layouts of other software: what each can hold, its keys and its config."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from speclm.cards import HeadsCard
from speclm.config import require_options
from speclm.drafting.base_parts import BaseParts
from speclm.drafting.formats import NUM_PROBED, CheckpointFormat, Engine, random_inputs
from speclm.drafting.heads_folder import WEIGHTS_NAME, hub_id
from speclm.drafting.package import Package
from speclm.errors import CheckpointError
from speclm.files.weights import WeightFiles
from speclm.methods.block.checkpoint import (
    BlockCheckpoint,
    build_block,
    named_tensors,
    pack_block,
    read_block,
)
from speclm.methods.block.config import BlockConfig
from speclm.methods.block.layouts import describe, is_of_deepspec
from speclm.methods.block.network import block_masks

_VLLM = """\
vllm serve $base --speculative-config '{"method": "METHOD", "model": "$heads_in_json", \
"num_speculative_tokens": COUNT}'"""
_SGLANG = """\
python -m sglang.launch_server --model-path $base --speculative-algorithm METHOD \
--speculative-draft-model-path $heads"""
_ALL = frozenset(
    {
        *("of DSpark", "of DFlash", "that are causal", "with causal windows", "in place"),
        *("with embeddings of their own", "with an output matrix of their own"),
        *("with a part of the vocabulary", "with a gated or recurrent Markov head"),
        *("without a Markov head", "with windows that see both ways"),
        *("that read the embeddings", "that read the last layer", "with another unit than silu"),
    }
)
_WINDOWS = frozenset({"with causal windows", "with windows that see both ways"})
_OF_SERVERS = frozenset(
    {"without a Markov head", "that read the last layer", "with another unit than silu"}
)
_OWN = frozenset(
    {
        *("with embeddings of their own", "with an output matrix of their own"),
        "with a part of the vocabulary",
    }
)
_NEED_DEPTH = ("dflash", "specforge")  # their code computes the usual layers in any case
HOLDS: dict[str, frozenset[str]] = {
    "speclm": _ALL,
    "dflash": _ALL - {"of DSpark", "in place"},
    "dspark": _ALL - {"of DFlash"},
    # It reads the last layer's output before the final norm, Transformers after it.
    "vllm": _ALL - _OF_SERVERS - {"with a gated or recurrent Markov head"},
    # Nothing follows the last layer that would keep its output.
    "sglang": _ALL - _OF_SERVERS - _OWN - {"that read the embeddings"},
    # Its layers are causal where they have a window, and only there.
    "specforge": _ALL
    - _OWN
    - {"that are causal", "with windows that see both ways", "in place"}
    - {"that read the embeddings", "that read the last layer", "with another unit than silu"},
    # It counts a window from the anchor, others from each position of the block.
    "speculators": _ALL - _WINDOWS - {"that are causal", "that read the last layer"},
}
"""What the software of each format can hold.

Source: the code of vLLM 0.33, SGLang 0.5.23, SpecForge 0.2.0, speculators 0.9.0, z-lab and
DeepSpec.
"""


def unusual_parts(config: BlockConfig, *, num_target_layers: int | None = None) -> set[str]:
    """Return what these heads are and have that some software cannot hold, in words.

    Args:
        config: Config of the heads.
        num_target_layers: Decoder layers of the base, if it is known.
    """
    is_dspark = is_of_deepspec(config)
    is_sliding = tuple(window is not None for window in config.windows)
    found = {
        "of DSpark": is_dspark,
        "of DFlash": not is_dspark,
        "that are causal": any(config.is_causal) and config.is_causal != is_sliding,
        "with causal windows": any(config.is_causal) and config.is_causal == is_sliding,
        "in place": is_dspark and not config.predicts_next,
        "with embeddings of their own": config.has_own_embeddings,
        "with an output matrix of their own": config.has_own_lm_head,
        "with a part of the vocabulary": config.has_draft_vocab,
        "with a gated or recurrent Markov head": config.markov in ("gated", "rnn"),
        "that read the embeddings": 0 in config.feature_layers,
        "that read the last layer": num_target_layers in config.feature_layers,
        "with another unit than silu": config.hidden_act != "silu",
        "without a Markov head": is_dspark and config.markov is None,
        "with windows that see both ways": any(
            slides and not causal
            for slides, causal in zip(is_sliding, config.is_causal, strict=True)
        ),
    }
    return {words for words, is_there in found.items() if is_there}


class _BlockFormat(CheckpointFormat[BlockCheckpoint]):
    """What the formats of block heads share."""

    @override
    def read(self, folder: Path, **options: Any) -> BlockCheckpoint:
        require_options(options, (), owner="files of block heads")
        return read_block(folder)

    @override
    def logits(
        self, checkpoint: BlockCheckpoint, *, embeddings: Tensor | None, lm_weight: Tensor | None
    ) -> Tensor:
        heads, config = build_block(checkpoint, dtype=torch.float32), checkpoint.config
        matrix = (config.vocab_size, config.hidden_size)
        width = config.hidden_size * len(config.feature_layers)
        features, table, output = random_inputs((1, NUM_PROBED, width), matrix, matrix)
        table = table if embeddings is None else embeddings.float()
        output = output if lm_weight is None else lm_weight.float()
        seen = torch.arange(NUM_PROBED, device="cpu")[None]
        anchor = torch.full((1, 1), NUM_PROBED, dtype=torch.int64, device="cpu")
        size = {"num_positions": config.block_size}
        masks = block_masks(
            config, seen[:, None] >= 0, context_positions=seen, anchors=anchor, **size
        )
        block = anchor + torch.arange(config.block_size, device="cpu")
        with torch.no_grad():
            keys, values = heads.context(features, heads.rotation(seen))
            embedded = heads.embed_blocks(anchor, embedding=lambda ids: table[ids], **size)
            hidden = heads(embedded, heads.rotation(block), keys, values, masks)[0]
            logits = heads.logits(hidden, lm_head=lambda states: states @ output.T)
            tokens = torch.arange(len(hidden), device="cpu") % config.vocab_size
            if heads.markov_head is not None:
                code, _ = heads.markov_head.code(tokens, hidden, None)
                logits = logits + heads.markov_head.markov_w2(code)
            if heads.confidence_head is not None:
                logits = torch.cat((logits, heads.confidence(hidden, tokens)[:, None]), dim=-1)
            return logits

    @override
    def card(self, checkpoint: BlockCheckpoint) -> HeadsCard:
        from speclm.methods.block.method import block_card

        return block_card(checkpoint)

    @override
    def detect(self, source: WeightFiles, config: Mapping[str, Any]) -> bool:
        names = {key.removeprefix("model.") for key in source.files}
        is_flat = "speculators_model_type" not in config and not _is_of_specforge(config)
        has_own = not {"embed_tokens.weight", "lm_head.weight"}.isdisjoint(names)
        return is_flat and not (has_own and _OWN.isdisjoint(HOLDS[self.name]))

    @override
    def pack(self, checkpoint: BlockCheckpoint, base: BaseParts | None) -> Package:
        heads = _held(self.name, checkpoint, base)
        depth = (base.num_layers if base else None) or checkpoint.num_target_layers
        if depth is None and self.name in _NEED_DEPTH:
            raise CheckpointError(
                f"format {self.name!r} needs the number of layers of the base, "
                f"{checkpoint.base_name_or_path or '(not recorded)'!r}, which its software reads "
                "before the layers that the heads name; pass the base"
            )
        return pack_block(heads, num_target_layers=depth)


def _held(name: str, checkpoint: BlockCheckpoint, base: BaseParts | None) -> BlockCheckpoint:
    """Return heads without a tree and copies of the base's matrices, or refuse them."""
    if base is not None:
        checkpoint = checkpoint.share(embeddings=base.embeddings(), lm_weight=base.output_matrix())
    found = unusual_parts(checkpoint.config, num_target_layers=base.num_layers if base else None)
    refused = sorted(found - HOLDS[name])
    if refused:
        others = [other for other, held in HOLDS.items() if held >= found]
        hint = "" if base else "; with the base, copies of its matrices are left out"
        raise CheckpointError(
            f"format {name!r} cannot hold block heads {' and '.join(refused)}, its software would "
            f"misread or ignore that; choose one of {others!r}, or train other heads{hint}"
        )
    return replace(checkpoint, choices=None)


def _is_of_specforge(config: Mapping[str, Any]) -> bool:
    nested = config.get("dflash_config")
    return isinstance(nested, Mapping) and nested.get("projector_type") == "dspark"


def _kind(checkpoint: BlockCheckpoint) -> str:
    return "dspark" if is_of_deepspec(checkpoint.config) else "dflash"


def _vllm_engine(checkpoint: BlockCheckpoint) -> Engine:
    count = str(checkpoint.config.num_drafts)
    command = _VLLM.replace("METHOD", _kind(checkpoint)).replace("COUNT", count)
    return Engine("vLLM", "0.33, the newest that was checked, and later", command)


def _engines(checkpoint: BlockCheckpoint) -> tuple[Engine, ...]:
    """Return vLLM and SGLang as far as they load heads in the names of z-lab and DeepSpec."""
    parts = unusual_parts(checkpoint.config)
    makers = {"vllm": _vllm_engine, "sglang": _sglang_engine}
    return tuple(make(checkpoint) for name, make in makers.items() if parts <= HOLDS[name])


def _sglang_engine(checkpoint: BlockCheckpoint) -> Engine:
    command = _SGLANG.replace("METHOD", _kind(checkpoint).upper())
    return Engine("SGLang", "0.5.23, the newest that was checked", command)


class _Own(_BlockFormat):
    name = "speclm"
    title = "speclm: the names of z-lab and DeepSpec, and the tree in config.json"

    @override
    def detect(self, source: WeightFiles, config: Mapping[str, Any]) -> bool:
        return True  # `read_block` reads every layout

    @override
    def pack(self, checkpoint: BlockCheckpoint, base: BaseParts | None) -> Package:
        return pack_block(checkpoint, num_target_layers=base.num_layers if base else None)

    @override
    def engines(self, checkpoint: BlockCheckpoint) -> tuple[Engine, ...]:
        return (Engine("speclm", "all", "speclm chat --base $base --heads $heads"),)


class _DFlash(_BlockFormat):
    name = "dflash"
    title = "z-lab's DFlash, which is that of JetSpec too"

    @override
    def detect(self, source: WeightFiles, config: Mapping[str, Any]) -> bool:
        return super().detect(source, config) and "dflash_config" in config

    @override
    def engines(self, checkpoint: BlockCheckpoint) -> tuple[Engine, ...]:
        return _engines(checkpoint)


class _DSpark(_BlockFormat):
    name = "dspark"
    title = "DeepSpec's DSpark"

    @override
    def detect(self, source: WeightFiles, config: Mapping[str, Any]) -> bool:
        return super().detect(source, config) and "markov_rank" in config

    @override
    def engines(self, checkpoint: BlockCheckpoint) -> tuple[Engine, ...]:
        return _engines(checkpoint)


class _Vllm(_BlockFormat):
    name = "vllm"
    title = "vLLM"

    @override
    def engines(self, checkpoint: BlockCheckpoint) -> tuple[Engine, ...]:
        return (_vllm_engine(checkpoint),)


class _Sglang(_BlockFormat):
    name = "sglang"
    title = "SGLang"

    @override
    def engines(self, checkpoint: BlockCheckpoint) -> tuple[Engine, ...]:
        return _engines(checkpoint)[::-1]


class _SpecForge(_BlockFormat):
    name = "specforge"
    title = "SpecForge"

    @override
    def detect(self, source: WeightFiles, config: Mapping[str, Any]) -> bool:
        if _is_of_specforge(config):
            return True
        return super().detect(source, config) and "dflash_config" in config

    @override
    def pack(self, checkpoint: BlockCheckpoint, base: BaseParts | None) -> Package:
        package = super().pack(checkpoint, base)
        if _kind(checkpoint) == "dflash":
            return package
        config = dict(package.config)
        nested = {key: config.pop(key) for key in _OF_DSPARK if key in config}
        described = {**config, "architectures": ["DSparkDraftModel"]}
        described |= {"block_size": checkpoint.config.block_size}
        is_grouped = checkpoint.config.num_kv_heads < checkpoint.config.num_heads
        mode = {"projector_type": "dspark", "attention_mode": "gqa" if is_grouped else "mha"}
        return replace(package, config={**described, "dflash_config": {**nested, **mode}})

    @override
    def engines(self, checkpoint: BlockCheckpoint) -> tuple[Engine, ...]:
        return (Engine("SpecForge", "0.2.0", note="It trains them on from there."),)


_OF_DSPARK = (
    *("mask_token_id", "target_layer_ids", "markov_rank", "markov_head_type"),
    *("enable_confidence_head", "confidence_head_with_markov", "sample_from_anchor", "num_anchors"),
)
_OF_LAYERS = (
    *("model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps"),
    *("max_position_embeddings", "rope_theta", "rope_scaling", "attention_bias", "layer_types"),
    *("sliding_window", "use_sliding_window"),
)


class _Speculators(_BlockFormat):
    name = "speculators"
    title = "vLLM's speculators"

    @override
    def detect(self, source: WeightFiles, config: Mapping[str, Any]) -> bool:
        return config.get("speculators_model_type") in ("dflash", "dspark")

    @override
    def pack(self, checkpoint: BlockCheckpoint, base: BaseParts | None) -> Package:
        heads = _held(self.name, checkpoint, base)
        config, kind = heads.config, _kind(heads)
        flat = describe(config, dtype=heads.dtype)
        method = {"proposal_type": "greedy", "speculative_tokens": config.num_drafts}
        verifier = {
            "name_or_path": heads.base_name_or_path or (hub_id(base.name) if base else None),
            "architectures": base.architectures if base else [],
        }
        described: dict[str, Any] = {
            "architectures": ["DSparkSpeculator" if kind == "dspark" else "DFlashSpeculator"],
            "speculators_model_type": kind,
            "speculators_version": "0.9.0",
            "speculators_config": {
                "algorithm": kind,
                "default_proposal_method": "greedy",
                "proposal_methods": [method | {"verifier_accept_k": 1, "accept_tolerance": 0.0}],
                "verifier": verifier,
            },
            "draft_vocab_size": config.draft_vocab_size,
            "block_size": config.block_size,
            "mask_token_id": config.mask_token_id,
            # It counts the hidden states, the embeddings being 0.
            "aux_hidden_state_layer_ids": list(config.feature_layers),
            "sample_from_anchor": config.predicts_next,
            "sliding_window_non_causal": True,
            "tie_word_embeddings": False,
            "dtype": flat["torch_dtype"],
            "transformer_layer_config": {key: flat[key] for key in _OF_LAYERS if key in flat},
        }
        if kind == "dspark":
            names = ("markov_rank", "markov_head_type", "enable_confidence_head")
            described |= {name: flat[name] for name in names if name in flat}
            described["confidence_head_with_markov"] = config.markov is not None
        return Package(described, {WEIGHTS_NAME: named_tensors(heads)})

    @override
    def engines(self, checkpoint: BlockCheckpoint) -> tuple[Engine, ...]:
        note = "vllm serve with the folder alone works if the base is recorded by its hub id."
        own = Engine("speculators", "0.9")
        if not unusual_parts(checkpoint.config) <= HOLDS["vllm"]:
            return (own,)
        return (replace(_vllm_engine(checkpoint), note=note), own)


BLOCK_FORMATS: tuple[_BlockFormat, ...] = (
    *(_Own(), _DFlash(), _DSpark(), _Vllm(), _Sglang(), _SpecForge(), _Speculators()),
)
