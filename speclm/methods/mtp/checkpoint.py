"""Find the MTP layers in the files of a model, and read no other tensor."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from speclm.errors import CheckpointError, OptionError, shown
from speclm.files.hub import HubOptions, download, is_hub_id, path_exists
from speclm.files.weights import FLOATS, INDEX, WeightFiles, reading, weight_files

LAYER = "layer."
"""What our names of a decoder layer's tensors start with."""

_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")
_SMALL = ("config.json", "*.index.json")
_UNINDEXED = ("model.safetensors", "*mtp*.safetensors")
_SCALES = re.compile(
    r"(weight_scale|weight_scale_inv|weight_packed|input_scale|qweight|qzeros|scales|g_idx|absmax)"
    r"|.*quant_(map|state).*"
)
_MAX_NAMED = 6
_MAX_STEPS = 64  # MTP layers; models have up to three


@dataclass(frozen=True, slots=True)
class Layout:
    """How some families name the tensors of their MTP layers.

    Args:
        title: The families.
        pattern: Matches keys; its groups are ``step``, where each layer has a number of its own,
            and ``name``, that of a tensor of the layer.
        names: Our names of what is not part of a decoder layer, by the start of theirs.
        renamed: Names within the decoder layer that differ from the target's, likewise.
        example: A key, for messages.
        is_numbered_on: Whether the numbers continue those of the target's own layers.
        is_hidden_first: Whether hidden states come before embeddings where both are joined.
    """

    title: str
    pattern: re.Pattern[str]
    names: Mapping[str, str]
    example: str
    renamed: Mapping[str, str]
    is_numbered_on: bool = False
    is_hidden_first: bool = False

    def place(self, key: str, *, num_layers: int) -> tuple[int | None, str] | None:
        """Return step and our name of a key; None if it is of no MTP layer.

        The step is None for a tensor that all layers share.
        """
        found = self.pattern.fullmatch(key)
        if found is None:
            return None
        number, name = found["step"], found["name"]
        step = None if number is None else int(number)
        if step is not None and self.is_numbered_on:
            step -= num_layers
            if step < 0:
                return None
        for theirs, ours in self.names.items():
            if name.startswith(theirs):
                return step, ours + name.removeprefix(theirs)
        for theirs, ours in self.renamed.items():
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
        return step, LAYER + name

    def theirs(self, name: str) -> str:
        """Return a name of a key for one of ours."""
        start, _, end = name.rpartition(".")
        return next(their for their, ours in self.names.items() if ours == f"{start}.") + end


_OF_DEEPSEEK = {
    "enorm.": "embedding_norm.",
    "hnorm.": "hidden_norm.",
    "eh_proj.": "projection.",
    "shared_head.norm.": "norm.",
    "shared_head.head.": "head.",
    "embed_tokens.": "embeddings.",
}
LAYOUTS = (
    # Source: Transformers 5.23, MtpModel, and the checkpoints of the families.
    Layout(
        "Qwen3-Next, Qwen3.5, EXAONE",
        re.compile(rf"(?:model\.)?mtp\.(?:layers\.(?P<step>{INDEX})\.)?(?P<name>.+)"),
        {
            "pre_fc_norm_embedding.": "embedding_norm.",
            "pre_fc_norm_hidden.": "hidden_norm.",
            "fc.": "projection.",
            "norm.": "norm.",
            "enorm.": "embedding_norm.",
            "hnorm.": "hidden_norm.",
            "eh_proj.": "projection.",
            "final_layernorm.": "norm.",  # MiMo-V2-Flash has all of these in each layer
        },
        "mtp.fc.weight",
        {"pre_mlp_layernorm.": "post_attention_layernorm."},
    ),
    # Source: Xiaomi's code for MiMo-7B.
    Layout(
        "MiMo-7B",
        re.compile(rf"model\.mtp_layers\.(?P<step>{INDEX})\.(?P<name>.+)"),
        {
            "token_layernorm.": "embedding_norm.",
            "hidden_layernorm.": "hidden_norm.",
            "input_proj.": "projection.",
            "final_layernorm.": "norm.",
        },
        "model.mtp_layers.0.input_proj.weight",
        {},
        is_hidden_first=True,
    ),
    Layout(
        "DeepSeek-V3, GLM-4.5 and later",
        re.compile(rf"(?:model\.)?(?:language_model\.)?layers\.(?P<step>{INDEX})\.(?P<name>.+)"),
        _OF_DEEPSEEK,
        "model.layers.61.eh_proj.weight",
        {},
        is_numbered_on=True,
    ),
)
_NEEDED = ("embedding_norm.weight", "hidden_norm.weight", "projection.weight", "norm.weight")
_OPTIONAL = ("projection.bias", "head.weight", "embeddings.weight")


