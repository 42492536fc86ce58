"""Write MTP layers by the keys that they have in the files of their base, and read them back."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from speclm.drafting.heads_folder import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    read_choices,
    require_replaceable,
)
from speclm.drafting.package import Package, write_package
from speclm.errors import CheckpointError, UnsupportedModelError
from speclm.files.atomic import read_json as read_any_json
from speclm.files.weights import MAX_COUNT, WeightFiles, read_json, weight_files
from speclm.methods.mtp.assembly import MATRICES
from speclm.methods.mtp.checkpoint import LAYER, LAYOUTS, find_mtp
from speclm.methods.mtp.network import MtpHeads, MtpLayer
from speclm.target import TargetView
from speclm.tree.static import RankPaths


@dataclass(frozen=True, slots=True, eq=False)
class SavedLayers:
    """MTP layers without their base.

    Args:
        tensors: By the keys that they have in the files of the base.
        num_steps: Number of layers.
        num_target_layers: Decoder layers of the base, from which some layouts count on.
        hidden_size: Width of the base.
        base_name_or_path: The base, if it is known.
        choices: Static tree that was stored with the layers.
    """

    tensors: Mapping[str, Tensor]
    num_steps: int
    num_target_layers: int
    hidden_size: int
    base_name_or_path: str | None = None
    choices: RankPaths | None = None

    vocab_size = None
    """They draft over the vocabulary of the base, whatever it is."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the matrices; single tensors may have another."""
        return max(self.tensors.values(), key=Tensor.numel).dtype


def saved_layers(
    heads: MtpHeads,
    view: TargetView,
    *,
    base_name_or_path: str | None = None,
    choices: RankPaths | None = None,
) -> SavedLayers:
    """Return the layers of a target by the keys of its files; they share memory where they can.

    Copies of the target's embeddings and output matrix, which files may have, are left out.

    Args:
        heads: Result of `build_mtp` for the target.
        view: The target.
        base_name_or_path: The target's name, if others can find it by that name.
        choices: Static tree to store.

    Raises:
        UnsupportedModelError: If Transformers does not turn the layers back into these keys.
    """
    tensors: dict[str, Tensor] = {}
    for step, (layer, keys) in enumerate(zip(heads.layers, heads.keys, strict=True)):
        named = _named(cast("MtpLayer", layer))
        lacking = sorted(keys.keys() - named.keys() - MATRICES.keys())
        if lacking or not named.keys() <= keys.keys():
            found = sorted(named.keys() - keys.keys())[:6]
            raise UnsupportedModelError(
                f"MTP layer {step} cannot be written as it was read: it lacks {lacking[:6]!r} and "
                f"has {found!r}, expected the tensors of the base's files, which Transformers "
                "renames; use a version that saves this family"
            )
        tensors |= {keys[name]: tensor.detach() for name, tensor in named.items()}
    return SavedLayers(
        tensors,
        num_steps=len(heads.layers),
        num_target_layers=view.num_layers,
        hidden_size=view.hidden_size,
        base_name_or_path=base_name_or_path,
        choices=choices,
    )


def _named(layer: MtpLayer) -> dict[str, Tensor]:
    """Return the tensors of a layer by our names, as Transformers would save them."""
    own, inner = layer.state_dict(), {}
    start = "decoder."
    for name in [name for name in own if name.startswith(start)]:
        tensor = own.pop(name)
        if name != "decoder.embed_tokens.weight":  # stands for those that are given
            inner[name.removeprefix(start)] = tensor
    named = {
        name.replace("lm_head.", "head.").replace("embed_tokens.", "embeddings."): tensor
        for name, tensor in own.items()
    }
    for name, tensor in revert_weight_conversion(layer.decoder, inner).items():
        is_inner = name.startswith("layers.0.")
        named[LAYER + name.removeprefix("layers.0.") if is_inner else name] = tensor
    return named


