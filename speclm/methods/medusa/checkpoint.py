"""Read Medusa heads in every published layout, and write them in one layout."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from speclm.drafting.heads_folder import (
    CONFIG_NAME,
    read_choices,
    require_folder,
)
from speclm.drafting.package import Package, write_package
from speclm.errors import CheckpointError, shown
from speclm.files.weights import (
    FLOATS,
    INDEX,
    MAX_COUNT,
    WeightFiles,
    read_json,
    reading,
    weight_files,
)
from speclm.tree.static import RankPaths

_log = logging.getLogger("speclm")

# Source: FasterDecoding/Medusa, whose heads are a ModuleList of Sequential.
_LAYER = re.compile(rf"{INDEX}\.{INDEX}\.linear\.(weight|bias)")
_LM_HEAD = re.compile(rf"{INDEX}\.{INDEX}\.weight")
# Source: vLLM up to 0.32.
_VLLM_LAYER = re.compile(rf"blocks\.{INDEX}\.layers\.{INDEX}\.(weight|bias)")
_VLLM_LM_HEAD = re.compile(rf"lm_heads\.{INDEX}\.weight")
_PREFIX = re.compile(r"medusa_heads?\.")


@dataclass(frozen=True, slots=True, eq=False)
class MedusaCheckpoint:
    """Medusa heads as stacked tensors.

    The tensors have the names and shapes of the state dict of `MedusaHeads`.

    Args:
        weight: Matrix of each residual layer.
        bias: Bias of each residual layer; None if the layers have none.
        lm_weight: Output matrix of each head; None if the target's is used.
        vocab_size: Width of the logits; None if neither a tensor nor the config shows it.
        base_name_or_path: The model that the heads were trained on, if known.
        choices: Static tree that was stored with the heads.
        is_merged: Whether they were part of a whole model that was trained with them.
    """

    weight: Float[Tensor, "layers heads hidden hidden"]
    bias: Float[Tensor, "layers heads hidden"] | None = None
    lm_weight: Float[Tensor, "heads vocab hidden"] | None = None
    vocab_size: int | None = None
    base_name_or_path: str | None = None
    choices: RankPaths | None = None
    is_merged: bool = False

    @property
    def num_layers(self) -> int:
        """Residual layers of each head."""
        return self.weight.shape[0]

    @property
    def num_heads(self) -> int:
        """Heads."""
        return self.weight.shape[1]

    @property
    def hidden_size(self) -> int:
        """Width of the target's hidden states."""
        return self.weight.shape[2]

    @property
    def has_own_lm_head(self) -> bool:
        """Whether each head ends in an output matrix of its own."""
        return self.lm_weight is not None

    @property
    def has_bias(self) -> bool:
        """Whether the residual layers have a bias."""
        return self.bias is not None

    @property
    def dtype(self) -> torch.dtype:
        """Type of all tensors."""
        return self.weight.dtype

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, without absent ones."""
        named = {"weight": self.weight, "bias": self.bias, "lm_weight": self.lm_weight}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


@dataclass(frozen=True, slots=True)
class _Keys:
    """The key of each part, by head and layer."""

    layers: dict[tuple[int, int], str]
    biases: dict[tuple[int, int], str]
    lm_heads: dict[int, str]

    @classmethod
    def of(cls, source: WeightFiles, keys: list[str]) -> Self:
        """Sort keys by part; reject unknown keys and two keys for one part."""
        parts = cls({}, {}, {})
        lm_layers: dict[int, int] = {}
        for key in keys:
            name = _PREFIX.sub("", key, count=1)
            if match := _LAYER.fullmatch(name) or _VLLM_LAYER.fullmatch(name):
                role = parts.layers if match[3] == "weight" else parts.biases
                _put(source, role, (int(match[1]), int(match[2])), key)
            elif match := _VLLM_LM_HEAD.fullmatch(name):
                _put(source, parts.lm_heads, int(match[1]), key)
            elif match := _LM_HEAD.fullmatch(name):
                _put(source, parts.lm_heads, int(match[1]), key)
                lm_layers[int(match[1])] = int(match[2])
            else:
                raise CheckpointError(
                    f"{source.path}: found key {shown(key)}, expected only those of Medusa heads "
                    "such as '0.0.linear.weight' and '0.1.weight'; remove it, or export them again"
                )
        for head, layer in lm_layers.items():
            if layer != parts.num_layers:
                raise CheckpointError(
                    f"{source.path}: {parts.lm_heads[head]!r} is an output matrix at index {layer},"
                    f" expected it after {parts.num_layers} layers; layers are missing, download "
                    "the file again"
                )
        return parts

    @property
    def num_heads(self) -> int:
        return 1 + max([*(head for head, _ in self.layers), *self.lm_heads], default=-1)

    @property
    def num_layers(self) -> int:
        return 1 + max((layer for _, layer in self.layers), default=-1)


def find_medusa(folder: Path) -> WeightFiles | None:
    """Return the weight files of Medusa heads in a folder, recognised by their keys only.

    Raises:
        CheckpointError: If a file that has to be opened cannot be read.
    """
    with reading(folder):
        sources = weight_files(folder, first="medusa")
        return next((source for source in sources if _head_keys(source)), None)


def read_medusa(folder: str | Path) -> MedusaCheckpoint:
    """Read Medusa heads from a folder.

    Known layouts are those of FasterDecoding's Medusa (with and without output matrices, pickled
    or not), of models merged with their heads (in safetensors or ``pytorch_model.bin``, in one
    file or shards), of TGI, of vLLM up to 0.32, and our own. Numbers of heads and layers, biases
    and dtype are read from the tensors, because published configs are wrong about them. Pickles
    are read without running code.

    Raises:
        CheckpointError: If there are none, or a tensor is missing, unknown or does not fit.
    """
    with reading(Path(folder)):
        return _read(Path(folder))


def _read(folder: Path) -> MedusaCheckpoint:
    source = find_medusa(folder)
    if source is None:
        found = sorted(path.name for path in folder.glob("*"))[:8]
        raise CheckpointError(
            f"{folder}: no file has the keys of Medusa heads, found {found!r}; expected for "
            "example medusa_lm_head.safetensors with '0.0.linear.weight'"
        )
    keys = _head_keys(source)
    parts, tensors = _Keys.of(source, keys), source.load(keys)
    numbers = range(parts.num_heads), range(parts.num_layers)
    weight = _stack(source, tensors, parts.layers, numbers, "{0}.{1}.linear.weight", 2)
    if weight.shape[-1] != weight.shape[-2]:
        raise CheckpointError(
            f"{source.path}: {parts.layers[0, 0]!r} has shape {list(weight.shape[-2:])}, expected "
            "a square matrix; the file holds other heads, export them again"
        )
    bias = lm_weight = None
    if parts.biases:
        bias = _stack(source, tensors, parts.biases, numbers, "{0}.{1}.linear.bias", 1)
        _require_width(source, parts.biases[0, 0], bias, weight)
    if parts.lm_heads:
        by_layer = {(head, 0): key for head, key in parts.lm_heads.items()}
        layout = f"{{0}}.{parts.num_layers}.weight"
        lm_weight = _stack(source, tensors, by_layer, (numbers[0], range(1)), layout, 2)[0]
        _require_width(source, parts.lm_heads[0], lm_weight, weight)
    dtypes = {str(tensor.dtype) for tensor in tensors.values()}
    if len(dtypes) > 1 or weight.dtype not in FLOATS:
        raise CheckpointError(
            f"{source.path}: found tensors of {sorted(dtypes)!r}, expected one floating dtype "
            "such as float32 or bfloat16; convert them to one"
        )
    config = _read_config(folder)
    _compare_with_config(source, config, parts)
    vocab_size = config.get("vocab_size")
    return MedusaCheckpoint(
        weight=weight,
        bias=bias,
        lm_weight=lm_weight,
        vocab_size=vocab_size if lm_weight is None else lm_weight.shape[1],
        base_name_or_path=config.get("base_model_name_or_path"),
        choices=read_choices(folder, config),
        is_merged=len(keys) < len(source.files),
    )


def _head_keys(source: WeightFiles) -> list[str]:
    """Return the keys that must be parts of heads: all except those of a merged model itself."""
    prefixed = [key for key in source.files if _PREFIX.match(key)]
    if prefixed:
        return sorted(prefixed)
    is_heads = any(_LAYER.fullmatch(k) or _VLLM_LAYER.fullmatch(k) for k in source.files)
    return sorted(source.files) if is_heads else []


def _put(source: WeightFiles, role: dict[Any, str], part: Any, key: str) -> None:
    if part in role:
        raise CheckpointError(
            f"{source.path}: keys {role[part]!r} and {key!r} stand for the same tensor; keep one"
        )
    role[part] = key


def _stack(
    source: WeightFiles,
    tensors: Mapping[str, Tensor],
    keys: Mapping[tuple[int, int], str],
    numbers: tuple[range, range],
    layout: str,
    num_axes: int,
) -> Tensor:
    """Stack the tensors of one part, over layers, then heads."""
    (heads, layers), rows = numbers, []
    expected: torch.Size | None = None
    for layer in layers:
        row = []
        for head in heads:
            key = keys.get((head, layer))
            if key is None:
                raise CheckpointError(
                    f"{source.path}: key {layout.format(head, layer)!r} is missing, found parts of "
                    f"{len(heads)} heads; every head needs the same tensors, download the file "
                    "again"
                )
            shape = tensors[key].shape
            expected = shape if expected is None else expected
            if shape != expected or len(shape) != num_axes:
                raise CheckpointError(
                    f"{source.path}: {key!r} has shape {list(shape)}, expected {list(expected)} "
                    f"with {num_axes} axes as in the first head; heads have to be of equal shape, "
                    "export them again"
                )
            row.append(tensors[key])
        rows.append(torch.stack(row))
    if not rows or not expected or 0 in expected:
        raise CheckpointError(
            f"{source.path}: found no values in {layout.format(0, 0)!r}, expected a matrix or a "
            "vector; export the heads again"
        )
    return torch.stack(rows)


def _require_width(source: WeightFiles, key: str, tensor: Tensor, weight: Tensor) -> None:
    if tensor.shape[-1] != weight.shape[-1]:
        raise CheckpointError(
            f"{source.path}: {key!r} is {tensor.shape[-1]} wide, expected {weight.shape[-1]} as "
            "the layers are; export the heads again"
        )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    config = read_json(path) if path.is_file() else {}
    for name, kind in (("vocab_size", int), ("base_model_name_or_path", str), ("speclm", dict)):
        value, expected = config.get(name), None
        if value is not None and not isinstance(value, kind):
            expected = kind.__name__
        elif isinstance(value, int) and (value is True or not 1 <= value <= MAX_COUNT):
            expected = f"1 to {MAX_COUNT}"
        if expected is not None:
            raise CheckpointError(
                f"{path}: {name} is {shown(value)}, expected {expected}; correct it"
            )
    return config


def _compare_with_config(source: WeightFiles, config: dict[str, Any], parts: _Keys) -> None:
    """Log the values of the config that differ from the tensors."""
    found = {"medusa_num_heads": parts.num_heads, "medusa_num_layers": parts.num_layers}
    wrong = [
        f"{name} {shown(config[name])} (found {number})"
        for name, number in found.items()
        if name in config and config[name] != number
    ]
    if wrong:
        _log.warning("%s goes by its tensors; config.json says %s", source.path, ", ".join(wrong))


WEIGHTS_NAME = "medusa_lm_head.safetensors"


def write_medusa(
    folder: str | Path, checkpoint: MedusaCheckpoint, *, card: str | None = None
) -> None:
    """Write Medusa heads into a folder, next to whatever else it holds.

    TGI and vLLM up to 0.32 read them; heads without output matrices are read by TGI only, if they
    have one layer. The files are written to a temporary folder, read back and compared bit by bit;
    then they appear together and replace older ones.

    Args:
        folder: Created if it does not exist.
        checkpoint: The heads.
        card: Text of the model card; None keeps an existing one.

    Raises:
        CheckpointError: If the folder is a file or holds another model's config, or the files read
            back differently.
    """
    folder = Path(folder)
    require_writable(folder)

    package = Package(_config(checkpoint), {WEIGHTS_NAME: _named_tensors(checkpoint)})
    write_package(folder, package, card=card, check=read_medusa)


def require_writable(folder: Path) -> None:
    """Check that Medusa heads can be written into a folder without destroying anything.

    Raises:
        CheckpointError: If it is a file, or holds the config of another model.
    """
    require_folder(folder)
    config = folder / CONFIG_NAME
    if config.is_file() and "medusa_num_heads" not in read_json(config):
        raise CheckpointError(
            f"{config}: found the config of another model, expected none or that of Medusa heads; "
            "save the heads into a folder of their own"
        )


def _named_tensors(checkpoint: MedusaCheckpoint) -> dict[str, Tensor]:
    named = {}
    for head in range(checkpoint.num_heads):
        for layer in range(checkpoint.num_layers):
            named[f"{head}.{layer}.linear.weight"] = checkpoint.weight[layer, head]
            if checkpoint.bias is not None:
                named[f"{head}.{layer}.linear.bias"] = checkpoint.bias[layer, head]
        if checkpoint.lm_weight is not None:
            named[f"{head}.{checkpoint.num_layers}.weight"] = checkpoint.lm_weight[head]
    return named


def _config(checkpoint: MedusaCheckpoint) -> dict[str, Any]:
    """Return the config that TGI and vLLM read.

    A key `architectures` would switch TGI's speculation off, and vLLM would take a key with "num"
    and "heads" in it for the number of heads; neither may be added.
    """
    config: dict[str, Any] = {
        "medusa_num_heads": checkpoint.num_heads,
        "medusa_num_layers": checkpoint.num_layers,
        "base_model_name_or_path": checkpoint.base_name_or_path,
        "model_type": "medusa",
        "hidden_size": checkpoint.hidden_size,
        "vocab_size": checkpoint.vocab_size,
        "medusa_fc_bias": checkpoint.has_bias,
        "version": "1" if checkpoint.has_own_lm_head else "2",
    }
    if checkpoint.choices is not None:
        config["speclm"] = {"choices": [list(path) for path in checkpoint.choices]}
    return {name: value for name, value in config.items() if value is not None}
