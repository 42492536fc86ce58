"""Read EAGLE heads in every published layout, and write them in one layout."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from speclm.drafting.heads_config import base_name
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
from speclm.drafting.package import Package, write_package
from speclm.errors import CheckpointError, OptionError, shown
from speclm.files.weights import INDEX, WeightFiles, read_numbers, reading, weight_files
from speclm.methods.eagle.checkpoint_config import (
    describe,
    infer_config,
    read_hints,
    require_written,
    without_usual_layers,
)
from speclm.methods.eagle.config import EagleConfig
from speclm.methods.eagle.method import TOKEN_MAPS
from speclm.methods.eagle.network import EagleHeads
from speclm.tree.static import RankPaths

_OWN_NAMES = ("fc.weight", "fc.bias", "norm.weight", "lm_head.weight", "embed_tokens.weight")
_NAMES = {
    # Source: SafeAILab/EAGLE.
    **{name: name for name in (*_OWN_NAMES, "d2t", "t2d")},
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
# These can be computed, or are copies of the target's that speculators keeps while training.
_UNUSED = re.compile(r".*rotary_emb\.inv_freq|verifier_(?:lm_head|norm)\.weight")
_EAGLE3_SIGNS = {"layers.0.hidden_norm.weight", "norm.weight"}


class EagleCheckpoint(HeadsCheckpoint[EagleConfig]):
    """EAGLE heads."""


def eagle_checkpoint(
    heads: EagleHeads, *, base_name_or_path: str | None = None, choices: RankPaths | None = None
) -> EagleCheckpoint:
    """Return heads as a checkpoint that shares their memory; see `EagleCheckpoint`."""
    tensors = {name: tensor.detach() for name, tensor in heads.state_dict().items()}
    return EagleCheckpoint(heads.config, tensors, base_name_or_path, choices)


def find_eagle(folder: Path) -> WeightFiles | None:
    """Return the weight files of EAGLE heads in a folder, recognised by their keys only.

    Raises:
        CheckpointError: If a file that has to be opened cannot be read.
    """
    with reading(folder):
        return next((source for source in weight_files(folder) if _is_eagle(source)), None)


def read_eagle(folder: str | Path, *, token_map: str | Path = "auto") -> EagleCheckpoint:
    """Read EAGLE heads from a folder.

    Known layouts are those of SafeAILab's EAGLE-1, 2 and 3 (pickled or not), vLLM, SGLang,
    SpecForge, speculators and ModelOpt, in one file or shards. Most sizes are read from the
    tensors, the others, such as the number of attention heads, from the config. Pickles are read
    without running code.

    Args:
        folder: The folder.
        token_map: File with the ids of the tokens that EAGLE-1 heads draft, a name in the folder or
            a path. ``"auto"`` for the only file `TOKEN_MAPS` in the folder, or the one with as many
            as the config's ``hot_vocab_size``; ``"all"`` for all tokens.

    Raises:
        CheckpointError: If there are none, or a tensor is missing, unknown or has a wrong shape, or
            it is not clear which token map belongs to the heads.
        OptionError: If `token_map` would have no effect on the heads.
    """
    with reading(Path(folder)):
        return _read(Path(folder), token_map)


def _read(folder: Path, token_map: str | Path) -> EagleCheckpoint:
    source = find_eagle(folder)
    if source is None:
        found = sorted(path.name for path in folder.glob("*"))[:8]
        raise CheckpointError(
            f"{folder}: no file has the keys of EAGLE heads, found {found!r}; expected for example "
            "model.safetensors with 'fc.weight' and 'midlayer.self_attn.q_proj.weight'"
        )
    keys, hints = _own_names(source), read_hints(folder)
    loaded = source.load(list(keys.values()))
    tensors = {name: loaded[key] for name, key in keys.items()}
    kind = "eagle3" if _EAGLE3_SIGNS & set(keys) else "eagle"
    chosen = None
    if kind == "eagle" and "d2t" not in tensors:
        chosen = _token_map(folder, hints, token_map)
        if chosen is not None:
            size = hints.get("hot_vocab_size") if token_map == "auto" else None
            _reduce_(tensors, _read_map(chosen, size))
    elif token_map != "auto":
        raise OptionError(
            f"token_map is {str(token_map)!r}, while the heads in {folder} hold the tokens that "
            "they draft, expected EAGLE-1 heads without 'd2t'; leave it out"
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    config = infer_config(source.path, shapes, hints, kind)
    if chosen is not None:
        _require_below(chosen, tensors["d2t"], config.vocab_size)
    offsets, is_drafted = tensors.pop("d2t", None), tensors.pop("t2d", None)
    expected = _expected_shapes(config)
    expected.pop("draft_columns", None)  # of no file
    owner = f"heads of {kind} with {config.num_layers} layers"
    require_shapes(source.path, tensors, expected, keys, owner=owner)
    if offsets is not None:
        columns = read_columns(
            source.path,
            offsets,
            is_drafted,
            vocab_size=config.vocab_size,
            num_columns=config.draft_vocab_size,
        )
        if config.has_draft_vocab:
            tensors["draft_columns"] = columns
    elif config.has_draft_vocab:
        raise CheckpointError(
            f"{source.path}: key 'd2t' is missing, expected it where 'lm_head.weight' has "
            f"{config.draft_vocab_size} rows for a vocabulary of {config.vocab_size}; download the "
            "file again, or correct vocab_size in config.json"
        )
    return EagleCheckpoint(
        config=config,
        tensors=tensors,
        base_name_or_path=base_name(hints),
        choices=read_choices(folder, hints),
    )


def _token_map(folder: Path, hints: Mapping[str, Any], given: str | Path) -> Path | None:
    """Return the file with the tokens that heads draft; None for all tokens."""
    if given == "all":
        return None
    if given != "auto":
        inside = folder / given
        return inside if inside.is_file() else Path(given)
    found, size = sorted(folder.glob(TOKEN_MAPS)), hints.get("hot_vocab_size")
    if len(found) > 1:
        found = [path for path in found if path.name == map_name(size)] or found
    if len(found) > 1 or (size is not None and not found):
        raise CheckpointError(
            f"{folder}: found {len(found)} token maps {[path.name for path in found][:8]!r} and "
            f"hot_vocab_size {size} in config.json, expected one map of the tokens that the heads "
            "draft; name one, as with heads_kwargs={'token_map': 'freq_32768.pt'} or --token-map "
            "freq_32768.pt, or 'all' for all tokens"
        )
    return found[0] if found else None


def map_name(size: object) -> str:
    """Return the usual name of a token map with as many tokens."""
    return TOKEN_MAPS.replace("*", str(size))


def _read_map(path: Path, size: int | None) -> Int[Tensor, " draft_vocab"]:
    """Return the tokens of a map, sorted: their order means nothing to the heads."""
    tokens = read_numbers(path).sort().values
    if size not in (None, len(tokens)):
        raise CheckpointError(
            f"{path}: found {len(tokens)} tokens, expected {size}, the hot_vocab_size in "
            "config.json; take the map of these heads, or name one with token_map"
        )
    repeated = tokens[1:][tokens[1:] == tokens[:-1]]
    if len(repeated) or int(tokens[0]) < 0:
        wrong = f"{int(repeated[0])} twice" if len(repeated) else str(int(tokens[0]))
        raise CheckpointError(
            f"{path}: found token {wrong}, expected ids of the target's tokens, each once; "
            "download the file again"
        )
    return tokens


def _require_below(path: Path, offsets: Tensor, vocab_size: int) -> None:
    highest = len(offsets) - 1 + int(offsets[-1])
    if highest >= vocab_size:
        raise CheckpointError(
            f"{path}: found token {highest}, expected ids up to {vocab_size - 1}, the tokens of "
            "the heads; it belongs to another base, take the map of this one"
        )


def _reduce_(tensors: dict[str, Tensor], columns: Int[Tensor, " draft_vocab"]) -> None:
    """Give the tensors of heads that draft all tokens a draft vocabulary."""
    tensors["d2t"] = columns - torch.arange(len(columns), device="cpu")
    own = tensors.get("lm_head.weight")
    if own is not None and own.ndim and len(own) > int(columns[-1]):
        tensors["lm_head.weight"] = own[columns]


def _is_eagle(source: WeightFiles) -> bool:
    return {"fc.weight", "layers.0.self_attn.q_proj.weight"} <= {*map(_canonical, source.files)}


def _canonical(key: str) -> str:
    return re.sub(r"^midlayer\.", "layers.0.", key.removeprefix("model."))


def _own_names(source: WeightFiles) -> dict[str, str]:
    """Return the key in the file of each tensor, by our name."""
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
            if found == "mask_hidden":
                reason = "these are heads of P-EAGLE, which are not supported"
            elif found == "hidden_norm.weight":
                reason = "these are heads of another method, such as a block drafter"
            raise CheckpointError(
                f"{source.path}: found key {shown(key)}, expected only those of EAGLE heads such "
                f"as 'fc.weight' and 'layers.0.mlp.up_proj.weight'; {reason}"
            )
        if name in keys:
            raise CheckpointError(
                f"{source.path}: keys {keys[name]!r} and {key!r} are the same tensor; keep one"
            )
        keys[name] = key
    return keys


def _expected_shapes(config: EagleConfig) -> dict[str, tuple[int, ...]]:
    state = EagleHeads(config, device=torch.device("meta")).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def write_eagle(
    folder: str | Path,
    checkpoint: EagleCheckpoint,
    *,
    num_target_layers: int | None = None,
    card: str | None = None,
) -> None:
    """Write EAGLE heads into a folder, in the layout of SafeAILab and SpecForge.

    vLLM and SGLang read EAGLE-3 heads of one layer on the usual hidden states; vLLM reads EAGLE-1
    heads without a bias after the joined inputs. The files are written to a temporary folder, read
    back and compared bit by bit; then they appear together and replace older ones.

    Args:
        folder: Created if it does not exist.
        checkpoint: The heads; `EagleCheckpoint.share` drops what the base has too.
        num_target_layers: Decoder layers of the base, if known. The usual hidden states are then
            not named in the config: libraries count named ones differently.
        card: Text of the model card; None keeps an existing one.

    Raises:
        CheckpointError: If the folder is a file or holds another model, the tensors do not fit the
            config, or the files read back differently.
    """
    folder = Path(folder)
    require_writable(folder)
    require_whole(folder, checkpoint.tensors, _expected_shapes(checkpoint.config))
    config = without_usual_layers(checkpoint.config, num_target_layers)

    def check(aside: Path) -> None:
        require_written(folder / CONFIG_NAME, config, read_eagle(aside).config)

    package = pack_eagle(checkpoint, num_target_layers=num_target_layers)
    write_package(folder, package, card=card, check=check)


def pack_eagle(checkpoint: EagleCheckpoint, *, num_target_layers: int | None = None) -> Package:
    """Return the files of EAGLE heads as `write_eagle` writes them."""
    config = describe(
        without_usual_layers(checkpoint.config, num_target_layers),
        dtype=checkpoint.dtype,
        base_name_or_path=checkpoint.base_name_or_path,
        choices=checkpoint.choices,
    )
    return Package(config, {WEIGHTS_NAME: named_tensors(checkpoint)})


def require_writable(folder: Path) -> None:
    """Check that EAGLE heads can be written into a folder without destroying anything.

    Raises:
        CheckpointError: If it is a file, or holds another model or weights that are read instead.
    """
    require_replaceable(folder, is_mine=_is_eagle, owner="EAGLE heads")


def named_tensors(checkpoint: EagleCheckpoint) -> dict[str, Tensor]:
    """Return the tensors by the names that SafeAILab's code uses."""
    config, named = checkpoint.config, {}
    for name, tensor in checkpoint.tensors.items():
        if name == "draft_columns":
            continue
        key = name.replace("feature_norms.", "fc_norm.").replace("feature_norm.", "input_norm.")
        if config.kind == "eagle3":
            key = key.replace("layers.0.", "midlayer.")
        named[key] = tensor
    if config.has_draft_vocab or (config.kind == "eagle3" and config.has_own_lm_head):
        columns = checkpoint.tensors.get("draft_columns")
        named |= draft_lists(columns, vocab_size=config.vocab_size)
    return named