@dataclass(frozen=True, slots=True)
class MtpCheckpoint:
    """The MTP layers of a model, as keys of its files; nothing is read yet.

    Args:
        source: The files.
        layout: How the keys are named.
        steps: For each layer the key of each tensor, by our name.
    """

    source: WeightFiles
    layout: Layout
    steps: tuple[Mapping[str, str], ...]

    def load(self, step: int, names: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors of a layer by our names, mapped from the disk.

        Raises:
            CheckpointError: If a file is missing or damaged, or numbers are quantised.
        """
        keys = {name: self.steps[step][name] for name in names}
        with reading(self.source.path):
            loaded = self.source.load(sorted(set(keys.values())))
        wrong = sorted(key for key, tensor in loaded.items() if tensor.dtype not in FLOATS)
        if wrong:
            raise _quantised(self.source.path, wrong, str(loaded[wrong[0]].dtype))
        return {name: loaded[key] for name, key in keys.items()}


def find_mtp(folder: Path, *, num_layers: int) -> MtpCheckpoint | None:
    """Return the MTP layers in a folder, recognised by their keys; None if there are none.

    Args:
        folder: The folder of a model.
        num_layers: Decoder layers of the model itself.

    Raises:
        CheckpointError: If a layer is incomplete or quantised, or an index is damaged.
    """
    with reading(folder, "the files of a model; download them again"):
        sources = list(weight_files(folder))
    files: dict[str, Path] = {}
    for source in sorted(sources, key=lambda source: ".bin." in source.path.name):
        for key, file in source.files.items():
            files.setdefault(key, file)  # safetensors, if there are pickles too
    for layout in LAYOUTS:
        placed = {
            key: place
            for key in files
            if (place := layout.place(key, num_layers=num_layers)) is not None
        }
        if placed:
            path = next(s.path for s in sources if not s.files.keys().isdisjoint(placed))
            return MtpCheckpoint(WeightFiles(path, files), layout, _steps(path, layout, placed))
    return None


def read_mtp(folder: Path, config: Any) -> MtpCheckpoint:
    """Return the MTP layers of a model, which its config and its files agree on.

    Args:
        folder: The folder of the model.
        config: Its text config.

    Raises:
        CheckpointError: If there are none, or other than the config says; see `find_mtp`.
    """
    num_layers = int(config.num_hidden_layers)
    found = find_mtp(folder, num_layers=num_layers)
    if found is None:
        raise _none_found(folder, num_layers)
    for name in _COUNTS:
        declared = getattr(config, name, None)
        if declared is not None and declared != len(found.steps):
            raise CheckpointError(
                f"{found.source.path}: found {len(found.steps)} MTP layers, such as "
                f"{next(iter(found.steps[0].values()))!r}, the config's {name} is "
                f"{shown(declared)}; correct the config, or download all files of one revision"
            )
    return found


def fetch_mtp(name: str, hub: HubOptions, *, num_layers: int) -> Path:
    """Return the folder of a model's files; from the hub, only those with MTP layers are fetched.

    Args:
        name: Folder or hub id.
        hub: Options for the hub.
        num_layers: Decoder layers of the model itself.

    Raises:
        OptionError: If it is neither.
        UnknownNameError: If the download fails.
    """
    if path_exists(name):
        return Path(name, hub.subfolder)
    if not is_hub_id(name):
        raise OptionError(
            f"heads 'mtp' are read from the files of the base, and {name!r} is no folder that "
            "exists nor a hub id; pass heads_kwargs={'heads_path': folder or hub id of the base}"
        )
    folder = download(name, hub, _SMALL)
    found = find_mtp(folder, num_layers=num_layers)
    shards = (
        ()
        if found is None
        else {found.source.files[key].name for step in found.steps for key in step.values()}
    )
    return download(name, hub, (*_SMALL, *(sorted(shards) or _UNINDEXED)))


def _steps(
    path: Path, layout: Layout, placed: Mapping[str, tuple[int | None, str]]
) -> tuple[Mapping[str, str], ...]:
    """Return the keys of each layer by our names, complete and not quantised."""
    scales = sorted(key for key in placed if _SCALES.fullmatch(key.rpartition(".")[2]))
    if scales:
        raise _quantised(path, scales, "of a quantised layer")
    found: dict[int, dict[str, str]] = {}
    shared: dict[str, str] = {}
    for key, (step, name) in placed.items():
        (shared if step is None else found.setdefault(step, {}))[name] = key
    if len(found) > _MAX_STEPS:
        raise CheckpointError(
            f"{path}: found {len(found)} MTP layers, expected at most {_MAX_STEPS}; download all "
            "files of one revision"
        )
    steps = []
    for number in range(max(found, default=0) + 1):
        own = found.get(number, {})
        names = {**shared, **own}
        missing = [layout.theirs(name) for name in _NEEDED if name not in names]
        if not any(name.startswith(LAYER) for name in own):
            missing.append("input_layernorm.weight")
        if missing:
            raise CheckpointError(
                f"{path}: MTP layer {number} has no {missing[0]!r}, found "
                f"{sorted(names.values())[:_MAX_NAMED]!r}, expected a whole layer as in "
                f"{layout.title}; download all files of one revision"
            )
        unknown = sorted(
            key
            for name, key in names.items()
            if not name.startswith(LAYER) and name not in _NEEDED + _OPTIONAL
        )
        if unknown:
            raise CheckpointError(
                f"{path}: MTP layer {number} has {unknown[:_MAX_NAMED]!r}, expected only tensors "
                f"as in {layout.title}; remove them, or download all files of one revision"
            )
        steps.append(names)
    return tuple(steps)


def _quantised(path: Path, keys: list[str], found: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: the MTP layers are quantised, {keys[:_MAX_NAMED]!r} are {found}, expected 16 or "
        "32 bit floating point numbers; pass heads_kwargs={'heads_path': folder or hub id of the "
        "same model with whole MTP layers}"
    )


def _none_found(folder: Path, num_layers: int) -> CheckpointError:
    with reading(folder):
        keys = {key for source in weight_files(folder) for key in source.files}
    kinds = sorted({re.sub(r"\.\d+\..*", ".*", key) for key in keys})
    examples = [layout.example for layout in LAYOUTS]
    return CheckpointError(
        f"{folder}: the base comes without MTP layers, found {len(keys)} tensors, "
        f"{kinds[:_MAX_NAMED]!r}, for {num_layers} layers, expected keys such as {examples!r}; "
        "use other heads, or pass heads_kwargs={'heads_path': folder or hub id with the layers}"
    )
