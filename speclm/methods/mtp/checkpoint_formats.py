"""MTP layers in a folder of their own, and within the files of their base, as engines load them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from speclm.cards import HeadsCard
from speclm.config import require_options
from speclm.drafting.base_parts import BaseParts
from speclm.drafting.formats import NUM_PROBED, CheckpointFormat, Engine, random_inputs
from speclm.drafting.heads_folder import WEIGHTS_NAME
from speclm.drafting.package import Package, num_tensor_bytes
from speclm.errors import CheckpointError
from speclm.files.weights import FLOATS, WeightFiles, weight_files
from speclm.methods.mtp.checkpoint_writing import SavedLayers, is_of_layers, pack_mtp, read_layers

SHARD = "model-mtp.safetensors"
"""File of the layers within the files of their base; it comes after numbered ones."""

_ONLY_SHARD = "model-00001-of-00001.safetensors"
_INDEX = "model.safetensors.index.json"
_VLLM = """\
vllm serve $heads --speculative-config '{"method": "mtp", "num_speculative_tokens": 3}'"""
_SGLANG = """\
python -m sglang.launch_server --model-path $heads --speculative-algorithm NEXTN \
--speculative-num-steps 3 --speculative-eagle-topk 1 --speculative-num-draft-tokens 4"""


class _MtpFormat(CheckpointFormat[SavedLayers]):
    """What both formats share."""

    @override
    def read(self, folder: Path, **options: Any) -> SavedLayers:
        require_options(options, (), owner="files of MTP layers")
        return read_layers(folder)

    @override
    def logits(
        self, checkpoint: SavedLayers, *, embeddings: Tensor | None, lm_weight: Tensor | None
    ) -> Float[Tensor, "tensors probed"]:
        """Return sums over all numbers of each tensor with random factors.

        The layers run in classes of their base, which is not loaded here.
        """
        found = []
        for _, tensor in sorted(checkpoint.tensors.items()):
            flat = tensor.float().reshape(len(tensor), -1) if tensor.ndim else tensor.float()[None]
            rows, columns = random_inputs((NUM_PROBED, len(flat)), (flat[0].numel(),))
            found.append(rows @ flat.reshape(len(flat), -1) @ columns)
        return torch.stack(found)

    @override
    def card(self, checkpoint: SavedLayers) -> HeadsCard:
        from speclm.methods.mtp.method import mtp_card

        return mtp_card(checkpoint)


class _Own(_MtpFormat):
    name = "speclm"
    title = "speclm: the keys of the base's own files, in a folder of their own"

    @override
    def detect(self, source: WeightFiles, config: Mapping[str, Any]) -> bool:
        return is_of_layers(source)

    @override
    def pack(self, checkpoint: SavedLayers, base: BaseParts | None) -> Package:
        return pack_mtp(checkpoint)

    @override
    def engines(self, checkpoint: SavedLayers) -> tuple[Engine, ...]:
        return (Engine("speclm", "all", "speclm chat --base $base --heads $heads"),)


class _Whole(_MtpFormat):
    name = "whole"
    title = "the whole base, whose MTP layers they replace"

    @override
    def detect(self, source: WeightFiles, config: Mapping[str, Any]) -> bool:
        return not is_of_layers(source)

    @override
    def pack(self, checkpoint: SavedLayers, base: BaseParts | None) -> Package:
        if base is None:
            raise CheckpointError(
                "format 'whole' needs the base, whose files are part of the folder, found none; "
                "pass its folder or hub id, as with: speclm convert --base"
            )
        source, small = base.whole()
        files = _all_files(next(iter(source.files.values())).parent)
        replaced = _fitted(checkpoint, files, base)
        weights: dict[str, dict[str, Tensor]] = {SHARD: replaced}
        linked: dict[str, str | bytes | Path] = {path.name: path for path in small}
        weight_map = dict.fromkeys(replaced, SHARD)
        total = 0
        for file in sorted({*files.values()}):
            kept = [key for key in files if files[key] == file and key not in replaced]
            name = _ONLY_SHARD if file.name == WEIGHTS_NAME else file.name
            weight_map |= dict.fromkeys(kept, name)
            if len(kept) == sum(each == file for each in files.values()):
                linked[name] = file
                total += num_tensor_bytes(file)
            elif kept:  # without what is replaced: some software reads all keys of all files
                weights[name] = WeightFiles(file, files).load(kept) | weights.get(name, {})
        written = [tensor for tensors in weights.values() for tensor in tensors.values()]
        total += sum(tensor.numel() * tensor.element_size() for tensor in written)
        index = {
            "metadata": {"total_size": total},
            "weight_map": dict(sorted(weight_map.items())),
        }
        linked[_INDEX] = json.dumps(index, indent=2) + "\n"
        own: dict[str, Any] = {"method": "mtp"}
        if checkpoint.choices is not None:
            own["choices"] = [list(path) for path in checkpoint.choices]
        copied = sorted(name for name in weights if name != SHARD)
        notes = (
            "The folder holds the whole base, whose files are linked where possible.",
            *([f"Written anew, without the base's own MTP layers: {copied!r}."] * bool(copied)),
        )
        return Package({**base.config, "speclm": own}, weights, linked, notes)

    @override
    def engines(self, checkpoint: SavedLayers) -> tuple[Engine, ...]:
        its = "those that draft with the MTP layers of the base; the command was not run"
        return (
            Engine(
                "Transformers",
                "5.23, not for Qwen3-Next and Qwen3.5",
                note="Load the folder as any model, and pass use_mtp=True to generate.",
            ),
            Engine("vLLM", its, _VLLM),
            Engine("SGLang", its, _SGLANG),
        )


def _all_files(folder: Path) -> dict[str, Path]:
    """Return the file of each key of a model; some keep MTP layers in a file without an index."""
    return {key: file for each in weight_files(folder) for key, file in each.files.items()}


def _fitted(
    checkpoint: SavedLayers, files: Mapping[str, Path], base: BaseParts
) -> dict[str, Tensor]:
    """Return the layers in the dtypes of those that they replace.

    Raises:
        CheckpointError: If the base has no such tensors, or other ones.
    """
    missing = sorted(checkpoint.tensors.keys() - files.keys())
    if missing:
        raise CheckpointError(
            f"the base {base.name!r} has no {missing[0]!r}, expected all {len(checkpoint.tensors)} "
            "tensors of the MTP layers; name the base that they were trained on"
        )
    fitted = {}
    path = next(iter(files.values())).parent
    for key, tensor in checkpoint.tensors.items():
        old = WeightFiles(path, dict(files)).load([key])[key]
        if old.shape != tensor.shape or old.dtype not in FLOATS:
            raise CheckpointError(
                f"{files[key]}: {key!r} is {old.dtype} of shape {list(old.shape)}, expected "
                f"floating numbers of shape {list(tensor.shape)} as the MTP layers have; name the "
                "base that they were trained on, in floating point"
            )
        fitted[key] = tensor.to(old.dtype)
    return fitted


MTP_FORMATS: tuple[_MtpFormat, ...] = (_Own(), _Whole())
