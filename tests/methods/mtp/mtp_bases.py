"""Tiny random bases whose folders hold MTP layers, in the layouts of the families."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from speclm import SpecModel
from speclm.drafting.interface import Prefill
from tests.families.building import build_type, is_known
from tests.families.family import EXPERTS, HALF_WINDOW, LATENT
from tests.families.recurrent_rows import DELTA, HALF_LINEAR
from tests.models import WINDOW, randomise

QWEN = {
    "embedding_norm": "mtp.pre_fc_norm_embedding.weight",
    "hidden_norm": "mtp.pre_fc_norm_hidden.weight",
    "projection": "mtp.fc.weight",
    "norm": "mtp.norm.weight",
    "layer": "mtp.layers.{step}.",
}
DEEPSEEK = {
    "embedding_norm": "model.layers.{number}.enorm.weight",
    "hidden_norm": "model.layers.{number}.hnorm.weight",
    "projection": "model.layers.{number}.eh_proj.weight",
    "norm": "model.layers.{number}.shared_head.norm.weight",
    "layer": "model.layers.{number}.",
}
FLASH = {
    "embedding_norm": "model.mtp.layers.{step}.enorm.weight",
    "hidden_norm": "model.mtp.layers.{step}.hnorm.weight",
    "projection": "model.mtp.layers.{step}.eh_proj.weight",
    "norm": "model.mtp.layers.{step}.final_layernorm.weight",
    "layer": "model.mtp.layers.{step}.",
}
MIMO = {
    "embedding_norm": "model.mtp_layers.{step}.token_layernorm.weight",
    "hidden_norm": "model.mtp_layers.{step}.hidden_layernorm.weight",
    "projection": "model.mtp_layers.{step}.input_proj.weight",
    "norm": "model.mtp_layers.{step}.final_layernorm.weight",
    "layer": "model.mtp_layers.{step}.",
}


@dataclass(frozen=True, slots=True)
class Row:
    """A family with MTP layers.

    Args:
        model_type: As Transformers names it.
        settings: What differs from `tests.models.SHAPE`.
        names: Names of the tensors.
        layer: What differs in the config of an MTP layer.
        num_steps: MTP layers.
        declared: What config.json says of their number.
        renamed: Parts of names within the layer that differ on the disk.
    """

    model_type: str
    settings: Mapping[str, Any]
    names: Mapping[str, str]
    layer: Mapping[str, Any] = field(default_factory=dict)
    num_steps: int = 1
    declared: Mapping[str, Any] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)


_FULL = {"layer_types": ["full_attention"]}
_SPARSE = {"first_k_dense_replace": 0}
_ROWS = {
    "qwen3_next": Row(
        "qwen3_next", {**DELTA, **HALF_LINEAR, "head_dim": 12, "num_experts": 0}, QWEN, _FULL
    ),
    "qwen3_next-experts": Row(
        "qwen3_next",
        {**EXPERTS, **DELTA, **HALF_LINEAR, "head_dim": 12, "decoder_sparse_step": 1},
        QWEN,
        _FULL,
    ),
    "qwen3_5": Row("qwen3_5_text", {**DELTA, **HALF_LINEAR, "head_dim": 16}, QWEN, _FULL),
    "deepseek_v3": Row("deepseek_v3", {**EXPERTS, **LATENT, "n_group": 2}, DEEPSEEK, _SPARSE),
    "glm4_moe": Row(
        "glm4_moe",
        {**EXPERTS, "head_dim": 12, "use_qk_norm": True},
        DEEPSEEK,
        _SPARSE,
        num_steps=3,
        declared={"num_mtp_layers": 3},
    ),
    "mimo_v2_flash": Row(
        "mimo_v2_flash",
        {
            **EXPERTS,
            **HALF_WINDOW,
            "num_key_value_heads": 1,
            "head_dim": 12,
            "v_head_dim": 10,
            "mlp_layer_types": ["dense", "sparse"],
        },
        FLASH,
        {"layer_types": ["sliding_attention"], "mlp_layer_types": ["dense"]},
        num_steps=2,
        renamed={"post_attention_layernorm": "pre_mlp_layernorm", "sinks": "attention_sink_bias"},
    ),
    "mimo": Row("qwen2", {"sliding_window": WINDOW}, MIMO),
    "mellum": Row(
        "mellum",
        {**EXPERTS, **HALF_WINDOW, "head_dim": 12, "num_mtp_layers": 1},
        QWEN,
        {"layer_types": ["sliding_attention"], "mlp_layer_types": ["sparse"]},
    ),
    "exaone_moe": Row(
        "exaone_moe",
        {**EXPERTS, **HALF_WINDOW, "head_dim": 12, "mlp_layer_types": ["dense", "sparse"]},
        QWEN,
        {**_FULL, "mlp_layer_types": ["dense"]},
    ),
}
IS_NEW = Version(transformers.__version__) >= Version("5.23")
"""Whether Transformers says of what kind the MTP layers of Mellum are."""
ROWS = {
    name: row
    for name, row in _ROWS.items()
    if is_known(row.model_type) and (IS_NEW or name != "mellum")
}
ONE = Row("glm4_moe", _ROWS["glm4_moe"].settings, DEEPSEEK, _SPARSE)
"""A row for tests of one layer's files."""

