"""Reads EAGLE heads, in every published layout, into tensors with one set of names."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from speclm.drafting.heads_folder import read_choices
from speclm.errors import CheckpointError, shown
from speclm.files.weights import FLOATS, INDEX, WeightFiles, reading, weight_files
from speclm.methods.eagle.config import EagleConfig
from speclm.methods.eagle.numbers import expected_shapes, infer_config, read_hints
from speclm.tree.static import RankPaths

_PREFIX = re.compile(r"model\.")
_NAMES = {
    # Source: SafeAILab/EAGLE.
    **{f"{name}.weight": f"{name}.weight" for name in ("fc", "norm", "lm_head", "embed_tokens")},
    "fc.bias": "fc.bias",
    "d2t": "d2t",
    "t2d": "t2d",
    # Source: vLLM.
    "draft_id_to_target_id": "d2t",
    "input_norm.weight": "feature_norm.weight",
    # Source: SGLang.
    "aux_norm_low.weight": "feature_norms.0.weight",
    "aux_norm_mid.weight": "feature_norms.1.weight",
    "aux_norm_high.weight": "feature_norms.2.weight",
}
_LAYER = re.compile(
    rf"layers\.{INDEX}\.(?:self_attn\.(?:[qkvo]_proj\.(?:weight|bias)|[qk]_norm\.weight)"
    r"|mlp\.(?:gate|up|down)_proj\.weight"
    r"|(?:input_layernorm|hidden_norm|post_attention_layernorm)\.weight)"
)
_FEATURE_NORM = re.compile(rf"fc_norm\.{INDEX}\.weight")
# What can be computed, and what speculators keeps of the target while it trains.
_UNUSED = re.compile(r".*rotary_emb\.inv_freq|verifier_(?:lm_head|norm)\.weight")
_EAGLE3_SIGNS = {"layers.0.hidden_norm.weight", "norm.weight", "d2t", "t2d"}
_SHARED = {
    "embed_tokens.weight": "has_own_embeddings",
    "lm_head.weight": "has_own_lm_head",
}


@dataclass(frozen=True, slots=True, eq=False)
class EagleCheckpoint:
    """EAGLE heads as plain numbers and tensors.

    Args:
        config: The numbers.
        tensors: By the names of the state dict of `speclm.heads.EagleHeads`.
        base_name_or_path: The model that the heads were trained on, if known.
        choices: Static tree that was stored with the heads.
    """

    config: EagleConfig
    tensors: Mapping[str, Tensor]
    base_name_or_path: str | None = None
    choices: RankPaths | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Type of the matrices; single tensors may have another."""
        return self.tensors["fc.weight"].dtype

    def share(
        self,
        *,
        embeddings: Float[Tensor, "vocab hidden"] | None = None,
        lm_weight: Float[Tensor, "vocab hidden"] | None = None,
    ) -> Self:
        """Return the checkpoint without the matrices that the target has too.

        Published heads often hold a copy of the target's embeddings, and some of its output
        matrix, in another dtype or not.

        Args:
            embeddings: The target's embeddings.
            lm_weight: The target's output matrix.
        """
        theirs = {"embed_tokens.weight": embeddings, "lm_head.weight": lm_weight}
        copied = {
            name
            for name, matrix in theirs.items()
            if matrix is not None and self._is_copy(self.tensors.get(name), matrix)
        }
        if not copied:
            return self
        flags: dict[str, Any] = {_SHARED[name]: False for name in copied}
        kept = {name: tensor for name, tensor in self.tensors.items() if name not in copied}
        return replace(self, config=replace(self.config, **flags), tensors=kept)

    def _is_copy(self, mine: Tensor | None, matrix: Tensor) -> bool:
        if mine is None or mine.shape != matrix.shape or matrix.is_meta:
            return False
        if matrix.shape[1] != self.config.target_hidden_size:
            return False
        return torch.equal(mine.to(matrix.device, matrix.dtype), matrix)


