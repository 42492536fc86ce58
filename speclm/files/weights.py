"""Weight files of a folder: which file holds which key, and their tensors, with typed errors."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from speclm.errors import CheckpointError, OptionError, SpeclmError, reason_of, shown
from speclm.files import atomic as files
from speclm.files.pickles import require_plain_pickle

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Types of weights; narrower types mean nothing without scales next to them."""

_WHOLE = (torch.int64, torch.int32, torch.int16, torch.uint8)

INDEX = "(0|[1-9][0-9]{0,4})"
"""Pattern of the number of a layer or head in a key, without leading zeros."""

MAX_COUNT = 2**31 - 1
"""Largest whole number accepted in a config."""

MAX_KEYS = 2**15
"""Maximum number of tensors in a file; models with more are saved in shards."""

MAX_HEADER = 2**22
"""Maximum bytes of the header of a safetensors file; a tensor takes about 100."""

_MAX_KEY = 500  # characters of a tensor's name
_MAX_NAME = 255  # characters that a file's name may have
_PART = 2**24  # bytes read at a time
_MAX_SHARING = 2
"""Maximum bytes of tensors per byte of their file; an output matrix may share the embeddings."""


@contextmanager
def reading(
    path: Path, expected: str = "whole files of draft heads; they are damaged, download them again"
) -> Iterator[None]:
    """Turn any error of Python while it reads a file into a `CheckpointError`.

    Args:
        path: The file.
        expected: What should have been found, and the remedy.
    """
    try:
        yield
    except SpeclmError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path}: cannot be read ({reason_of(error)}), expected {expected}"
        ) from error


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """Files that hold one state dict.

    Args:
        path: The file, or the index of several, for messages.
        files: File of each key.
    """

    path: Path
    files: dict[str, Path]

    def load(self, keys: list[str]) -> dict[str, Tensor]:
        """Return the tensors of some keys, on the CPU.

        Raises:
            CheckpointError: If a file is missing, damaged or without the key.
        """
        loaded: dict[str, Tensor] = {}
        for file in sorted({self.files[key] for key in keys}):
            wanted = [key for key in keys if self.files[key] == file]
            found = _load(file, wanted)
            _require_backed(file, found)
            loaded |= found
        return loaded


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        CheckpointError: If the file does not hold a JSON object.
    """
    try:
        content = files.read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: no JSON can be read ({reason_of(error)}), expected an object; download the "
            "file again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: found a {type(content).__name__}, expected a JSON object; download the file "
            "again"
        )
    return content


def read_text(path: Path) -> str:
    """Return the text of a file as far as it is text; empty if there is no such file.

    Raises:
        CheckpointError: If it cannot be read, or is no text of a usual length.
    """
    try:
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            content = file.read(files.MAX_JSON_BYTES + 1)
        if len(content) > files.MAX_JSON_BYTES:
            raise OSError(f"it has over {files.MAX_JSON_BYTES} bytes")
    except OSError as error:
        raise CheckpointError(
            f"{path}: the file cannot be read ({reason_of(error)}), expected a text; remove it, or "
            "download it again"
        ) from error
    return content.decode("utf-8", errors="replace")


def weights_digest(folder: Path) -> str | None:
    """Return a hash of the safetensors files in a folder, which are read; None without any.

    Raises:
        CheckpointError: If one cannot be read.
    """
    digest, paths = hashlib.sha256(), sorted(folder.glob("*.safetensors"))
    for path in paths:
        try:
            files.require_regular(path)
            with path.open("rb") as file:
                while part := file.read(_PART):
                    digest.update(part)
        except OSError as error:
            raise CheckpointError(
                f"{path}: the file cannot be read ({reason_of(error)}), expected weights; remove "
                "it, or download it again"
            ) from error
    return digest.hexdigest() if paths else None


def floating_dtype(dtype: object) -> torch.dtype:
    """Return the floating dtype of heads for an option or its name.

    Raises:
        OptionError: If it is not a floating dtype.
    """
    found = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise OptionError(f"dtype of the heads is {found!r}, expected one such as torch.bfloat16")
    return found


def weight_files(folder: Path, *, first: str = "model.safetensors") -> Iterator[WeightFiles]:
    """Yield the state dicts of a folder: safetensors, shards, then, if there are none, pickles.

    Indices of anything but weights are skipped. A model's own pickle, if there is one, is the only
    pickle that is read, because others next to it may be anything.

    Args:
        folder: The folder.
        first: Names that start like this come first, then a model's own file.
    """

    def order(file: Path) -> tuple[bool, bool, str]:
        return not file.name.startswith(first), file.name != "model.safetensors", file.name

    sharded: set[Path] = set()
    found_any = False
    indexed: list[WeightFiles] = []
    for index in sorted(folder.glob("*.index.json")):
        files = _indexed_files(index)
        if files is None:
            continue
        sharded |= set(files.values())
        indexed.append(WeightFiles(index, files))
    for file in sorted(folder.glob("*.safetensors"), key=order):
        if file not in sharded:
            found_any = True
            yield WeightFiles(file, dict.fromkeys(_safetensors_keys(file), file))
    yield from indexed
    if found_any or indexed:
        return
    models = sorted(folder.glob("pytorch_model*.bin"))
    if models and models[0].name != "pytorch_model.bin":
        return  # shards without an index
    for file in models[:1] or sorted(folder.glob("*.pt"), key=order):
        yield WeightFiles(file, dict.fromkeys(_load_pickle(file), file))


def weights_of(file: Path) -> WeightFiles:
    """Return the state dict in one file: safetensors, or pickled for any other name.

    Raises:
        CheckpointError: If the file is missing or damaged.
    """
    keys = _safetensors_keys(file) if file.suffix == ".safetensors" else _load_pickle(file)
    return WeightFiles(file, dict.fromkeys(keys, file))


def _indexed_files(index: Path) -> dict[str, Path] | None:
    content = read_json(index)
    if "weight_map" not in content:
        return None  # of something else
    weight_map = content["weight_map"]
    names = weight_map.values() if isinstance(weight_map, dict) else [None]
    if not isinstance(weight_map, dict) or any(
        not isinstance(name, str) or Path(name).name != name or len(name) > _MAX_NAME
        for name in names
    ):
        raise CheckpointError(
            f"{index}: weight_map is {shown(weight_map)}, expected file names next to the index "
            "by key; download the file again"
        )
    _require_short(index, weight_map)
    return {key: index.parent / name for key, name in weight_map.items()}


def _safetensors_keys(file: Path) -> list[str]:
    with _opened(file) as tensors:
        keys = list(tensors.keys())
    if len(keys) > MAX_KEYS:  # each method looks through all of them
        raise CheckpointError(
            f"{file}: found {len(keys)} tensors, expected at most {MAX_KEYS} in one file; save the "
            "model in shards"
        )
    _require_short(file, keys)
    return keys


def _require_short(file: Path, keys: Iterable[str]) -> None:
    """Check the keys of a file, which messages name."""
    longest = max(map(len, keys), default=0)
    if longest > _MAX_KEY:
        raise CheckpointError(
            f"{file}: a key has {longest} characters, expected at most {_MAX_KEY}; download the "
            "file again"
        )


def _load(file: Path, keys: list[str]) -> dict[str, Tensor]:
    if not file.is_file():
        raise CheckpointError(
            f"{file}: the file is missing, the index says it holds {keys[0]!r}; download it"
        )
    if file.suffix == ".safetensors":
        with _opened(file) as tensors:
            _require_keys(file, keys, list(tensors.keys()))
            return {key: tensors.get_tensor(key) for key in keys}
    state = _load_pickle(file)
    _require_keys(file, keys, list(state))
    return {key: state[key] for key in keys}


def _require_backed(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Check that tensors are in memory and that their file has as many bytes as they need."""
    for key, tensor in tensors.items():
        is_plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not is_plain or tensor.is_quantized:
            raise CheckpointError(
                f"{file}: {key!r} is {tensor.dtype} of layout {tensor.layout} on "
                f"{tensor.device.type}, expected plain numbers; export the heads again"
            )
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    most = _MAX_SHARING * file.stat().st_size
    if num_bytes > most:
        raise CheckpointError(
            f"{file}: {len(tensors)} tensors name {num_bytes} bytes, expected at most {most} for "
            "a file of that size; download it again"
        )


