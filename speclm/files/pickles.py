"""Pickled state dicts, looked through before anything in them is built."""

import pickletools
import re
import zipfile
from collections.abc import Iterator
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any

import torch

MAX_BYTES = 2**22
"""Maximum bytes of the pickle itself, without the numbers of its tensors."""

MAX_STEPS = 250_000
"""Maximum instructions of a pickle; a tensor takes about 60."""

_MAX_PARTS = 50_000  # of an archive
_LEGACY_PICKLES = 5  # magic number, version, sizes of numbers, state dict, keys of the storages
_BUILDERS = re.compile(
    r"collections OrderedDict|torch (Size|device)|torch\.serialization _get_layout"
    r"|torch(\.storage)? \w+Storage"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter|sparse_tensor"
    r"|meta_tensor_no_storage)"
)


def require_plain_pickle(file: Path) -> bool:
    """Check that a pickle builds tensors only, in time and memory that fit the file.

    PyTorch's own check for code still has to follow: it allows objects that take as much memory as
    a number in the file says, and keys whose hashes take forever.

    Returns:
        Whether it is an archive, whose tensors can be mapped.

    Raises:
        ValueError: If it holds anything else, is compressed, or is damaged.
    """
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            _require_steps(BytesIO(_pickle_in(archive, file.stat().st_size)), most=None)
        return True
    with file.open("rb") as stream:
        for number in range(_LEGACY_PICKLES):
            _require_steps(stream, most=None if number < 3 else file.stat().st_size)
    return False


def _pickle_in(archive: zipfile.ZipFile, num_bytes: int) -> bytes:
    parts = archive.infolist()
    if len(parts) > _MAX_PARTS or sum(part.file_size for part in parts) > num_bytes:
        raise ValueError(f"its {len(parts)} parts need more than the {num_bytes} bytes of the file")
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise ValueError("its parts are compressed, which torch.save never does")
    found = [part for part in parts if part.filename.endswith("/data.pkl")]
    if len(found) != 1 or found[0].file_size > MAX_BYTES:
        raise ValueError(f"found {len(found)} files data.pkl, expected one up to {MAX_BYTES} bytes")
    return archive.read(found[0])


def _steps(stream: BufferedReader | BytesIO) -> Iterator[tuple[str, Any]]:
    start = stream.tell()
    for step, (code, argument, _) in enumerate(pickletools.genops(stream)):
        if step >= MAX_STEPS or stream.tell() - start > MAX_BYTES:
            raise ValueError(f"it has over {MAX_STEPS} instructions or {MAX_BYTES} bytes")
        yield code.name, argument


def _require_steps(stream: BufferedReader | BytesIO, *, most: int | None) -> None:
    """Check each instruction of the next pickle; `most` bounds the numbers in it."""
    tuples: set[int] = set()
    before = ""
    for name, argument in _steps(stream):
        if name == "GLOBAL" and not _is_builder(argument):
            raise ValueError(f"it builds {argument[:80]!r}")
        if name in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"):
            raise ValueError(f"it builds objects by {name}")
        if "PUT" in name and before.startswith("TUPLE"):
            tuples.add(int(argument))
        elif "GET" in name and int(argument) in tuples:  # nested tuples may double at each level
            raise ValueError("it uses a tuple twice")
        if most is not None and isinstance(argument, int) and abs(argument) > most:
            raise ValueError(f"it names {argument} numbers in a file of {most} bytes")
        before = name


def _is_builder(name: str) -> bool:
    module, _, attribute = name.partition(" ")
    is_dtype = module == "torch" and isinstance(getattr(torch, attribute, None), torch.dtype)
    return is_dtype or _BUILDERS.fullmatch(name) is not None