def write_mtp(folder: str | Path, layers: SavedLayers, *, card: str | None = None) -> None:
    """Write MTP layers into a folder that ``SpecModel.from_pretrained`` loads next to their base.

    The files are written to a temporary folder, read back and compared bit by bit; then they appear
    together and replace older ones.

    Args:
        folder: Created if it does not exist.
        layers: The layers.
        card: Text of the model card; None keeps an existing one.

    Raises:
        CheckpointError: If the folder is a file or holds another model, or the files read back
            differently.
    """
    folder = Path(folder)
    require_writable(folder)
    write_package(folder, pack_mtp(layers), card=card, check=read_layers)


def pack_mtp(layers: SavedLayers) -> Package:
    """Return the files of MTP layers as `write_mtp` writes them."""
    own: dict[str, Any] = {"method": "mtp"}
    if layers.choices is not None:
        own["choices"] = [list(path) for path in layers.choices]
    config: dict[str, Any] = {
        "architectures": ["MtpLayers"],
        "base_model_name_or_path": layers.base_name_or_path,
        "num_hidden_layers": layers.num_target_layers,
        "num_nextn_predict_layers": layers.num_steps,
        "hidden_size": layers.hidden_size,
        "dtype": str(layers.dtype).removeprefix("torch."),
        "speclm": own,
    }
    config = {name: value for name, value in config.items() if value is not None}
    return Package(config, {WEIGHTS_NAME: layers.tensors})


def read_layers(folder: Path) -> SavedLayers:
    """Return the MTP layers in a folder; their tensors stay on the disk until they are used.

    Raises:
        CheckpointError: If there are none, or they are damaged, incomplete or quantised.
    """
    config = read_json(folder / CONFIG_NAME)
    inner = config.get("text_config")
    sizes = inner if isinstance(inner, dict) else config
    numbers = [sizes.get(name) for name in ("num_hidden_layers", "hidden_size")]
    if any(type(number) is not int or not 0 < number <= MAX_COUNT for number in numbers):
        raise CheckpointError(
            f"{folder / CONFIG_NAME}: num_hidden_layers and hidden_size are {numbers!r}, expected "
            "positive numbers, those of the base; write the layers again"
        )
    num_layers, hidden_size = cast("tuple[int, int]", numbers)
    found = find_mtp(folder, num_layers=num_layers)
    if found is None:
        raise CheckpointError(
            f"{folder}: found no MTP layers after {num_layers} layers, expected keys such as "
            f"{LAYOUTS[0].example!r}; download or write them again"
        )
    tensors: dict[str, Tensor] = {}
    for step, keys in enumerate(found.steps):
        tensors |= {keys[name]: tensor for name, tensor in found.load(step, keys).items()}
    base = config.get("base_model_name_or_path")
    return SavedLayers(
        tensors,
        num_steps=len(found.steps),
        num_target_layers=num_layers,
        hidden_size=hidden_size,
        base_name_or_path=base if isinstance(base, str) else None,
        choices=read_choices(folder, config),
    )


def is_declared(folder: Path) -> bool:
    """Return whether a folder's config says that its MTP layers are meant, and not a whole model.

    Such are the folders that are written here.
    """
    try:
        return bool(read_any_json(folder / CONFIG_NAME)["speclm"]["method"] == "mtp")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def find_layers(folder: Path) -> WeightFiles | None:
    """Return the weights of a folder that holds MTP layers only, or declares them."""
    declares = is_declared(folder)
    for source in weight_files(folder):
        if is_of_layers(source) or (declares and _num_keys(source.files)):
            return source
    return None


def is_of_layers(source: WeightFiles) -> bool:
    """Return whether all keys of weights are those of MTP layers."""
    return bool(source.files) and _num_keys(source.files) == len(source.files)


def _num_keys(keys: Iterable[str]) -> int:
    """Return how many keys belong to layers of a layout, of which one joins inputs."""
    for layout in LAYOUTS:
        names = [place[1] for key in keys if (place := layout.place(key, num_layers=0))]
        if any(name.startswith("projection.") for name in names):
            return len(names)
    return 0


def require_writable(folder: Path) -> None:
    """Check that MTP layers can be written into a folder without destroying anything.

    Raises:
        CheckpointError: If it is a file, or holds another model or weights that are read instead.
    """
    require_replaceable(folder, is_mine=is_of_layers, owner="MTP layers")
