"""Writes Medusa heads so that others read them too."""

from pathlib import Path
from typing import Any

from torch import Tensor

from speclm.errors import CheckpointError
from speclm.formats._heads_files import (
    CONFIG_NAME,
    require_folder,
    require_same_tensors,
    write_heads,
)
from speclm.formats._weights import read_json
from speclm.formats.medusa import MedusaCheckpoint, read_medusa

WEIGHTS_NAME = "medusa_lm_head.safetensors"


def write_medusa(
    folder: str | Path, checkpoint: MedusaCheckpoint, *, card: str | None = None
) -> None:
    """Write Medusa heads into a folder, next to whatever else it holds.

    TGI and vLLM up to 0.32 read it; heads without output matrices only TGI, and those of one
    layer. The files are written aside, read back and compared bit by bit; only then do they appear
    together, or replace older ones, the config last.

    Args:
        folder: Created if it does not exist.
        checkpoint: What to write.
        card: Text of the model card; None leaves the card that is there.

    Raises:
        CheckpointError: If the folder is a file or holds another model's config, or what was read
            back is not what was written.
    """
    folder = Path(folder)
    require_place_for_heads(folder)

    def check(aside: Path) -> None:
        found = read_medusa(aside)
        require_same_tensors(folder / WEIGHTS_NAME, checkpoint.tensors, found.tensors)

    write_heads(
        folder,
        weights_name=WEIGHTS_NAME,
        tensors=_named_tensors(checkpoint),
        config=_config(checkpoint),
        card=card,
        check=check,
    )


def require_place_for_heads(folder: Path) -> None:
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

    An `architectures` key would switch TGI's speculation off, and vLLM takes any key with "num"
    and "heads" in it for the number of heads: neither may be added.
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
