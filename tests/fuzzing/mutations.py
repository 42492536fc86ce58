"""Damages to a folder of files, by what they damage; each draws from a seeded generator."""

import json
import os
import random
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

CANARY = "SPECLM_CANARY"
"""Environment variable with the path of the file that code in a pickle would write."""

DEEP = "[" * 20000 + "]" * 20000
_RAW = (
    *("9" * 5000, "9" * 300, "1e999", "-1e999", "NaN", "Infinity", "-Infinity", "-1", "0", "1"),
    *("true", "null", '"\\ud800"', '"\\u0000"', '"x"', "{}", "[]", "[[1]]", "[{}]", "0.5", "7"),
    *("2147483648", "300000", "65536", '"eagle3"', '["x"]', '{"a": 1}', DEEP),
    '"' + "y" * 9999 + '"',
)
_MANY_KEYS = "{" + ",".join(f'"k{i}": {i}' for i in range(10**5)) + "}"
_EMPTY = '"%d": {"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
_MANY_TENSORS = ("{" + ",".join(_EMPTY % i for i in range(60_000)) + "}").encode()
_KEYS = ("9" * 5000, "layers.300000.x", "300000.0.linear.weight", "fc.weight", "", "\x00", "٣.0")
_DTYPES = (
    *("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "C64"),
    *("F4", "nothing", "", 3, None),
)
_SIZES = (0, 1, 2, 3, 8, 2**31, 2**63, 2**64, -1, 1.5, "8", None, True)


@dataclass
class Folder:
    """Content of regular files, and what is made in place of others."""

    files: dict[str, bytes]
    links: dict[str, str] = field(default_factory=dict)
    pipes: set[str] = field(default_factory=set)
    folders: set[str] = field(default_factory=set)
    modes: dict[str, int] = field(default_factory=dict)
    sparse: dict[str, int] = field(default_factory=dict)

    def write(self, place: Path) -> int:
        """Write the folder and return the bytes of its files."""
        place.mkdir()
        others = {*self.links, *self.pipes, *self.folders}
        for name, content in self.files.items():
            path = place / name
            if name in others:  # an index that was added again
                continue
            path.write_bytes(content)
            if name in self.sparse:
                os.truncate(path, self.sparse[name])
        for name, target in self.links.items():
            (place / name).symlink_to(target)
        for name in self.pipes:
            os.mkfifo(place / name)
        for name in self.folders:
            (place / name).mkdir()
        for name, mode in self.modes.items():
            if name in self.files and name not in others:
                (place / name).chmod(mode)
        return sum(map(len, self.files.values())) + sum(self.sparse.values())


def _pick(draw: random.Random, folder: Folder, *suffixes: str) -> str | None:
    names = sorted(name for name in folder.files if name.endswith(suffixes or ""))
    return draw.choice(names) if names else None


def _places(value: Any, found: list) -> list:
    """List the containers and keys of all values in JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in list(items):
        found.append((value, key))
        if isinstance(part, dict | list):
            _places(part, found)
    return found


def json_value(draw: random.Random, folder: Folder) -> None:
    """Change, drop, rename, repeat or nest one value of a JSON file."""
    name = _pick(draw, folder, ".json")
    try:
        content = json.loads(folder.files[name]) if name else None
    except (ValueError, RecursionError):
        return
    places = _places(content, []) if isinstance(content, dict) else []
    if not places:
        return
    part, key = draw.choice(places)
    kind = draw.randrange(6)
    if kind == 0 and isinstance(part, dict):
        del part[key]
    elif kind == 1 and isinstance(part, dict):
        part[draw.choice((*_KEYS, *(str(k) for _, k in places)))] = part.pop(key)
    elif kind == 2:
        part[key] = draw.choice([draw.choice(places)[0], [part[key]], {"model": part[key]}])
    else:
        part[key] = "@@"
    try:
        text = json.dumps(content)
    except ValueError:  # it holds itself now
        return
    folder.files[name] = text.replace('"@@"', draw.choice(_RAW)).encode()


def json_whole(draw: random.Random, folder: Folder) -> None:
    """Replace a JSON file, or repeat its keys."""
    name = _pick(draw, folder, ".json")
    if name is None:
        return
    old = folder.files[name].decode("utf-8", errors="replace").strip()
    repeated = f'{old[:-1]}, "vocab_size": 1, "vocab_size": {{}}}}' if old.endswith("}") else old
    odd = ["", "\ufeff" + old, old + old, repeated, repeated, old.replace('"', "'"), "\x00" * 99]
    content = draw.choice([*odd, *_RAW, _MANY_KEYS] if draw.random() < 0.2 else [*odd, *_RAW])
    folder.files[name] = draw.choice([content.encode(), content.encode("utf-16"), b"\xff\xfe\xff"])


def index_entry(draw: random.Random, folder: Folder) -> None:
    """Point an entry of an index at something else, or add an index."""
    name = "model.safetensors.index.json"
    others = ["../outside.safetensors", "/etc/passwd", "..", ".", "", "a\x00b", "missing.bin"]
    others += ["a" * 5000, "config.json", name, "/dev/zero", *sorted(folder.files)]
    try:
        weight_map = json.loads(folder.files[name])["weight_map"]
        key = draw.choice(sorted(weight_map))
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, RecursionError):
        weight_map, key = {}, "fc.weight"
    if not isinstance(weight_map, dict):
        return
    weight_map[draw.choice([key, key, *_KEYS])] = draw.choice(others)
    folder.files[name] = json.dumps({"weight_map": weight_map}).encode()


def header(draw: random.Random, folder: Folder) -> None:
    """Change the header of a safetensors file, by hand."""
    name = _pick(draw, folder, ".safetensors")
    data = folder.files[name] if name else b""
    try:
        size = struct.unpack("<Q", data[:8])[0]
        content, body = json.loads(data[8 : 8 + size]), data[8 + size :]
        key = draw.choice(sorted(content))
        entry = content[key]
        begin, end = entry["data_offsets"]
        shape = entry["shape"]
    except (struct.error, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return
    if not isinstance(shape, list) or not {type(begin), type(end)} <= {int}:
        return  # damaged before
    match draw.randrange(8):
        case 0:
            entry["dtype"] = draw.choice(_DTYPES)
        case 1:
            entry["shape"] = [draw.choice(_SIZES) for _ in range(draw.randrange(5))]
        case 2:
            entry["shape"] = draw.choice([shape[::-1], [*shape, 1], shape * 100, [0], None, {}])
        case 3:
            odd = [-1, 0, begin - 4, end + 4, end + len(body), 2**63, 2**64, 1.5, "0"]
            entry["data_offsets"] = draw.choice(
                [[draw.choice(odd), end], [begin, draw.choice(odd)], [end, begin], [0, 0], [], None]
            )
        case 4:
            new = draw.choice((*_KEYS, key + ".weight", f"model.{key}", key.replace("0", "7")))
            content[new] = content.pop(key)
        case 5:
            del content[key]
        case 6:
            content["__metadata__"] = draw.choice([{"format": "np"}, {"a": 1}, [], "x", {"": ""}])
        case _:  # a tensor without elements
            entry |= {"shape": [0, 8], "data_offsets": [begin, begin]}
    text = json.dumps(content).encode()
    folder.files[name] = struct.pack("<Q", len(text)) + text + body


def header_length(draw: random.Random, folder: Folder) -> None:
    """Lie about the length of a header, or make a header that is long."""
    name = _pick(draw, folder, ".safetensors")
    if name is None:
        return
    data = folder.files[name]
    length = draw.choice([0, 1, 7, len(data), 99 * 10**6, 2**31, 2**63, 2**64 - 1])
    folder.files[name] = struct.pack("<Q", length) + data[8:]
    chance = draw.random()
    if chance < 0.1:  # the bytes are there, as far as the file system says
        folder.files[name] = struct.pack("<Q", 99 * 10**6) + data[8:]
        folder.sparse[name] = 100 * 10**6
    elif chance < 0.15:
        folder.files[name] = struct.pack("<Q", len(_MANY_TENSORS)) + _MANY_TENSORS


def raw_bytes(draw: random.Random, folder: Folder) -> None:
    """Cut a file off, lengthen it, flip bits, or overwrite some of it."""
    name = _pick(draw, folder)
    if name is None or not folder.files[name]:
        return
    content = bytearray(folder.files[name])
    match draw.randrange(4):
        case 0:
            del content[draw.randrange(len(content)) :]
        case 1:
            content += bytes(draw.randrange(256) for _ in range(draw.randrange(64)))
        case 2:
            for _ in range(draw.randint(1, 6)):
                content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        case _:
            place = draw.randrange(min(len(content), 2000))
            content[place : place + draw.randint(0, 8)] = draw.choice(_RAW).encode()
    folder.files[name] = bytes(content)


def special_file(draw: random.Random, folder: Folder) -> None:
    """Put a pipe, a device, a link, a folder or an unreadable file in place of a file."""
    name = _pick(draw, folder)
    if name is None:
        return
    kind = draw.randrange(5)
    if kind == 4:
        folder.modes[name] = draw.choice([0, 0o200])
        return
    del folder.files[name]
    if kind == 0:
        folder.pipes.add(name)
    elif kind == 1:
        folder.folders.add(name)
    else:
        devices = ("/dev/zero", "/dev/urandom", "/dev/null", "/proc/self/mem")
        links = ("..", name, "nowhere", "/etc/passwd", "/", "/dev/stdin")
        folder.links[name] = draw.choice(devices if kind == 2 else links)


_CODE = f"cposix\nsystem\n(S'touch ${CANARY}'\ntR.".encode()
PICKLES: dict[str, bytes] = {
    "code": b"\x80\x02" + _CODE,
    "code in a value": b"\x80\x02}X\x01\x00\x00\x00a" + _CODE[:-1] + b"s.",
    "eval": "\x80\x02cbuiltins\neval\n(X\x40\x00\x00\x00".encode("latin1") + b"open(1)" + b"tR.",
    "many bytes": b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x02\x85R.",
    "counter": b"\x80\x02ccollections\nCounter\ncbuiltins\nbytearray\nJ\x00\x00\x00\x40\x85R\x85R.",
    "tensor": b"\x80\x02ctorch\nTensor\nJ\x00\x00\x00\x40\x85R.",
    "hash": b"\x80\x02})" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60)) + b"K\x01s.",
    "deep": b"\x80\x02" + b"]" * 50000 + b"a" * 49999 + b".",
    "numbers": b"\x80\x02]" + b"K\x01a" * 60_000 + b".",
    "no end": b"\x80\x02}",
}
_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}q\x00."


def archive(pickled: bytes, *, method: int = zipfile.ZIP_STORED, extra: int = 0) -> bytes:
    """Return a file as torch.save writes it, around any pickle."""
    written = BytesIO()
    with zipfile.ZipFile(written, "w", method) as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/version", "3\n")
        if extra:
            file.writestr("archive/data/0", bytes(extra))
    return written.getvalue()


def pickled(draw: random.Random, folder: Folder) -> None:
    """Replace the weights by a pickle that runs code, never ends, or unpacks to a lot."""
    weights = _pick(draw, folder, ".bin", ".pt")
    if weights is None:
        weights = _pick(draw, folder, ".safetensors")
        if weights is None:
            return
        del folder.files[weights]
        weights = draw.choice(["pytorch_model.bin", "medusa_lm_head.pt"])
    content = PICKLES[draw.choice(sorted(PICKLES))]
    kind = draw.randrange(5)
    if kind == 0:
        content = _MAGIC + content + content
    elif kind == 1:
        content = archive(content, method=zipfile.ZIP_DEFLATED)
    elif kind == 2 and draw.random() < 0.05:
        content = archive(b"\x80\x02]" + b"N0" * 2**25, method=zipfile.ZIP_DEFLATED)
    elif kind < 4:
        content = archive(content, extra=draw.choice([0, 64]))
    folder.files[weights] = content


MUTATIONS: tuple[Callable[[random.Random, Folder], None], ...] = (
    *(json_value, json_value, json_value, json_whole, index_entry),
    *(header, header, header, header_length, raw_bytes, raw_bytes, special_file, pickled),
)
