"""vLLM's own draft classes on a CPU: its source files, with stand-ins for all that they import.

vLLM cannot be installed without its kernels. Its draft models, its loader of weights and its
configs are plain Python, though: only layers, attention and rotation are ours here, in PyTorch.
"""

import importlib
import importlib.util
import logging
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

SOURCES = Path(sys.prefix, "sources")
"""Where the Makefile unpacks vLLM, in a folder of its version."""

_MODELS = "vllm.model_executor.models."
_CONFIGS = "vllm.transformers_utils.configs."
_REAL = {
    *(_MODELS + name for name in ("utils", "llama", "llama_eagle", "llama_eagle3", "medusa")),
    *(_MODELS + name for name in ("qwen2", "qwen3", "qwen3_eagle3", "qwen3_dflash")),
    _MODELS + "qwen3_dspark",
    "vllm.v1.worker.gpu.spec_decode.eagle.eagle3_utils",
    *(_CONFIGS + name for name in ("eagle", "medusa", "speculators.base", "speculators.algos")),
}
_CURRENT: dict[str, Any] = {}  # vLLM's config of the model that is built


class Unquantized:
    """Says that a layer's weights are as they are."""


class Fused(nn.Module):
    """Linear layers in one matrix, of which vLLM loads one at a time."""

    quant_method = Unquantized()

    def __init__(self, width: int, sizes: dict[Any, int], bias: bool, is_bare: bool = False):
        super().__init__()
        total, self.is_bare, self.input_size = sum(sizes.values()), is_bare, width
        self.weight = nn.Parameter(torch.empty(total, width))
        self.bias = nn.Parameter(torch.empty(total)) if bias else None
        starts = torch.tensor([0, *sizes.values()]).cumsum(0).tolist()
        rows = {
            shard: slice(*pair) for shard, *pair in zip(sizes, starts[:-1], starts[1:], strict=True)
        }

        def load(parameter: Tensor, loaded: Tensor) -> None:
            part = parameter.data
            if len(rows) > 1:
                part = part[rows[loaded.shard_id]]
            load_(part, loaded)

        for parameter in self.parameters():
            parameter.weight_loader = load

    def forward(self, x: Tensor) -> Any:
        y = F.linear(x, self.weight, self.bias)
        return y if self.is_bare else (y, None)


def load_(parameter: Tensor, loaded: Tensor) -> None:
    assert parameter.shape == loaded.shape, (parameter.shape, loaded.shape)
    parameter.data.copy_(loaded)


def qkv(width: int = 0, head: int = 0, heads: int = 0, kv_heads: int = 0, **given: Any) -> Fused:
    width, head = given.get("hidden_size", width), given.get("head_size", head)
    heads = given.get("total_num_heads", heads)
    kv_heads = given.get("total_num_kv_heads", kv_heads)
    sizes = {"q": heads * head, "k": kv_heads * head, "v": kv_heads * head}
    return Fused(width, sizes, given["bias"])


def merged(input_size: int, output_sizes: list[int], bias: bool, **_given: Any) -> Fused:
    return Fused(input_size, dict(enumerate(output_sizes)), bias)


def linear(input_size: int, output_size: int, bias: bool, **given: Any) -> Fused:
    return Fused(input_size, {0: output_size}, bias, is_bare=not given.get("return_bias", True))


