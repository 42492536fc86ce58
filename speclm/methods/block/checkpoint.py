"""Read block heads in every published layout, and write them in one that others read."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from speclm.drafting.decoder import read_rope
from speclm.drafting.heads_config import base_name, require_same_config
from speclm.drafting.heads_folder import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    HeadsCheckpoint,
    draft_lists,
    read_choices,
    read_columns,
    require_replaceable,
    require_shapes,
    require_whole,
)
from speclm.drafting.heads_network import copy_tensors
from speclm.drafting.package import Package, write_package
from speclm.errors import CheckpointError, shown
from speclm.files.weights import INDEX, WeightFiles, reading, weight_files
from speclm.methods.block.config import BlockConfig
from speclm.methods.block.layouts import (
    describe,
    infer_config,
    name_of_other,
    read_hints,
    require_layers,
)
from speclm.methods.block.network import BlockHeads
from speclm.tree.static import RankPaths

_NAME = re.compile(
    rf"layers\.{INDEX}\.(?:self_attn\.(?:[qkvo]_proj\.(?:weight|bias)|[qk]_norm\.weight)"
    r"|mlp\.(?:gate|up|down)_proj\.weight|(?:input|post_attention)_layernorm\.weight)"
    r"|(?:fc|hidden_norm|norm|embed_tokens|lm_head)\.weight|d2t|t2d"
    r"|markov_head\.(?:markov_w[12]\.weight|(?:gate|joint)_proj\.(?:weight|bias))"
    r"|confidence_head\.proj\.(?:weight|bias)"
)
# These can be computed, or are copies of the target's that speculators keeps while training.
_UNUSED = re.compile(r".*rotary_emb\.inv_freq|verifier_(?:lm_head|norm)\.weight")
_SIGNS = {"fc.weight", "hidden_norm.weight", "layers.0.self_attn.q_proj.weight"}
_QUANTISED = re.compile(
    r".*(?:_scale(?:_inv)?|_packed|_zero_point|qweight|qzeros|scales|absmax|g_idx)"
)
_CONFIDENCE = "confidence_head.proj.weight"


@dataclass(frozen=True, slots=True, eq=False)
class BlockCheckpoint(HeadsCheckpoint[BlockConfig]):
    """Block heads; tensors have the names of z-lab and DeepSpec.

    Args:
        num_target_layers: Decoder layers of the base, if known.
    """

    num_target_layers: int | None = None


def block_checkpoint(
    heads: BlockHeads, *, base_name_or_path: str | None = None, choices: RankPaths | None = None
) -> BlockCheckpoint:
    """Return heads as a checkpoint that shares their memory; see `BlockCheckpoint`."""
    tensors = {name: tensor.detach() for name, tensor in heads.state_dict().items()}
    return BlockCheckpoint(heads.config, tensors, base_name_or_path, choices)


def build_block(
    checkpoint: BlockCheckpoint,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> BlockHeads:
    """Return the heads of a checkpoint, with copies of its tensors.

    Args:
        checkpoint: Result of `read_block`.
        dtype: Dtype of the weights; None for the checkpoint's.
        device: Device of the weights; None for the CPU.

    Raises:
        CheckpointError: If a weight is too large for the dtype.
    """
    heads = BlockHeads(checkpoint.config, device=torch.device("meta"))
    target = device or torch.device("cpu")
    state = copy_tensors(checkpoint.tensors, dtype=dtype or checkpoint.dtype, device=target)
    _require_finite("block heads", state)
    heads.load_state_dict(state, assign=True)
    return heads.to(target)


def find_block(folder: Path) -> WeightFiles | None:
    """Return the weight files of block heads in a folder, recognised by their keys only.

    Files with nothing but layers for multi-token prediction count too, so that `read_block` can
    name them.

    Raises:
        CheckpointError: If a file that has to be opened cannot be read.
    """
    with reading(folder):
        return next((source for source in weight_files(folder) if _is_block(source)), None)


def read_block(folder: str | Path, *, num_target_layers: int | None = None) -> BlockCheckpoint:
    """Read block heads from a folder.

    Known layouts are those of z-lab's DFlash, DeepSpec's DSpark, SpecForge, speculators and
    JetSpec, in one file or shards, pickled or not. Most sizes are read from the tensors, the others
    from the config; the layers of the base that the heads read have to be named there. Pickles are
    read without running code.

    Args:
        folder: The folder.
        num_target_layers: Decoder layers of the base, if the heads are read for one.

    Raises:
        CheckpointError: If there are none or those of another method, or a tensor or value is
            missing, unknown or wrong.
    """
    with reading(Path(folder)):
        checkpoint = _read(Path(folder))
        if num_target_layers is not None:
            require_layers(Path(folder) / CONFIG_NAME, checkpoint.config, num_target_layers)
        return checkpoint


def _read(folder: Path) -> BlockCheckpoint:
    source, hints = find_block(folder), read_hints(folder)
    if source is None:
        raise CheckpointError(_absence(folder))
    other = name_of_other(source.files, hints)
    if other is not None:
        raise CheckpointError(
            f"{source.path}: these are heads of {other}, expected those of DFlash, DSpark or "
            "JetSpec; no others of this family are supported, choose one of these"
        )
    keys = _own_names(source)
    loaded = source.load(list(keys.values()))
    tensors = {name: loaded[key] for name, key in keys.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    config = infer_config(source.path, shapes, hints)
    offsets, is_drafted = tensors.pop("d2t", None), tensors.pop("t2d", None)
    _widen_confidence_(tensors, config)
    expected = _expected_shapes(config)
    expected.pop("draft_columns", None)  # of no file
    owner = f"block heads with {config.num_layers} layers"
    require_shapes(source.path, tensors, expected, keys, owner=owner)
    _require_finite(str(source.path), tensors)
    if offsets is not None:
        sizes = {"vocab_size": config.vocab_size, "num_columns": config.draft_vocab_size}
        columns = read_columns(source.path, offsets, is_drafted, **sizes)
        if config.has_draft_vocab:
            tensors["draft_columns"] = columns
    elif config.has_draft_vocab:
        raise CheckpointError(
            f"{source.path}: key 'd2t' is missing, expected it where 'lm_head.weight' has "
            f"{config.draft_vocab_size} rows for a vocabulary of {config.vocab_size}; download the "
            "file again, or correct vocab_size in config.json"
        )
    return BlockCheckpoint(
        config=config,
        tensors=tensors,
        base_name_or_path=base_name(hints),
        choices=read_choices(folder, hints),
        num_target_layers=hints.get("num_target_layers"),
    )


def _is_block(source: WeightFiles) -> bool:
    return _has_signs(source) or _is_of_mtp(source)


def _has_signs(source: WeightFiles) -> bool:
    return {key.removeprefix("model.") for key in source.files} >= _SIGNS


def _is_of_mtp(source: WeightFiles) -> bool:
    """Return whether there are layers for multi-token prediction, without those of a model."""
    others = [key for key in source.files if not key.startswith("mtp")]
    has_layers = len(others) < len(source.files) or any(".eh_proj." in key for key in others)
    return has_layers and not any("layers.0." in key for key in others)


def _absence(folder: Path) -> str:
    """Return why no file of a folder is one of block heads."""
    for source in weight_files(folder):
        names = {key.removeprefix("model.") for key in source.files}
        quantised = next((name for name in sorted(names) if _QUANTISED.fullmatch(name)), None)
        if quantised is not None:
            return (
                f"{source.path}: found key {shown(quantised)}, expected only weights; the heads "
                "are quantised; load those in full precision"
            )
        if names & _SIGNS:
            missing = sorted(_SIGNS - names)
            return (
                f"{source.path}: key {missing[0]!r} is missing, expected it in a file of block "
                "heads; download the file again, or name a folder of block heads"
            )
    found = sorted(path.name for path in folder.glob("*"))[:8]
    return (
        f"{folder}: no file has the keys of block heads, found {found!r}; expected for example "
        "model.safetensors with 'fc.weight', 'hidden_norm.weight' and "
        "'layers.0.self_attn.q_proj.weight'; name a folder of block heads"
    )


def _own_names(source: WeightFiles) -> dict[str, str]:
    """Return the key in the file of each tensor, by our name."""
    keys: dict[str, str] = {}
    for key in sorted(source.files):
        name = key.removeprefix("model.")
        if _UNUSED.fullmatch(name):
            continue
        if _NAME.fullmatch(name) is None:
            reason = "remove it, or export the heads again"
            if _QUANTISED.fullmatch(name):
                reason = "the heads are quantised; load those in full precision"
            raise CheckpointError(
                f"{source.path}: found key {shown(key)}, expected only those of block heads such "
                f"as 'fc.weight' and 'layers.0.mlp.up_proj.weight'; {reason}"
            )
        if name in keys:
            raise CheckpointError(
                f"{source.path}: keys {keys[name]!r} and {key!r} are the same tensor; keep one"
            )
        keys[name] = key
    return keys


def _widen_confidence_(tensors: dict[str, Tensor], config: BlockConfig) -> None:
    """Let a confidence head that reads the state only ignore the Markov head's embedding."""
    weight = tensors.get(_CONFIDENCE)
    if weight is not None and weight.shape == (1, config.hidden_size):
        tensors[_CONFIDENCE] = F.pad(weight, (0, config.markov_rank))


