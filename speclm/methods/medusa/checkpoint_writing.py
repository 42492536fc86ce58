"""What the formats of Medusa heads share: our own layout, and parts that others need."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from speclm.cards import HeadsCard
from speclm.config import require_options
from speclm.drafting.base_parts import BaseParts
from speclm.drafting.formats import NUM_PROBED, CheckpointFormat, random_inputs
from speclm.drafting.heads_folder import CONFIG_NAME, hub_id, require_folder
from speclm.drafting.package import Package, write_package
from speclm.errors import CheckpointError
from speclm.files.weights import WeightFiles, read_json
from speclm.methods.medusa.checkpoint import HeadKeys, MedusaCheckpoint, head_keys, read_medusa
from speclm.methods.medusa.network import build_medusa

_VOCAB_SIZE = 32  # of random output matrices, if nothing shows the base's
WEIGHTS_NAME = "medusa_lm_head.safetensors"


def write_medusa(
    folder: str | Path, checkpoint: MedusaCheckpoint, *, card: str | None = None
) -> None:
    """Write Medusa heads into a folder, next to whatever else it holds.

    The files are written to a temporary folder, read back and compared bit by bit; then they appear
    together and replace older ones.

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
    write_package(folder, pack_medusa(checkpoint), card=card, check=read_medusa)


def pack_medusa(checkpoint: MedusaCheckpoint) -> Package:
    """Return the files of Medusa heads as `write_medusa` writes them."""
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
    config = {name: value for name, value in config.items() if value is not None}
    return Package(config, {WEIGHTS_NAME: checkpoint.parts})


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


class MedusaFormat(CheckpointFormat[MedusaCheckpoint]):
    """What all formats of Medusa heads share: they are read by `read_medusa`."""

    @override
    def read(self, folder: Path, **options: Any) -> MedusaCheckpoint:
        require_options(options, (), owner="files of Medusa heads")
        return read_medusa(folder)

    @override
    def is_of_whole_model(self, checkpoint: MedusaCheckpoint) -> bool:
        return checkpoint.is_merged

    @override
    def logits(
        self, checkpoint: MedusaCheckpoint, *, embeddings: Tensor | None, lm_weight: Tensor | None
    ) -> Tensor:
        usual = _VOCAB_SIZE if lm_weight is None else len(lm_weight)
        vocab_size, width = checkpoint.vocab_size or usual, checkpoint.hidden_size
        hidden, output = random_inputs((NUM_PROBED, width), (vocab_size, width))
        output = output if lm_weight is None else lm_weight.float()
        heads = build_medusa(
            checkpoint,
            vocab_size=vocab_size,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        return heads.forward(hidden, lm_head=lambda states: states @ output.T)

    @override
    def card(self, checkpoint: MedusaCheckpoint) -> HeadsCard:
        from speclm.methods.medusa.method import medusa_card

        return medusa_card(checkpoint)


def says_counts(source: WeightFiles, config: Mapping[str, Any]) -> bool:
    """Return whether a config says the numbers of heads and layers that the file holds."""
    keys = HeadKeys.of(source, head_keys(source))
    found = (config.get("medusa_num_heads"), config.get("medusa_num_layers"))
    return found == (keys.num_heads, keys.num_layers)


def base_id(checkpoint: MedusaCheckpoint, base: BaseParts | None) -> str | None:
    """Return the base's name if others can find it by that name."""
    return (hub_id(base.name) if base else None) or hub_id(checkpoint.base_name_or_path)


def base_place(
    checkpoint: MedusaCheckpoint, base: BaseParts | None, target: MedusaFormat
) -> tuple[str, tuple[str, ...]]:
    """Return where the software finds the base, and notes about it."""
    notes = merged_notes(checkpoint)
    name = base_id(checkpoint, base)
    if name is not None:
        return name, notes
    if base is None or not base.name:
        raise base_needed(target, "whose name config.json holds")
    place = str(Path(base.name).resolve())
    note = (
        f"config.json names the base by its path, {place}, where the software looks for it; write "
        "its hub id there before you publish the folder."
    )
    return place, (*notes, note)


def merged_notes(checkpoint: MedusaCheckpoint) -> tuple[str, ...]:
    """Return what the user of heads of a merged model should know."""
    note = (
        "The heads were trained together with their base: serve them with the model that they come "
        "from, not with the one that it was trained from."
    )
    return (note,) if checkpoint.is_merged else ()


def base_needed(target: MedusaFormat, reason: str) -> CheckpointError:
    """Return the error for heads without their base."""
    return CheckpointError(
        f"format {target.name!r} needs the base, {reason}, found none; pass its folder or hub id, "
        "as with: speclm convert --base"
    )


def with_biases(checkpoint: MedusaCheckpoint) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return all parts; layers without a bias get one of zeros, which changes nothing."""
    if checkpoint.has_bias:
        return dict(checkpoint.parts), ()
    zeros = {
        f"{name.removesuffix('weight')}bias": part.new_zeros(part.shape[0])
        for name, part in checkpoint.parts.items()
        if ".linear." in name
    }
    note = "The layers have no bias; the software needs one, and got zeros."
    return {**checkpoint.parts, **zeros}, (note,)


def output_matrices(
    checkpoint: MedusaCheckpoint, base: BaseParts | None, target: MedusaFormat, *, copies: int
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the output matrix of each head, and notes about copies of the base's."""
    layers = checkpoint.num_layers
    names = [f"{head}.{layers}.weight" for head in range(checkpoint.num_heads)]
    if checkpoint.has_own_lm_head:
        return {name: checkpoint.parts[name] for name in names}, ()
    if base is None:
        raise base_needed(target, "whose output matrix the heads use")
    if base.has_output_bias():
        raise CheckpointError(
            f"the output matrix of the base {base.name!r} has a bias, expected none: the format "
            f"{target.name!r} has no room for it; choose the format 'speclm', or train heads with "
            "--own-lm-head"
        )
    # A file that is opened anew for each copy is copied from disk to disk.
    found = [base.output_matrix().detach() for _ in range(copies)]
    rows, width = found[0].shape
    if width != checkpoint.hidden_size or checkpoint.vocab_size not in (None, rows):
        raise CheckpointError(
            f"the output matrix of the base {base.name!r} has shape {[rows, width]}, expected "
            f"{[checkpoint.vocab_size or rows, checkpoint.hidden_size]} as the heads have; name "
            "the base that they were trained on"
        )
    if found[0].dtype != checkpoint.dtype:
        found = [found[0].to(checkpoint.dtype)] * copies
    num_bytes = copies * rows * width * found[0].element_size()
    note = (
        f"The heads use the output matrix of the base, of which the file holds {copies} "
        f"{'copy' if copies == 1 else 'copies'}: {num_bytes:,} bytes."
    )
    named = {name: found[min(head, copies - 1)] for head, name in enumerate(names)}
    return named, (note,)