TOLERANCE = {"rtol": 1e-3, "atol": 1e-3}
"""Large random weights, other masks and kernels."""
_SHARE = 0.002  # of earlier tokens in the states; without any, the self-check could see no masks


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """A base in a folder.

    Args:
        base: The model.
        folder: Its files, with those of the MTP layers.
        blocks: For each MTP layer a decoder with one layer, and the other weights.
    """

    base: PreTrainedModel
    folder: Path
    blocks: list[tuple[PreTrainedModel, dict[str, Tensor]]]


def make_base(
    folder: Path, row: Row | str, *, shards: bool = False, is_right: bool = False
) -> Made:
    """Write a base with MTP layers into a folder.

    Args:
        folder: Where to.
        row: A row, or the name of one.
        shards: Whether the MTP layers lie in a shard of their own, which an index names.
        is_right: Whether the next token depends on the last one only, so that the MTP layers can
            be and are right.
    """
    row = ROWS[row] if isinstance(row, str) else row
    base = randomise(build_type(row.model_type, {**row.settings, **row.declared}))
    if is_right:
        _pass_on_(base)
    base.save_pretrained(folder)
    decoder: Any = base.get_decoder()
    tensors, blocks = {}, []
    for step in range(row.num_steps):
        config = copy.deepcopy(decoder.config)
        for key, value in {"num_hidden_layers": 1, **row.layer}.items():
            setattr(config, key, value)
        block = randomise(type(decoder)(config), seed=10 + step)
        width, generator = config.hidden_size, torch.Generator().manual_seed(20 + step)
        others = {
            "embedding_norm": 1 + 0.2 * torch.randn(width, generator=generator),
            "hidden_norm": 1 + 0.2 * torch.randn(width, generator=generator),
            "projection": torch.randn(width, 2 * width, generator=generator) / width**0.5,
        }
        if is_right:
            _pass_on_(block)
            others["embedding_norm"] = others["hidden_norm"] = block.norm.weight.detach()
            others["projection"] = torch.eye(width, 2 * width)
        blocks.append((block, others))
        numbers = {"step": step, "number": step + base.config.num_hidden_layers}
        names = {key: pattern.format(**numbers) for key, pattern in row.names.items()}
        state = revert_weight_conversion(block, dict(block.state_dict()))
        tensors |= {names[key]: tensor for key, tensor in others.items()}
        tensors[names["norm"]] = state["norm.weight"]
        for key, tensor in state.items():
            if key.startswith("layers.0."):
                own = names["layer"] + key.removeprefix("layers.0.")
                for ours, theirs in row.renamed.items():
                    own = own.replace(ours, theirs)
                tensors[own] = tensor
    write_tensors(folder, tensors, shards=shards)
    return Made(base, folder, blocks)


