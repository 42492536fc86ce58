"""The files of heads: written together, and compared with what was meant."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from speclm.drafting.heads_folder import CARD_NAME, CONFIG_NAME
from speclm.errors import CheckpointError, SaveError, SpeclmError, reason_of
from speclm.files.atomic import write_file, written_together
from speclm.files.weights import weights_of

EXPORT_NAME = "speclm_export.json"
"""File next to converted heads that says where they come from; no other software reads it."""


@dataclass(frozen=True, slots=True, eq=False)
class Package:
    """Content of a folder of heads in some format.

    Args:
        config: Content of config.json.
        weights: Tensors by key, by file name; a name that ends in ``.safetensors`` decides
            for that format, any other name for a pickled state dict.
        files: Further files by name: their content, or a file that is linked or copied.
        notes: What the user should know about the result, such as parts that were added.
        facts: Entries of `EXPORT_NAME` that only this method has.
    """

    config: Mapping[str, Any]
    weights: Mapping[str, Mapping[str, Tensor]]
    files: Mapping[str, str | bytes | Path] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


def write_package(
    folder: Path, package: Package, *, card: str | None, check: Callable[[Path], object]
) -> None:
    """Write all files to a temporary folder, check them, then move them; the config comes last.

    Tensors are written one after the other from where they are, so heads on the disk need no
    memory of their size. What was written is compared with the tensors bit by bit.

    Args:
        folder: Created if it does not exist.
        package: The files.
        card: Text of the model card; None for none.
        check: Reads the temporary folder, and raises if it differs from what was meant.

    Raises:
        CheckpointError: If the files read back differently, or `check` raises.
        SaveError: If a file cannot be written. Nothing is changed then.
    """
    try:
        _write(folder, package, card, check)
    except SpeclmError:
        raise
    except OSError as error:
        raise SaveError(
            f"{folder}: the files cannot be written ({reason_of(error)}), expected a place with "
            "room for them; nothing is changed, make room or choose another folder"
        ) from error


def _write(
    folder: Path, package: Package, card: str | None, check: Callable[[Path], object]
) -> None:
    with written_together(folder, last=CONFIG_NAME) as aside:
        for name, tensors in package.weights.items():
            write_tensors(aside / name, tensors)
            found = weights_of(aside / name)
            require_same_tensors(folder / name, tensors, found.load(list(found.files)))
        for name, content in package.files.items():
            if isinstance(content, Path):
                link_or_copy(content, aside / name)
            else:
                write_file(aside / name, content)
        write_file(aside / CONFIG_NAME, json.dumps(package.config, indent=2) + "\n")
        if card is not None:
            write_file(aside / CARD_NAME, card)
        check(aside)
    if EXPORT_NAME not in package.files:  # that of a conversion which was replaced
        (folder / EXPORT_NAME).unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a state dict: as safetensors if the name says so, else pickled.

    Args:
        path: The file.
        tensors: Tensors by key; they may share memory and lie on any device.

    Raises:
        OSError: If the file cannot be written, such as on a full disk.
    """
    own: dict[str, Tensor] = {}
    taken: list[tuple[int, int]] = []
    for key, tensor in tensors.items():
        found = tensor.detach().cpu().contiguous()
        start = found.data_ptr()
        end = start + found.numel() * found.element_size()
        # safetensors refuses tensors that overlap.
        is_free = all(end <= first or last <= start for first, last in taken)
        own[key] = found if is_free else found.clone()
        taken.append((start, end))
    try:
        if path.suffix == ".safetensors":
            save_file(own, path, metadata={"format": "pt"})
        else:
            torch.save({key: _without_rest(tensor) for key, tensor in own.items()}, path)
    except (SafetensorError, RuntimeError) as error:  # their words for a full disk
        raise OSError(f"{path.name}: cannot be written, {reason_of(error)}") from error


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
        if name not in expected or name not in found or not _same_bits(expected[name], found[name])
    ]
    if differing:
        raise CheckpointError(
            f"{path}: {differing!r} read back differ from what was written, the old files are "
            "kept; check the disk and save again"
        )


def num_tensor_bytes(file: Path) -> int:
    """Return the bytes of all tensors in a safetensors file: those after its header."""
    with file.open("rb") as opened:
        return file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")


def _without_rest(tensor: Tensor) -> Tensor:
    """Return a view whose storage is not larger: pickled views bring all of their storage along."""
    numbers = torch.from_numpy(tensor.reshape(-1).view(torch.uint8).numpy())
    return numbers.view(tensor.dtype).view(tensor.shape)


def _same_bits(first: Tensor, second: Tensor) -> bool:
    first = first.detach().cpu().contiguous()
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    bits = [each.reshape(-1).view(torch.uint8) for each in (first, second)]
    is_aligned = all(part.storage_offset() % 8 == 0 for part in bits)
    end = len(bits[0]) // 8 * 8 if is_aligned else 0  # eight at a time take a sixth of the time
    whole, rest = ([part[index] for part in bits] for index in (slice(end), slice(end, None)))
    is_same = torch.equal(*(part.view(torch.int64) for part in whole))
    return is_same and torch.equal(*rest)


def link_or_copy(source: Path, destination: Path) -> None:
    """Make a file appear in another folder; a hard link takes no room."""
    try:
        os.link(source.resolve(), destination)
    except OSError:
        shutil.copyfile(source, destination)
