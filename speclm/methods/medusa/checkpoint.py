"""Medusa heads as tensors, and how they are read in every published layout."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from speclm.drafting.heads_folder import CONFIG_NAME, hub_id, read_choices
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
_CONFIG_TYPES = (
    *(("vocab_size", int), ("base_model_name_or_path", str)),
    *(("speclm", dict), ("medusa_config", dict)),
)


@dataclass(frozen=True, slots=True, eq=False)
class MedusaCheckpoint:
    """Medusa heads as single tensors, which stay on the disk until they are used.

    Args:
        parts: Tensors by the names of FasterDecoding's Medusa: ``{head}.{layer}.linear.weight`` of
            shape [hidden, hidden], ``{head}.{layer}.linear.bias`` of shape [hidden], and the output
            matrix after the last layer, ``{head}.{num_layers}.weight`` of shape [vocab, hidden].
            Heads may all lack biases, and may all lack output matrices: they use the target's.
        vocab_size: Width of the logits; None if neither a tensor nor the config shows it.
        base_name_or_path: The model that the heads were trained on, if known.
        choices: Static tree that was stored with the heads.
        is_merged: Whether they were part of a whole model that was trained with them.
    """

    parts: Mapping[str, Tensor]
    vocab_size: int | None = None
    base_name_or_path: str | None = None
    choices: RankPaths | None = None
    is_merged: bool = False

    @classmethod
    def of_stacked(
        cls,
        weight: Float[Tensor, "layers heads hidden hidden"],
        bias: Float[Tensor, "layers heads hidden"] | None = None,
        lm_weight: Float[Tensor, "heads vocab hidden"] | None = None,
        **others: Any,
    ) -> Self:
        """Return heads that share the memory of tensors as `MedusaHeads` names them."""
        parts: dict[str, Tensor] = {}
        num_layers, num_heads = weight.shape[:2]
        for head, layer in product(range(num_heads), range(num_layers)):
            parts[f"{head}.{layer}.linear.weight"] = weight[layer, head].detach()
            if bias is not None:
                parts[f"{head}.{layer}.linear.bias"] = bias[layer, head].detach()
        for head in range(0 if lm_weight is None else num_heads):
            assert lm_weight is not None
            parts[f"{head}.{num_layers}.weight"] = lm_weight[head].detach()
        return cls(parts, **others)

    @property
    def num_layers(self) -> int:
        """Residual layers of each head."""
        return 1 + max(int(key.split(".")[1]) for key in self.parts if ".linear." in key)

    @property
    def num_heads(self) -> int:
        """Heads."""
        return 1 + max(int(key.split(".")[0]) for key in self.parts)

    @property
    def hidden_size(self) -> int:
        """Width of the target's hidden states."""
        return self.parts["0.0.linear.weight"].shape[0]

    @property
    def has_own_lm_head(self) -> bool:
        """Whether each head ends in an output matrix of its own."""
        return f"0.{self.num_layers}.weight" in self.parts

    @property
    def has_bias(self) -> bool:
        """Whether the residual layers have a bias."""
        return "0.0.linear.bias" in self.parts

    @property
    def dtype(self) -> torch.dtype:
        """Type of all tensors."""
        return self.parts["0.0.linear.weight"].dtype

    def stacked(
        self, *, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> dict[str, Tensor]:
        """Return copies of all tensors as the state dict of `MedusaHeads`.

        Args:
            dtype: Their type; None for that of the heads.
            device: Where they go; None for the CPU.
        """
        heads, layers, hidden = self.num_heads, self.num_layers, self.hidden_size
        names = {"weight": "{1}.{0}.linear.weight"}
        shapes: dict[str, tuple[int, ...]] = {"weight": (layers, heads, hidden, hidden)}
        if self.has_bias:
            names["bias"], shapes["bias"] = "{1}.{0}.linear.bias", (layers, heads, hidden)
        if self.has_own_lm_head:
            names["lm_weight"] = f"{{0}}.{layers}.weight"
            shapes["lm_weight"] = (heads, *self.parts[f"0.{layers}.weight"].shape)
        found = {}
        for name, shape in shapes.items():
            found[name] = torch.empty(shape, dtype=dtype or self.dtype, device=device or "cpu")
            axes = 1 if name == "lm_weight" else 2
            for indices in product(*map(range, shape[:axes])):
                found[name][indices].copy_(self.parts[names[name].format(*indices)])
        return found

    def share(self, lm_weight: Float[Tensor, "vocab hidden"] | None) -> Self:
        """Return the heads without output matrices if these are copies of the target's.

        Other software needs such copies. They make heads larger and no better.

        Args:
            lm_weight: The target's output matrix, if it can be compared.
        """
        layers = self.num_layers
        if lm_weight is None or lm_weight.is_meta or not self.has_own_lm_head:
            return self
        for head in range(self.num_heads):
            mine = self.parts[f"{head}.{layers}.weight"]
            if mine.shape != lm_weight.shape or not torch.equal(
                mine.to(lm_weight.device, lm_weight.dtype), lm_weight
            ):
                return self
        return replace(self, parts={k: t for k, t in self.parts.items() if ".linear." in k})


@dataclass(frozen=True, slots=True)
class HeadKeys:
    """The key of each part of heads in a file, by head and layer."""

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

    def by_part(self, source: WeightFiles, *, is_shared: bool) -> dict[str, str]:
        """Return the key of each part by its name in `MedusaCheckpoint`, layer by layer.

        Args:
            source: The file, for messages.
            is_shared: Whether all heads use the output matrix of the first one.

        Raises:
            CheckpointError: If a key is missing.
        """
        named: dict[str, str] = {}
        lm_heads = {(head, self.num_layers): key for head, key in self.lm_heads.items()}
        if is_shared and [*self.lm_heads] == [0]:
            first = self.lm_heads[0]
            lm_heads = {(head, self.num_layers): first for head in range(self.num_heads)}
        roles = (
            (self.layers, "{}.{}.linear.weight", range(max(1, self.num_layers))),
            (self.biases, "{}.{}.linear.bias", range(self.num_layers)),
            (lm_heads, "{}.{}.weight", range(self.num_layers, self.num_layers + 1)),
        )
        for role, name, layers in roles:
            if not role and role is not self.layers:
                continue
            for head, layer in product(range(self.num_heads), layers):
                if (head, layer) not in role:
                    raise CheckpointError(
                        f"{source.path}: key {name.format(head, layer)!r} is missing, found parts "
                        f"of {self.num_heads} heads; every head needs the same tensors, download "
                        "the file again"
                    )
                named[name.format(head, layer)] = role[head, layer]
        return named

    @property
    def num_heads(self) -> int:
        """Heads, from the highest number in a key."""
        return 1 + max([*(head for head, _ in self.layers), *self.lm_heads], default=-1)

    @property
    def num_layers(self) -> int:
        """Residual layers of each head, from the highest number in a key."""
        return 1 + max((layer for _, layer in self.layers), default=-1)


def find_medusa(folder: Path) -> WeightFiles | None:
    """Return the weight files of Medusa heads in a folder, recognised by their keys only.

    Raises:
        CheckpointError: If a file that has to be opened cannot be read.
    """
    with reading(folder):
        sources = weight_files(folder, first="medusa")
        return next((source for source in sources if head_keys(source)), None)


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
    config = _read_config(folder)
    keys = head_keys(source)
    by_role, loaded = HeadKeys.of(source, keys), source.load(keys)
    named = by_role.by_part(source, is_shared=config.get("original_lm_head") is True)
    parts = {name: loaded[key] for name, key in named.items()}
    _require_equal_shapes(source, parts, named)
    _compare_with_config(source, config, by_role)
    # RTP-LLM reads any heads from the folder of their base.
    is_merged = len(keys) < len(source.files) and "medusa_config" not in config
    vocab_size = config.get("vocab_size")
    lm_weight = parts.get(f"0.{by_role.num_layers}.weight")
    return MedusaCheckpoint(
        parts,
        vocab_size=vocab_size if lm_weight is None else lm_weight.shape[0],
        # That of a merged model is the one that it was trained from, not the model itself.
        base_name_or_path=None if is_merged else hub_id(config.get("base_model_name_or_path")),
        choices=_read_choices(folder, config),
        is_merged=is_merged,
    )


def naming(source: WeightFiles) -> str | None:
    """Return whose names the heads have: FasterDecoding's, the same in a model, or vLLM's."""
    keys = head_keys(source)
    if all(_LAYER.fullmatch(key) or _LM_HEAD.fullmatch(key) for key in keys):
        return "medusa"
    if all(key.startswith("medusa_head.") for key in keys):
        return "model"
    names = [key.removeprefix("medusa_heads.") for key in keys]
    if all(_VLLM_LAYER.fullmatch(name) or _VLLM_LM_HEAD.fullmatch(name) for name in names):
        return "vllm"
    return None


def head_keys(source: WeightFiles) -> list[str]:
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


def _require_equal_shapes(
    source: WeightFiles, parts: Mapping[str, Tensor], keys: Mapping[str, str]
) -> None:
    """Check that all heads have the same shapes and one floating dtype."""
    width = parts["0.0.linear.weight"].shape[-1] if parts["0.0.linear.weight"].ndim else 0
    expected: dict[str, torch.Size] = {}
    for name, tensor in parts.items():
        role = "lm_weight" if ".linear." not in name else name.rpartition(".")[2]
        num_axes = 1 if role == "bias" else 2
        first = expected.setdefault(role, tensor.shape)
        if tensor.shape != first or tensor.ndim != num_axes:
            raise CheckpointError(
                f"{source.path}: {keys[name]!r} has shape {list(tensor.shape)}, expected "
                f"{list(first)} with {num_axes} axes as in the first head; heads have to be of "
                "equal shape, export them again"
            )
        if 0 in first:
            raise CheckpointError(
                f"{source.path}: found no values in {keys[name]!r}, expected a matrix or a vector; "
                "export the heads again"
            )
        if role == "weight" and first[0] != first[1]:
            raise CheckpointError(
                f"{source.path}: {keys[name]!r} has shape {list(first)}, expected a square matrix; "
                "the file holds other heads, export them again"
            )
        if first[-1] != width:
            raise CheckpointError(
                f"{source.path}: {keys[name]!r} is {first[-1]} wide, expected {width} as the "
                "layers are; export the heads again"
            )
    dtypes = {tensor.dtype for tensor in parts.values()}
    if len(dtypes) > 1 or not dtypes <= {*FLOATS}:
        raise CheckpointError(
            f"{source.path}: found tensors of {sorted(map(str, dtypes))!r}, expected one floating "
            "dtype such as float32 or bfloat16; convert them to one"
        )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    config = read_json(path) if path.is_file() else {}
    for name, kind in _CONFIG_TYPES:
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


def _compare_with_config(source: WeightFiles, config: dict[str, Any], parts: HeadKeys) -> None:
    """Log the values of the config that differ from the tensors."""
    found = {"medusa_num_heads": parts.num_heads, "medusa_num_layers": parts.num_layers}
    wrong = [
        f"{name} {shown(config[name])} (found {number})"
        for name, number in found.items()
        if name in config and config[name] != number
    ]
    if wrong:
        _log.warning("%s goes by its tensors; config.json says %s", source.path, ", ".join(wrong))


def _read_choices(folder: Path, config: Mapping[str, Any]) -> RankPaths | None:
    """Return the static tree of a config, under our name for it or that of RTP-LLM."""
    theirs = (config.get("medusa_config") or {}).get("medusa_choices")
    return read_choices(folder, config if theirs is None else {"speclm": {"choices": theirs}})
