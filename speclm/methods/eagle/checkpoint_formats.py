"""EAGLE heads in the layouts of other software: the keys and config of each."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from typing_extensions import override

from speclm.drafting.base_parts import BaseParts
from speclm.drafting.formats import Engine
from speclm.drafting.heads_folder import hub_id
from speclm.drafting.package import Package
from speclm.files.weights import WeightFiles
from speclm.methods.eagle.checkpoint import (
    EagleCheckpoint,
    named_tensors,
    pack_eagle,
)
from speclm.methods.eagle.checkpoint_limits import LIMITS, fit, without_copies
from speclm.methods.eagle.checkpoint_writing import (
    EagleFormat,
    described_for,
    in_layers,
    listed,
    package_of,
    sglang_engine,
    with_token_map,
)

_NUM_DRAFT_TOKENS = 3  # that engines recommend
_VLLM = """\
vllm serve $base --speculative-config '{"method": "METHOD", "model": "$heads_in_json", \
"num_speculative_tokens": 3}'"""
_OF_VLLM = {
    *("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "Eagle3Qwen3ForCausalLM"),
    "LlamaForCausalLM",
}


def _is_wrapped(config: Mapping[str, Any]) -> bool:
    return isinstance(config.get("model"), Mapping)


def _architecture(config: Mapping[str, Any]) -> str | None:
    names = config.get("architectures")
    first = names[0] if isinstance(names, list) and names else None
    return first if isinstance(first, str) else None


def _is_eagle3(source: WeightFiles) -> bool:
    return any(key.endswith("hidden_norm.weight") for key in source.files)


def _has(source: WeightFiles, *keys: str) -> bool:
    return source.files.keys() >= {*keys}


class _Own(EagleFormat):
    name = "speclm"
    title = "speclm: SafeAILab's names, and the tree in config.json"

    @override
    def detect(self, source: WeightFiles, config: Mapping[str, Any]) -> bool:
        return True  # `read_eagle` reads every layout

    @override
    def pack(self, checkpoint: EagleCheckpoint, base: BaseParts | None) -> Package:
        if base is not None:
            checkpoint = without_copies(checkpoint, base)
        return pack_eagle(checkpoint, num_target_layers=base.num_layers if base else None)

    @override
    def engines(self, checkpoint: EagleCheckpoint) -> tuple[Engine, ...]:
        return (Engine("speclm", "all", "speclm chat --base $base --heads $heads"),)


class _SafeAILab(EagleFormat):
    name = "eagle"
    title = "SafeAILab's EAGLE"

    @override
    def detect(self, source: WeightFiles, config: Mapping[str, Any]) -> bool:
        if _is_eagle3(source):
            return _has(source, "midlayer.hidden_norm.weight", "lm_head.weight", "d2t", "t2d")
        is_whole = _has(source, "fc.weight", "layers.0.self_attn.q_proj.weight")
        has_more = {"lm_head.weight", "d2t"} & source.files.keys()
        return is_whole and not has_more and not _is_wrapped(config)

    @override
    def engines(self, checkpoint: EagleCheckpoint) -> tuple[Engine, ...]:
        note = "Load them with EaModel.from_pretrained(base_model_path=..., ea_model_path=...)."
        return (Engine("SafeAILab/EAGLE", "its code of March 2025 and later", note=note),)


class _Vllm(EagleFormat):
    name = "vllm"
    title = "vLLM"

    @override
    def detect(self, source: WeightFiles, config: Mapping[str, Any]) -> bool:
        if _is_wrapped(config) or config.get("speculators_model_type"):
            return False
        if _is_eagle3(source):
            drafted, vocab = config.get("draft_vocab_size"), config.get("vocab_size")
            lists_all = _has(source, "d2t") and drafted in (None, vocab)
            return _architecture(config) in _OF_VLLM and not lists_all
        return not {"lm_head.weight", "fc.bias", "d2t"} & source.files.keys()

    @override
    def engines(self, checkpoint: EagleCheckpoint) -> tuple[Engine, ...]:
        kind = checkpoint.config.kind
        versions = "0.33, the newest that was checked, and later"
        found = [Engine("vLLM", versions, _VLLM.replace("METHOD", kind))]
        is_shared = kind == "eagle3" and LIMITS["sglang"][kind].hold(checkpoint.config)
        if is_shared and checkpoint.config.feature_layers is None:
            found.append(sglang_engine(checkpoint))
        return tuple(found)


class _VllmLegacy(EagleFormat):
    name = "vllm-legacy"
    title = "vLLM before 0.7, and the Ascend packages that are based on it"

    @override
    def detect(self, source: WeightFiles, config: Mapping[str, Any]) -> bool:
        return _is_wrapped(config) and _has(source, "lm_head.weight", "embed_tokens.weight")

    @override
    def pack(self, checkpoint: EagleCheckpoint, base: BaseParts | None) -> Package:
        fitted = fit(checkpoint, base, self.name)
        inner = described_for(self.name, fitted.checkpoint)
        wrapper = {"architectures": ["EAGLEModel"], "model_type": "eagle", "model": inner}
        described = {**wrapper, "eagle_fc_bias": fitted.checkpoint.config.fc_bias}
        return package_of(fitted, described, named_tensors(fitted.checkpoint))

    @override
    def engines(self, checkpoint: EagleCheckpoint) -> tuple[Engine, ...]:
        command = "vllm serve $base --speculative-model $heads --num-speculative-tokens 3"
        return (Engine("vLLM", "0.6", command),)


class _Sglang(EagleFormat):
    name = "sglang"
    title = "SGLang"

    @override
    def detect(self, source: WeightFiles, config: Mapping[str, Any]) -> bool:
        if not _is_eagle3(source):
            return _architecture(config) == "LlamaForCausalLMEagle" and not _has(source, "d2t")
        return _architecture(config) == "LlamaForCausalLMEagle3" and "draft_vocab_size" in config

    @override
    def pack(self, checkpoint: EagleCheckpoint, base: BaseParts | None) -> Package:
        fitted = fit(checkpoint, base, self.name)
        heads, notes = fitted.checkpoint, fitted.notes
        described = described_for(self.name, heads)
        if heads.config.kind == "eagle":
            # SGLang takes `bias` for that of attention, and always has one after the joined inputs.
            described["architectures"] = ["LlamaForCausalLMEagle"]
            described = {k: v for k, v in described.items() if k not in ("bias", "qkv_bias")}
            if not heads.config.fc_bias:
                zeros = heads.tensors["fc.weight"].new_zeros(heads.config.hidden_size)
                tensors = {**heads.tensors, "fc.bias": zeros}
                config = replace(heads.config, fc_bias=True)
                heads = EagleCheckpoint(config, tensors, heads.base_name_or_path)
                notes = (*notes, "A zero bias after the joined inputs was added.")
        package = package_of(
            replace(fitted, checkpoint=heads, notes=notes), described, listed(heads)
        )
        return package if heads.config.kind == "eagle3" else with_token_map(package, heads)

    @override
    def engines(self, checkpoint: EagleCheckpoint) -> tuple[Engine, ...]:
        return (sglang_engine(checkpoint),)


class _SpecForge(EagleFormat):
    name = "specforge"
    title = "SpecForge"

    @override
    def detect(self, source: WeightFiles, config: Mapping[str, Any]) -> bool:
        is_its = _architecture(config) == "LlamaForCausalLMEagle3"
        keys = ("midlayer.hidden_norm.weight", "lm_head.weight", "norm.weight", "d2t", "t2d")
        return is_its and _has(source, *keys)

    @override
    def engines(self, checkpoint: EagleCheckpoint) -> tuple[Engine, ...]:
        note = "It trains them on from there."
        return (Engine("SpecForge", "0.2.0", note=note), sglang_engine(checkpoint))


class _Speculators(EagleFormat):
    name = "speculators"
    title = "vLLM's speculators"

    @override
    def detect(self, source: WeightFiles, config: Mapping[str, Any]) -> bool:
        return config.get("speculators_model_type") == "eagle3"

    @override
    def pack(self, checkpoint: EagleCheckpoint, base: BaseParts | None) -> Package:
        fitted = fit(checkpoint, base, self.name)
        heads = fitted.checkpoint
        config, layer = heads.config, described_for(self.name, heads)
        nested = {key: value for key, value in layer.items() if key not in _NOT_OF_LAYERS}
        method = {"proposal_type": "greedy", "speculative_tokens": _NUM_DRAFT_TOKENS}
        verifier = {
            "name_or_path": heads.base_name_or_path or (hub_id(base.name) if base else None),
            "architectures": base.architectures if base else [],
        }
        described: dict[str, Any] = {
            "architectures": ["Eagle3Speculator"],
            "speculators_model_type": "eagle3",
            "speculators_version": "0.9.0",
            "speculators_config": {
                "algorithm": "eagle3",
                "default_proposal_method": "greedy",
                "proposal_methods": [method | {"verifier_accept_k": 1, "accept_tolerance": 0.0}],
                "verifier": verifier,
            },
            "draft_vocab_size": config.draft_vocab_size,
            # vLLM takes it for true if it is absent, speculators for false.
            "norm_before_residual": config.norm_before_residual,
            "norm_before_fc": config.norm_before_fc,
            "fc_norm": config.fc_norm,
            "norm_output": config.norm_output,
            "tie_word_embeddings": False,
            "dtype": layer["torch_dtype"],
            "transformer_layer_config": nested,
        }
        if config.target_hidden_size != config.hidden_size:
            described["target_hidden_size"] = config.target_hidden_size
        if config.feature_layers is not None:
            described["eagle_aux_hidden_state_layer_ids"] = list(config.feature_layers)
        return package_of(fitted, described, in_layers(listed(heads)))

    @override
    def engines(self, checkpoint: EagleCheckpoint) -> tuple[Engine, ...]:
        note = "vllm serve with the folder alone works if the base is recorded by its hub id."
        versions = "0.33, the newest that was checked, and later"
        command = _VLLM.replace("METHOD", "eagle3")
        found = [Engine("vLLM", versions, command, note)]
        if checkpoint.config.target_hidden_size == checkpoint.config.hidden_size:
            found.append(Engine("speculators", "0.9"))
        return tuple(found)


_NOT_OF_LAYERS = {
    *("architectures", "base_model_name_or_path", "draft_vocab_size", "eagle_config", "fc_norm"),
    *("norm_before_residual", "norm_before_fc", "norm_output", "bias"),
    *("target_hidden_size", "tie_word_embeddings", "torch_dtype"),
}


class _ModelOpt(EagleFormat):
    name = "modelopt"
    title = "NVIDIA ModelOpt"

    @override
    def detect(self, source: WeightFiles, config: Mapping[str, Any]) -> bool:
        has_layers = _has(source, "layers.0.hidden_norm.weight", "fc.weight", "norm.weight")
        is_bare = not {"t2d", "embed_tokens.weight"} & source.files.keys()
        return has_layers and is_bare and isinstance(config.get("eagle_config"), Mapping)

    @override
    def pack(self, checkpoint: EagleCheckpoint, base: BaseParts | None) -> Package:
        fitted = fit(checkpoint, base, self.name)
        heads = fitted.checkpoint
        described = described_for(self.name, heads)
        ids = described.get("eagle_config", {}).get("eagle_aux_hidden_state_layer_ids")
        eagle = {"use_aux_hidden_state": True, "use_input_layernorm_in_first_layer": True}
        eagle |= {"use_last_layernorm": True, "use_mtp_layernorm": False}
        described |= {"eagle_config": eagle | {"next_layer_regular": True}}
        if ids is not None:
            described["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = ids
        dropped = ("base_model_name_or_path", "num_aux_hidden_states")
        described = {key: value for key, value in described.items() if key not in dropped}
        tensors = in_layers(listed(heads))
        return package_of(fitted, described, {k: v for k, v in tensors.items() if k != "t2d"})

    @override
    def engines(self, checkpoint: EagleCheckpoint) -> tuple[Engine, ...]:
        note = (
            "Name this folder as speculative_model_dir in the speculative_config of decoding_type "
            "Eagle in the options of trtllm-serve."
        )
        return (Engine("TensorRT-LLM", "with its PyTorch backend", note=note),)


class _RtpLlm(EagleFormat):
    name = "rtp-llm"
    title = "RTP-LLM, for bases of Qwen3-MoE; experimental"

    @override
    def detect(self, source: WeightFiles, config: Mapping[str, Any]) -> bool:
        return _architecture(config) == "Qwen3MoeForCausalLMEagle"

    @override
    def pack(self, checkpoint: EagleCheckpoint, base: BaseParts | None) -> Package:
        fitted = fit(checkpoint, base, self.name)
        described = described_for(self.name, fitted.checkpoint)
        described |= {"architectures": ["Qwen3MoeForCausalLMEagle"], "model_type": "qwen3_moe"}
        del described["draft_vocab_size"]
        named = in_layers(named_tensors(fitted.checkpoint))
        tensors = {
            key if key in ("fc.weight", "lm_head.weight") else f"model.{key}": tensor
            for key, tensor in named.items()
            if key not in ("d2t", "t2d")
        }
        return package_of(fitted, described, tensors)

    @override
    def engines(self, checkpoint: EagleCheckpoint) -> tuple[Engine, ...]:
        note = (
            "Start its server for the base with --sp_type eagle --sp_model_type qwen_3_moe_eagle3 "
            "--sp_checkpoint_path and the place of this folder."
        )
        return (Engine("RTP-LLM", "its code of August 2026; not run by us", note=note),)


EAGLE_FORMATS: tuple[EagleFormat, ...] = (
    *(_Own(), _SafeAILab(), _Vllm(), _VllmLegacy(), _Sglang(), _SpecForge(), _Speculators()),
    *(_ModelOpt(), _RtpLlm()),
)