class Norm(nn.Module):
    """RMSNorm that also adds a residual."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(size)), eps
        self.variance_epsilon = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        total = x if residual is None else x + residual
        normed = F.rms_norm(total, total.shape[-1:], self.weight, self.eps)
        return normed if residual is None else (normed, total)


class Table(nn.Module):
    """A matrix with a row for each token."""

    def __init__(self, rows: int, width: int, **_given: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids]


class LMHead(Table):
    """An output matrix; vLLM tells the two apart by their classes."""


class LogitsProcessor(nn.Module):
    def __init__(self, _vocab: int, _kept: int | None = None, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, head: nn.Module, states: Tensor) -> Tensor:
        return states @ head.weight.T * self.scale


class Attention(nn.Module):
    """Attention within one text, of which the first keys and values may have been stored."""

    kv_cache, is_causal = None, True

    def __init__(self, _heads: int, head: int, scale: float, **given: Any) -> None:
        super().__init__()
        self.head, self.scale, self.window = head, scale, given["per_layer_sliding_window"]
        self.impl = SimpleNamespace(do_kv_cache_update=self.store)
        self.stored: tuple[Tensor, ...] = ()

    def store(self, _own: Any, keys: Tensor, values: Tensor, _cache: Any, _places: Any) -> None:
        self.stored = keys.flatten(1), values.flatten(1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.stored:
            k, v = (torch.cat(pair) for pair in zip(self.stored, (k, v), strict=True))
        length, start = len(k), len(k) - len(q)
        q, k, v = (x.view(len(x), -1, self.head).transpose(0, 1)[None] for x in (q, k, v))
        distance = torch.arange(start, length)[:, None] - torch.arange(length)
        mask = distance.abs() < (self.window or length)
        if self.is_causal:
            mask &= distance >= 0
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=self.scale, enable_gqa=True)
        return out[0].transpose(0, 1).flatten(1)


class Rope:
    """The rotation of Transformers for the parameters that vLLM found."""

    is_neox_style = True

    def __init__(self, head: int, *, max_position: int, rope_parameters: Any, **_given: Any):
        config = LlamaConfig(
            hidden_size=head,
            num_attention_heads=1,
            max_position_embeddings=max_position,
            rope_parameters=rope_parameters,
        )
        self.head_size, self.rotary = head, LlamaRotaryEmbedding(config)
        whole = self.rotary(torch.empty(0), torch.arange(max_position)[None])
        self.cos_sin_cache = torch.cat([part[0, :, : head // 2] for part in whole], -1)

    def __call__(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        cos, sin = self.rotary(q, positions[None])
        split = [x.view(1, len(x), -1, self.head_size).transpose(1, 2) for x in (q, k)]
        rotated = apply_rotary_pos_emb(*split, cos, sin)
        return tuple(x[0].transpose(0, 1).flatten(1) for x in rotated)


def rms_norm_(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    """Norm the last axis; a matrix of weights has a row for each entry of the first one."""
    if weight.ndim > 1:
        weight = weight.view(len(weight), *[1] * (x.ndim - 2), -1)
    out.copy_(F.rms_norm(x, x.shape[-1:], eps=eps) * weight)


def rotate_(
    positions: Tensor, x: Tensor, _keys: None, head: int, cos_sin: Tensor, is_neox: bool
) -> None:
    """Rotate each head in place, its halves against each other."""
    assert is_neox
    cos, sin = cos_sin[positions][:, None].chunk(2, -1)
    first, second = x.view(len(x), -1, head).chunk(2, -1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    x.copy_(rotated.flatten(1))


def decorator(*given: Any, **_named: Any) -> Any:
    """Return what is decorated, with or without options."""
    return given[0] if given and callable(given[0]) else decorator


class VllmConfig:
    """Names what the draft classes read of vLLM's config."""

    get_quantization_config = staticmethod(lambda *_given: None)