def find_eagle(folder: Path) -> WeightFiles | None:
    """Return the weights of a folder that hold EAGLE heads, judged by their keys alone.

    Raises:
        CheckpointError: If a file that would have to be looked into cannot be read.
    """
    with reading(folder):
        return next((source for source in weight_files(folder) if is_eagle(source)), None)


def read_eagle(folder: str | Path) -> EagleCheckpoint:
    """Read EAGLE heads from a folder.

    Known are the layouts of SafeAILab's EAGLE-1, 2 and 3 (pickled or not), of vLLM, SGLang,
    SpecForge, speculators and ModelOpt, in one file or shards. Sizes, biases, norms and matrices
    that the heads have of their own come from the tensors; the config tells what no tensor
    shows, such as the number of heads and the rotation. Pickles are read without running code.

    Raises:
        CheckpointError: If the folder holds no EAGLE heads, or a key or tensor is missing,
            unknown or of another shape than the others and the config say.
    """
    with reading(Path(folder)):
        return _read(Path(folder))


def _read(folder: Path) -> EagleCheckpoint:
    source = find_eagle(folder)
    if source is None:
        found = sorted(path.name for path in folder.glob("*"))[:8]
        raise CheckpointError(
            f"{folder}: no file has the keys of EAGLE heads, found {found!r}; expected for example "
            "model.safetensors with 'fc.weight' and 'midlayer.self_attn.q_proj.weight'"
        )
    keys = _own_names(source)
    loaded = source.load(list(keys.values()))
    tensors = {name: loaded[key] for name, key in keys.items()}
    hints = read_hints(folder)
    kind = "eagle3" if _EAGLE3_SIGNS & set(keys) else "eagle"
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    config = infer_config(source.path, shapes, hints, kind)
    offsets, is_drafted = tensors.pop("d2t", None), tensors.pop("t2d", None)
    _require_shapes(source, tensors, keys, config)
    columns = None
    if offsets is not None:
        columns = read_draft_columns(
            source.path,
            offsets=offsets,
            is_drafted=is_drafted,
            num_columns=config.draft_vocab_size,
            vocab_size=config.vocab_size,
        )
    elif config.has_draft_vocab:
        raise CheckpointError(
            f"{source.path}: key 'd2t' is missing, expected it where 'lm_head.weight' has "
            f"{config.draft_vocab_size} rows for a vocabulary of {config.vocab_size}; download the "
            "file again, or correct vocab_size in config.json"
        )
    if config.has_draft_vocab and columns is not None:
        tensors["draft_columns"] = columns
    return EagleCheckpoint(
        config=config,
        tensors=tensors,
        base_name_or_path=_base(hints),
        choices=read_choices(folder, hints),
    )


def is_eagle(source: WeightFiles) -> bool:
    """Return whether a state dict is that of EAGLE heads, from its keys."""
    names = {_canonical(key) for key in source.files}
    return {"fc.weight", "layers.0.self_attn.q_proj.weight"} <= names


def _canonical(key: str) -> str:
    name = _PREFIX.sub("", key, count=1) if _PREFIX.match(key) else key
    return name.replace("midlayer.", "layers.0.", 1) if name.startswith("midlayer.") else name


def _own_names(source: WeightFiles) -> dict[str, str]:
    """Return the key in the file of each tensor, by our name.

    Raises:
        CheckpointError: If one is no part of EAGLE heads, or stands for the same part as another.
    """
    keys: dict[str, str] = {}
    for key in sorted(source.files):
        found = _canonical(key)
        if _UNUSED.fullmatch(found):
            continue
        name = found if _LAYER.fullmatch(found) else _NAMES.get(found)
        if match := _FEATURE_NORM.fullmatch(found):
            name = f"feature_norms.{int(match[1])}.weight"
        if name is None:
            reason = "remove it, or export the heads again"
            if found in ("mask_hidden", "hidden_norm.weight"):
                reason = "these are heads of P-EAGLE or DFlash, which are not supported"
            raise CheckpointError(
                f"{source.path}: found key {shown(key)}, expected only those of EAGLE heads such "
                f"as 'fc.weight' and 'layers.0.mlp.up_proj.weight'; {reason}"
            )
        if name in keys:
            raise CheckpointError(
                f"{source.path}: keys {keys[name]!r} and {key!r} stand for the same tensor; keep "
                "one"
            )
        keys[name] = key
    return keys


