"""Folders of heads: checked, and written so that the files change together or not at all."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from speclm.cards import GENERATED_MARK
from speclm.errors import CheckpointError, TopologyError, TreeBudgetError, UnknownNameError
from speclm.files.atomic import write_file, written_together
from speclm.files.hub import is_hub_id, path_exists
from speclm.tree.static import RankPaths, normalize_paths

CONFIG_NAME = "config.json"
CARD_NAME = "README.md"


@dataclass(frozen=True, slots=True, eq=False)
class Destination:
    """Folder and names for saving heads.

    Args:
        folder: Created if it does not exist.
        base: The model that they draft for.
        repo_id: Repository on the hub that the folder is uploaded to, if any.
    """

    folder: Path
    base: PreTrainedModel
    repo_id: str | None = None

    @property
    def base_id(self) -> str | None:
        """The base's name if others can find it by that name; None for a path."""
        return hub_id(self.base.config.name_or_path)

    def card(self, text: str) -> str | None:
        """Return the text of the card, or None to keep a card that a user has written."""
        path = self.folder / CARD_NAME
        is_generated = not path.exists() or (
            path.is_file() and GENERATED_MARK in path.read_text(encoding="utf-8", errors="replace")
        )
        return text if is_generated else None


def write_heads(
    folder: Path,
    *,
    weights_name: str,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    card: str | None,
    check: Callable[[Path], None],
) -> None:
    """Write all files to a temporary folder, check them, then move them; the config comes last.

    Args:
        folder: Created if it does not exist.
        weights_name: File name of the weights.
        tensors: Tensors by key; they may share memory.
        config: Content of the config.
        card: Text of the model card; None for none.
        check: Reads the temporary folder, and raises if it differs from what was meant.
    """
    with written_together(folder, last=CONFIG_NAME) as aside:
        own = {
            key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for key, tensor in tensors.items()
        }
        save_file(own, aside / weights_name, metadata={"format": "pt"})
        write_file(aside / CONFIG_NAME, json.dumps(config, indent=2) + "\n")
        if card is not None:
            write_file(aside / CARD_NAME, card)
        check(aside)


def hub_id(name: str | None) -> str | None:
    """Return a model's name if others can find it by that name; None for a path."""
    return name if name and is_hub_id(name) and not path_exists(name) else None


def read_choices(folder: Path, config: Mapping[str, Any]) -> RankPaths | None:
    """Return the static tree that a config holds, if any.

    Raises:
        CheckpointError: If it is not a tree.
    """
    choices = (config.get("speclm") or {}).get("choices")
    if choices is None:
        return None
    try:
        return normalize_paths(choices)
    except (TopologyError, TreeBudgetError, UnknownNameError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'}: speclm.choices is no tree ({error}); remove it or pass tree"
        ) from error


def require_folder(folder: Path) -> None:
    """Check that a path is a folder or does not exist.

    Raises:
        CheckpointError: If it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: found a file, expected a folder; choose another place")


def require_same_tensors(
    path: Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> None:
    """Check that the tensors read back equal the written ones, bit by bit.

    Raises:
        CheckpointError: If a tensor differs or is missing on one side.
    """
    differing = [
        name
        for name in sorted({*expected, *found})
        if name not in expected
        or name not in found
        or not _are_same_bits(expected[name].detach().cpu(), found[name])
    ]
    if differing:
        raise CheckpointError(
            f"{path}: {differing!r} read back differ from what was written, the old files are "
            "kept; check the disk and save again"
        )


def _are_same_bits(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))