_STAND_INS: dict[str, Any] = {
    "_custom_ops": SimpleNamespace(rms_norm=rms_norm_, rotary_embedding=rotate_),
    "Attention": Attention,
    "AttentionType": SimpleNamespace(DECODER="decoder", ENCODER_ONLY="encoder"),
    "LogitsProcessor": LogitsProcessor,
    "MergedColumnParallelLinear": merged,
    "ParallelLMHead": LMHead,
    "QKVParallelLinear": qkv,
    "ReplicatedLinear": linear,
    "RMSNorm": Norm,
    "RowParallelLinear": linear,
    "SiluAndMul": lambda: lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
    "UnquantizedLinearMethod": Unquantized,
    "VllmConfig": VllmConfig,
    "VocabParallelEmbedding": Table,
    "as_embedding_model": decorator,
    "as_seq_cls_model": decorator,
    "current_platform": SimpleNamespace(is_rocm=lambda: False, is_cuda=lambda: False),
    "default_weight_loader": load_,
    "direct_register_custom_op": lambda **_given: None,
    "get_current_vllm_config": lambda: _CURRENT["config"],
    "get_hf_file_bytes": lambda *_given: None,
    "get_rope": Rope,
    "get_tensor_model_parallel_world_size": lambda: 1,
    "init_logger": logging.getLogger,
    "maybe_fused_act_quant": lambda act, x, _layer: act(x),
    "maybe_prefix": lambda prefix, name: f"{prefix}.{name}" if prefix else name,
    "set_default_rope_theta": lambda *_given, **_named: None,
    "support_quantized_model_reload_from_hp_weights": decorator,
    "support_torch_compile": decorator,
    "supports_any_eagle": lambda _model: True,
    "without_trust_remote_code": lambda given: given,
}


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = _STAND_INS.get(name)
        return type(name, (), {}) if found is None else found


class _Finder:
    def __init__(self, root: Path) -> None:
        self.root = root

    def find_spec(self, name: str, _path: Any = None, _target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] != "vllm":
            return None
        path = self.root / f"{name.replace('.', '/')}.py"
        if name in _REAL and path.is_file():
            return importlib.util.spec_from_file_location(name, path)
        return ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, _module: ModuleType) -> None:
        """Leave the stand-in empty."""


@contextmanager
def vllm(version: str) -> Any:
    """Make a version of vLLM importable, in a process that uses no other at that time."""
    finder = _Finder(SOURCES / f"vllm-{version}")
    sys.meta_path.insert(0, finder)  # type: ignore[arg-type]
    try:
        yield
    finally:
        sys.meta_path.remove(finder)  # type: ignore[arg-type]
        for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
            del sys.modules[name]


def build(module: str, name: str, config: Any, **base: Any) -> Any:
    """Return a draft model of vLLM, whose every number is unknown until it is loaded.

    Args:
        module: Its module in ``vllm.model_executor.models``.
        name: Its class.
        config: The heads' config, as vLLM's config classes return it.
        base: ``num_layers`` and ``vocab_size`` of the target.
    """
    model_config = SimpleNamespace(
        dtype=torch.float32,
        hf_config=None,
        get_num_layers=lambda _parallel: base["num_layers"],
        get_total_num_hidden_layers=lambda: base["num_layers"],
        get_vocab_size=lambda: base["vocab_size"],
    )
    draft = SimpleNamespace(hf_config=config, model="", revision=None)
    places = SimpleNamespace(
        model_config=model_config,
        speculative_config=SimpleNamespace(draft_model_config=draft, parallel_drafting=False),
        load_config=None,
        cache_config=None,
        quant_config=None,
        parallel_config=None,
        use_v2_model_runner=True,
    )
    _CURRENT["config"] = places
    found = getattr(importlib.import_module(_MODELS + module), name)(vllm_config=places)
    for parameter in found.parameters():
        if parameter.is_floating_point():
            nn.init.constant_(parameter, float("nan"))
    return found.eval()


def aux_layers(config: Any) -> tuple[int, ...] | None:
    """Return the hidden states that vLLM reads for a draft model with a config."""
    module = importlib.import_module("vllm.v1.worker.gpu.spec_decode.eagle.eagle3_utils")
    draft = SimpleNamespace(draft_model_config=SimpleNamespace(hf_config=config))
    found: tuple[int, ...] | None = module.get_eagle3_aux_layers_from_config(draft)
    return found


def config_class(module: str, name: str) -> Any:
    """Return a config class of vLLM from a module in ``vllm.transformers_utils.configs``."""
    return getattr(importlib.import_module(_CONFIGS + module), name)


def weights(folder: Path) -> Sequence[tuple[str, Tensor]]:
    """Return all tensors of a folder's weights, as vLLM hands them to a model."""
    (path,) = folder.glob("*.safetensors")
    return [*load_file(path).items()]