def _require_keys(file: Path, keys: list[str], found: list[str]) -> None:
    missing = sorted({*keys} - {*found})
    if missing:
        raise CheckpointError(
            f"{file}: key {missing[0]!r} is missing, found {len(found)} others; the index belongs "
            "to other files, download all again"
        )


def _opened(file: Path) -> Any:
    try:
        _require_header(file)
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{file}: no tensors can be read ({reason_of(error)}), expected a whole "
            "safetensors file; it is truncated or damaged, download it again"
        ) from error


def _require_header(file: Path) -> None:
    """Check the length of a header before it is read: each byte of it may take ten in memory."""
    files.require_regular(file)
    with file.open("rb") as content:
        start = content.read(8)
    length, most = int.from_bytes(start, "little"), min(MAX_HEADER, file.stat().st_size - 8)
    if len(start) < 8 or length > most:
        raise ValueError(f"its header has {length} bytes, expected at most {max(0, most)}")


def read_numbers(file: Path) -> Int[Tensor, " numbers"]:
    """Return the whole numbers in a pickled list or tensor, such as ids of tokens.

    Raises:
        CheckpointError: If the file is damaged, would run code, or holds anything else.
    """
    expected = "a pickled list of whole numbers and nothing else"
    with reading(file, f"{expected}; it is damaged or would run code, download it again"):
        found = _unpickle(file)
        if isinstance(found, list) and found and all(type(number) is int for number in found):
            return torch.tensor(found, dtype=torch.int64, device="cpu")
    if isinstance(found, Tensor) and found.dtype in _WHOLE and found.ndim == 1 and len(found):
        _require_backed(file, {"numbers": found})
        return found.to(torch.int64)
    raise CheckpointError(
        f"{file}: found an empty {type(found).__name__} or one of other things, expected "
        f"{expected}; save such a list with torch.save"
    )


def _unpickle(file: Path) -> Any:
    files.require_regular(file)
    # Heads may be a small part of a model; old pickles are not archives and cannot be mapped.
    is_archive = require_plain_pickle(file)
    return torch.load(file, map_location="cpu", weights_only=True, mmap=is_archive)


def _load_pickle(file: Path) -> dict[str, Tensor]:
    try:
        state = _unpickle(file)
    except Exception as error:  # damaged streams raise nearly everything
        raise CheckpointError(
            f"{file}: no tensors can be read ({reason_of(error)}), expected a pickled state dict "
            "of tensors and nothing else; it is damaged or would run code, ask for "
            "safetensors"
        ) from error
    named = isinstance(state, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    )
    if not named:
        raise CheckpointError(
            f"{file}: found a {type(state).__name__}, expected a state dict of names and tensors; "
            "save module.state_dict() instead"
        )
    _require_short(file, state)
    return {key: tensor.detach() for key, tensor in state.items()}