@torch.no_grad()
def _pass_on_(model: PreTrainedModel) -> None:
    """Change a decoder so that its states are nearly those of its input, with the usual norm."""
    for name, parameter in model.named_parameters():
        if "down_proj" in name:
            parameter.zero_()
        elif "o_proj" in name or "out_proj" in name:
            parameter.mul_(_SHARE)
    decoder: Any = model.get_decoder() if model.get_output_embeddings() else model
    decoder.norm = type(decoder.norm)(model.config.hidden_size, eps=model.config.rms_norm_eps)


def write_tensors(folder: Path, tensors: dict[str, Tensor], *, shards: bool = False) -> None:
    """Add tensors to a model's folder: to its only file, or in a shard of their own."""
    tensors = {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}
    whole = folder / "model.safetensors"
    if not shards:
        save_file({**load_file(whole), **tensors}, whole, metadata={"format": "pt"})
        return
    names = dict.fromkeys(load_file(whole), "model-00001-of-00002.safetensors")
    whole.rename(folder / "model-00001-of-00002.safetensors")
    save_file(tensors, folder / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    names |= dict.fromkeys(tensors, "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": names})
    )


def logits_along(spec: SpecModel, text: Tensor, path: list[int]) -> Tensor:
    """Return our logits after a text and guesses, after the first of which a branch was drafted."""
    proposer: Any = spec.proposer
    with torch.no_grad():
        features = spec.base(input_ids=text[None], output_hidden_states=True).hidden_states[-1]
        proposer.begin(
            Prefill(
                tokens=text[None, :-1],
                num_padding=torch.zeros(1, dtype=torch.long),
                first_tokens=text[-1:],
                temperature=0.0,
                max_new_tokens=9,
                features=features[:, :-1],
            )
        )
        proposer._context.catch_up()
        run = proposer._context.start([2] * len(path))
        found = [run.logits[0, 0]]
        for depth, token in enumerate(path):
            run.below(torch.tensor([[5, token]]), torch.tensor([[0, min(depth, 1)]]))
            found.append(run.logits[0, 1])
    return torch.stack(found)


@torch.no_grad()
def reference_logits(made: Made, text: Tensor, path: list[int], *, hidden_first: bool) -> Tensor:
    """Return what the MTP layers say after a text and guesses, in full forwards without caches.

    Args:
        made: The base.
        text: Committed tokens, the root last.
        path: Guesses below the root.
        hidden_first: Whether hidden states come first where both are joined.

    Returns:
        Logits after the last guess, ``[vocab]``.
    """
    base: Any = made.base
    hidden = base(input_ids=text[None], output_hidden_states=True).hidden_states[-1][:, :-1]
    tokens = torch.cat([text, torch.tensor(path, dtype=text.dtype)])
    for depth in range(len(path) + 1):
        block, others = made.blocks[min(depth, len(made.blocks) - 1)]
        if depth < len(made.blocks):
            inputs, shift = hidden, depth + 1
        else:  # the last layer reads its own output at the position before
            inputs = torch.cat([inputs, hidden[:, -1:]], dim=1)
        embeddings = base.get_input_embeddings()(tokens[shift : shift + inputs.shape[1]][None])
        normed = [_normed(block, others["embedding_norm"], embeddings)]
        normed.append(_normed(block, others["hidden_norm"], inputs))
        joined = torch.cat(normed[::-1] if hidden_first else normed, dim=-1)
        states = joined @ others["projection"].T
        hidden = block(inputs_embeds=states, use_cache=False).last_hidden_state
    return base.lm_head(hidden[0, -1])


def _normed(block: Any, weight: Tensor, states: Tensor) -> Tensor:
    norm = copy.deepcopy(block.norm)
    norm.weight.copy_(weight)
    return norm(states)
