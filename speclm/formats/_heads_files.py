"""Writes the two files of heads, weights and config, so that they change together or not at all."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from speclm.errors import CheckpointError, TopologyError, UnknownNameError
from speclm.tree.choices import Choices, normalize_choices

CONFIG_NAME = "config.json"


def write_heads(
    folder: Path,
    *,
    weights_name: str,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    check: Callable[[Path], None],
) -> None:
    """Write both files aside, have them checked, then replace older ones, the config last.

    Args:
        folder: Created if it does not exist.
        weights_name: Name of the weights.
        tensors: By key; may share memory with each other.
        config: What the config says.
        check: Raises if what it reads from a folder is not what was meant.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".writing-") as aside:
        weights, described = Path(aside, weights_name), Path(aside, CONFIG_NAME)
        own = {
            key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for key, tensor in tensors.items()
        }
        save_file(own, weights, metadata={"format": "pt"})
        described.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for path in (weights, described):
            _sync(path)
        check(Path(aside))
        for path in (weights, described):
            path.replace(folder / path.name)


def read_choices(folder: Path, config: Mapping[str, Any]) -> Choices | None:
    """Return the static tree that a config holds, if any.

    Raises:
        CheckpointError: If it is no tree.
    """
    choices = (config.get("speclm") or {}).get("choices")
    if choices is None:
        return None
    try:
        return normalize_choices(choices)
    except (TopologyError, UnknownNameError, TypeError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'}: speclm.choices is no tree ({error}); remove it or pass tree"
        ) from error


def require_folder(folder: Path) -> None:
    """Check that a place is a folder, or free.

    Raises:
        CheckpointError: If it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: found a file, expected a folder; choose another place")


def require_same_tensors(
    path: Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> None:
    """Check that what was read back is what was written, bit by bit.

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


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