def _require_shapes(
    source: WeightFiles, tensors: Mapping[str, Tensor], keys: Mapping[str, str], config: EagleConfig
) -> None:
    expected = expected_shapes(config)
    for name, shape in expected.items():
        if name not in tensors:
            raise CheckpointError(
                f"{source.path}: key {name!r} is missing, found {len(tensors)} other parts of "
                f"heads of {config.kind}; download the file again"
            )
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"{source.path}: {keys[name]!r} is {tensor.dtype} of shape {list(tensor.shape)}, "
                f"expected floating numbers of shape {list(shape)} as the other tensors say; "
                "export the heads again"
            )
    extra = sorted(set(tensors) - set(expected))
    if extra:
        raise CheckpointError(
            f"{source.path}: found key {keys[extra[0]]!r}, expected none such in heads of "
            f"{config.kind} with {config.num_layers} layers; remove it, or export the heads again"
        )


def _base(hints: Mapping[str, Any]) -> str | None:
    verifier = hints.get("speculators_config", {}).get("verifier")
    named = verifier.get("name_or_path") if isinstance(verifier, Mapping) else None
    found = named or hints.get("base_model_name_or_path")
    return found if isinstance(found, str) else None


_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def read_draft_columns(
    path: Path, *, offsets: Tensor, is_drafted: Tensor | None, num_columns: int, vocab_size: int
) -> Int[Tensor, " draft_vocab"]:
    """Return the target's token of each draft token.

    Args:
        path: The file, for messages.
        offsets: What ``d2t`` holds: the target's token less the draft token, of each.
        is_drafted: What ``t2d`` holds: whether each of the target's tokens is drafted.
        num_columns: Width of the heads' logits.
        vocab_size: Width of the target's.

    Raises:
        CheckpointError: If the offsets are not as many whole numbers, point outside of the
            target's vocabulary, or do not increase, or if the two disagree.
    """
    _require_list(path, "d2t", offsets, num_columns, "columns of the logits")
    columns = offsets.to(torch.int64) + torch.arange(num_columns, device="cpu")
    outside = (columns < 0) | (columns >= vocab_size)
    if outside.any():
        place = int(outside.nonzero()[0])
        raise CheckpointError(
            f"{path}: 'd2t' maps draft token {place} to {int(columns[place])}, expected a token "
            f"from 0 to {vocab_size - 1}; the file belongs to another vocabulary, or holds ids in "
            "place of offsets: export the heads again"
        )
    falls = columns[1:] <= columns[:-1]
    if falls.any():
        place = int(falls.nonzero()[0])
        raise CheckpointError(
            f"{path}: 'd2t' maps draft tokens {place} and {place + 1} to {int(columns[place])} and "
            f"{int(columns[place + 1])}, expected increasing tokens; export the heads again with a "
            "sorted vocabulary"
        )
    if is_drafted is not None:
        _require_list(path, "t2d", is_drafted, vocab_size, "tokens of the target")
        expected = torch.zeros(vocab_size, dtype=torch.bool, device="cpu")
        expected[columns] = True
        differs = (is_drafted != 0) != expected
        if differs.any():
            token = int(differs.nonzero()[0])
            raise CheckpointError(
                f"{path}: 't2d' holds {bool(is_drafted[token])} for token {token}, expected "
                f"{bool(expected[token])} as 'd2t' says ({int(differs.sum())} such tokens); one of "
                "them is of another run, export the heads again"
            )
    return columns


def _require_list(path: Path, key: str, found: Tensor, length: int, of: str) -> None:
    if found.shape != (length,) or found.dtype not in _WHOLE:
        raise CheckpointError(
            f"{path}: {key!r} is {found.dtype} of shape {list(found.shape)}, expected whole "
            f"numbers of shape [{length}], the {of}; export the heads again"
        )