def _require_finite(place: str, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            remedy = "download the file again"
            if tensor.dtype is torch.float16:
                remedy = "float16 overflows, load or save these heads in bfloat16 (bf16)"
            raise CheckpointError(
                f"{place}: {name!r} has values that are not finite in {tensor.dtype}, expected "
                f"numbers; {remedy}"
            )


def _expected_shapes(config: BlockConfig) -> dict[str, tuple[int, ...]]:
    state = BlockHeads(config, device=torch.device("meta")).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def write_block(
    folder: str | Path,
    checkpoint: BlockCheckpoint,
    *,
    num_target_layers: int | None = None,
    card: str | None = None,
) -> None:
    """Write block heads into a folder, as z-lab does, or as DeepSpec does if they are DSpark's.

    vLLM and SGLang read both. The files are written to a temporary folder, read back and compared
    bit by bit; then they appear together and replace older ones.

    Args:
        folder: Created if it does not exist.
        checkpoint: The heads; `BlockCheckpoint.share` drops what the base has too.
        num_target_layers: Decoder layers of the base, if known.
        card: Text of the model card; None keeps an existing one.

    Raises:
        CheckpointError: If the folder is a file or holds another model, the tensors do not fit the
            config, or the files read back differently.
    """
    folder, config = Path(folder), checkpoint.config
    require_writable(folder)
    require_whole(folder, checkpoint.tensors, _expected_shapes(config))
    _require_finite(str(folder), checkpoint.tensors)

    def check(aside: Path) -> None:
        found = read_block(aside, num_target_layers=num_target_layers)
        _require_written(folder / CONFIG_NAME, config, found.config)

    package = pack_block(checkpoint, num_target_layers=num_target_layers)
    write_package(folder, package, card=card, check=check)


def pack_block(checkpoint: BlockCheckpoint, *, num_target_layers: int | None = None) -> Package:
    """Return the files of block heads as `write_block` writes them."""
    described = describe(
        checkpoint.config,
        dtype=checkpoint.dtype,
        num_target_layers=num_target_layers or checkpoint.num_target_layers,
        base_name_or_path=checkpoint.base_name_or_path,
        choices=checkpoint.choices,
    )
    return Package(described, {WEIGHTS_NAME: named_tensors(checkpoint)})


def named_tensors(checkpoint: BlockCheckpoint) -> dict[str, Tensor]:
    """Return the tensors by the names of z-lab and DeepSpec."""
    named = {name: t for name, t in checkpoint.tensors.items() if name != "draft_columns"}
    if checkpoint.config.has_draft_vocab:
        columns = checkpoint.tensors["draft_columns"]
        named |= draft_lists(columns, vocab_size=checkpoint.config.vocab_size)
    return named


def require_writable(folder: Path) -> None:
    """Check that block heads can be written into a folder without destroying anything.

    Raises:
        CheckpointError: If it is a file, or holds another model or weights that are read instead.
    """
    require_replaceable(
        folder,
        is_mine=lambda source: _has_signs(source) and name_of_other(source.files, {}) is None,
        owner="block heads",
    )


def _require_written(path: Path, written: BlockConfig, found: BlockConfig) -> None:
    rope = read_rope({"rope_parameters": written.rope_parameters})
    require_same_config(path, asdict(replace(written, rope_parameters=rope)), asdict(found))
