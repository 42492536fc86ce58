"""Hidden states of the base on disk: which texts they belong to, and how a training reads them."""

import hashlib
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from speclm.errors import FeatureError, SpeclmError, UnsupportedModelError, reason_of, shown
from speclm.files.atomic import read_json, write_json
from speclm.training.conversations import Example
from speclm.training.dataset import collate_examples

MANIFEST_NAME = "speclm_features.json"
"""File of a folder of features that says what they belong to."""

STATES = "base_states"
"""Name of the features in a batch: ``[batch, seq, width]``, zero at padding."""

_VERSION = 1
_KEY_BYTES = 16
_CHUNK = 2**22  # numbers of a weight that are hashed at once
_VOLATILE = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache")


@dataclass(frozen=True, slots=True)
class FeatureManifest:
    """What a folder of features belongs to.

    Args:
        base: Name of the base, only for messages.
        weights: Result of `hash_base`.
        texts: Hash of the keys of all texts.
        num_texts: Number of different texts.
        num_tokens: Tokens of all of them.
        layers: The hidden states, joined in this order, see `TargetFeatures`.
        dtype: Type of the numbers, such as ``bfloat16``.
        width: Numbers per token.
        shards: Number of texts in each file.
        version: Version of the layout.
    """

    base: str
    weights: str
    texts: str
    num_texts: int
    num_tokens: int
    layers: tuple[int, ...]
    dtype: str
    width: int
    shards: tuple[int, ...]
    version: int = _VERSION

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Return the manifest of a folder.

        Raises:
            FeatureError: If there is none, or it is damaged or of another version.
        """
        path = folder / MANIFEST_NAME
        try:
            found: Any = read_json(path)
        except (OSError, ValueError) as error:
            raise FeatureError(
                f"{path} cannot be read ({reason_of(error)}), expected the manifest of cached "
                "features; delete the folder, and compute them again"
            ) from error
        names = {field.name for field in fields(cls)}
        is_whole = isinstance(found, dict) and set(found) == names
        if not is_whole or found["version"] != _VERSION:
            version = found.get("version") if isinstance(found, dict) else None
            raise FeatureError(
                f"{path} has the version {shown(version)} or other names than expected, those of "
                f"version {_VERSION}; delete the folder, and compute the features again"
            )
        lists: dict[str, Any] = {name: found[name] for name in ("layers", "shards")}
        counts = [*lists.values(), [found[name] for name in ("num_texts", "num_tokens", "width")]]
        texts = [found[name] for name in ("base", "weights", "texts", "dtype")]
        if not (
            all(isinstance(part, list) and all(type(n) is int for n in part) for part in counts)
            and all(isinstance(text, str) for text in texts)
            and sum(lists["shards"]) == found["num_texts"]
            and all(count > 0 for count in (*lists["shards"], found["width"]))
        ):
            raise FeatureError(
                f"{path} has values of other types or sizes than expected; delete the folder, and "
                "compute the features again"
            )
        return cls(**{**found, **{name: tuple(part) for name, part in lists.items()}})

    def write(self, folder: Path) -> None:
        """Write the manifest into a folder."""
        write_json(folder / MANIFEST_NAME, asdict(self))

    def require_same(self, wanted: "FeatureManifest", folder: Path) -> None:
        """Check that the features are those that a training needs.

        Raises:
            FeatureError: If base, texts, layers or type differ; the message says which and how.
        """
        differences = []
        if self.weights != wanted.weights:
            differences.append(f"the base was {self.base} and is {wanted.base} with other weights")
        if self.texts != wanted.texts:
            differences.append(
                f"the data was {self.num_texts} texts with the hash {self.texts[:8]} and is "
                f"{wanted.num_texts} with {wanted.texts[:8]}"
            )
        for name, now in (("layers", wanted.layers), ("dtype", wanted.dtype)):
            if (was := getattr(self, name)) != now:
                differences.append(f"{name} was {shown(was)} and is {shown(now)}")
        if differences or self.width != wanted.width:
            found = "; ".join(differences) or f"width was {self.width} and is {wanted.width}"
            raise FeatureError(
                f"{folder}: the cached features are those of another training: {found}; name "
                "another folder, or delete this one"
            )

    def shard_path(self, folder: Path, index: int) -> Path:
        """Return the file of a shard."""
        return folder / f"features-{index + 1:05}-of-{len(self.shards):05}.safetensors"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of the numbers."""
        found = getattr(torch, self.dtype, None)
        if not isinstance(found, torch.dtype):
            raise FeatureError(f"dtype is {self.dtype!r}, expected a type of PyTorch's numbers")
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """An open file, whose states stay on disk until they are read.

    Args:
        path: The file.
        states: Hidden states of all its texts, one after the other.
        starts: Index of the first token of each text, and the number of tokens.
        keys: Keys of its texts.
        checksums: CRC-32 of the bytes of each text's states.
    """

    path: Path
    states: Float[Tensor, "tokens width"]
    starts: list[int]
    keys: list[bytes]
    checksums: list[int]

    @classmethod
    def open(cls, manifest: FeatureManifest, folder: Path, index: int) -> Self:
        """Open the file with an index in the manifest.

        Raises:
            FeatureError: If it is missing or not in the form that the manifest names.
        """
        path, num_texts = manifest.shard_path(folder, index), manifest.shards[index]
        try:
            with safe_open(path, framework="pt") as file:
                shape = file.get_slice("keys").get_shape()
                if shape != [num_texts, _KEY_BYTES]:
                    raise ValueError(f"keys have the shape {shape}")
                starts = file.get_tensor("starts").tolist()
                keys = file.get_tensor("keys").to(torch.uint8)
                checksums = file.get_tensor("checksums").tolist()
                states = file.get_tensor("states")  # a map of the file
        except SpeclmError:
            raise
        except Exception as error:
            raise FeatureError(
                f"{path} cannot be read ({reason_of(error)}), expected the features of {num_texts} "
                "texts; delete the file, and compute them again"
            ) from error
        is_increasing = starts == sorted(starts) and starts[:1] == [0]
        if (
            len(starts) != num_texts + 1
            or len(checksums) != num_texts
            or not is_increasing
            or states.shape != (starts[-1], manifest.width)
            or states.dtype != manifest.torch_dtype
        ):
            raise FeatureError(
                f"{path} has states of the shape {tuple(states.shape)} and of {states.dtype}, "
                f"expected [tokens, {manifest.width}] of torch.{manifest.dtype} for {num_texts} "
                "texts; delete the file, and compute them again"
            )
        parts = [bytes(row) for row in keys.numpy()]
        return cls(path, states, starts, parts, checksums)


class FeatureCache:
    """The features of all texts of a training, read from disk as they are needed.

    Any number of processes may read one folder; they share the memory of what they read.

    Attributes:
        manifest: What the features belong to.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open the files of a folder that `FeaturePlan.write` has filled.

        Args:
            folder: The folder.

        Raises:
            FeatureError: If a file is missing or damaged.
        """
        self._folder = Path(folder)
        self.manifest = FeatureManifest.read(self._folder)
        self._open()

    def _open(self) -> None:
        paths = [
            self.manifest.shard_path(self._folder, i) for i in range(len(self.manifest.shards))
        ]
        missing = sum(not path.is_file() for path in paths)
        if missing:
            raise FeatureError(
                f"{self._folder} lacks {missing} of {len(paths)} files of features, expected all "
                "of them; run the command that computes them again, which goes on where it ended"
            )
        shards = [Shard.open(self.manifest, self._folder, i) for i in range(len(paths))]
        self._found = {key: (shard, row) for shard in shards for row, key in enumerate(shard.keys)}
        self._checked: set[bytes] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a process that loads data needs, which opens the files by itself."""
        return {"folder": self._folder, "manifest": self.manifest}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self._folder, self.manifest = state["folder"], state["manifest"]
        self._open()

    def states(self, tokens: Sequence[int]) -> Float[Tensor, "seq width"]:
        """Return the features of a text, on the CPU; the first time their checksum is compared.

        Args:
            tokens: The whole text.

        Raises:
            FeatureError: If they are not in the cache, or damaged.
        """
        key = text_key(tokens)
        if key not in self._found:
            raise FeatureError(
                f"{self._folder} has no features of a text of {len(tokens)} tokens, expected those "
                "of all data; compute them again in another folder"
            )
        shard, row = self._found[key]
        states = shard.states[shard.starts[row] : shard.starts[row + 1]]
        if key not in self._checked:
            if len(states) != len(tokens) or checksum(states) != shard.checksums[row]:
                raise FeatureError(
                    f"{shard.path}: the features of text {row} are damaged, expected the bytes "
                    "that were written; delete the file, and compute them again"
                )
            self._checked.add(key)
        return states

    def require(self, keys: Iterable[bytes]) -> None:
        """Check that the cache has some texts.

        Args:
            keys: Their keys, see `text_key`.

        Raises:
            FeatureError: If one is missing.
        """
        missing = sum(key not in self._found for key in keys)
        if missing:
            raise FeatureError(
                f"{self._folder} lacks the features of {missing} texts, expected those of all data "
                "to train and to evaluate on; cache the features of all of it in another folder"
            )

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Pad examples as `collate_examples` does, and add their features.

        Returns:
            The batch, with `STATES` in the type of the base.
        """
        batch = collate_examples(examples)
        shape = (*batch["input_ids"].shape, self.manifest.width)
        padded = torch.zeros(shape, dtype=self.manifest.torch_dtype, device="cpu")
        for row, example in enumerate(examples):
            found = self.states(example["input_ids"])
            padded[row, : len(found)] = found
        return {**batch, STATES: padded}


def text_key(tokens: Sequence[int]) -> bytes:
    """Return the key of a text: its hidden states depend on nothing but base and tokens."""
    return hashlib.blake2b(array("q", tokens).tobytes(), digest_size=_KEY_BYTES).digest()


def distinct_texts(datasets: Iterable[Any]) -> dict[bytes, list[int]]:
    """Return the different texts of some datasets by their keys, in the order of the data."""
    texts: dict[bytes, list[int]] = {}
    for dataset in datasets:
        for index in range(len(dataset)):
            tokens = dataset[index]["input_ids"]
            texts.setdefault(text_key(tokens), tokens)
    return texts


def checksum(states: Tensor) -> int:
    """Return the CRC-32 of the bytes of a tensor on the CPU."""
    found: Any = states.contiguous().view(torch.uint8).numpy()
    return zlib.crc32(found)


@torch.no_grad()
def hash_base(base: PreTrainedModel) -> str:
    """Return a hash of all weights of a base, their types and its config.

    It is the same on every device and takes about as long as reading the weights once.

    Raises:
        UnsupportedModelError: If a weight is not in memory.
    """
    config = {k: v for k, v in base.config.to_dict().items() if k not in _VOLATILE}
    digest = hashlib.sha256(repr(sorted(config.items())).encode())
    tensors: Mapping[str, Any] = base.state_dict()
    for name, tensor in sorted(tensors.items()):
        if not isinstance(tensor, Tensor):
            continue  # settings of quantised modules
        if tensor.is_meta or (tensor.numel() == 0 and hasattr(tensor, "ds_shape")):
            raise UnsupportedModelError(
                f"{name} of {base.config.name_or_path} is offloaded or partitioned, expected all "
                "weights of a base in memory whose features are cached; load it without offloading"
            )
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for total in _sums(tensor):
            digest.update(total.to_bytes(8, signed=True))
    return digest.hexdigest()


def _sums(tensor: Tensor) -> Iterator[int]:
    """Yield the sum of the bits of a tensor, and one that depends on their order.

    Integer sums are exact in any order, so every device finds the same.
    """
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.detach().contiguous().flatten()
    bits = flat.view(kinds[flat.element_size()]) if flat.dtype != torch.bool else flat
    plain = torch.zeros((), dtype=torch.int64, device=flat.device)
    ordered = plain.clone()
    weights = torch.arange(1, min(_CHUNK, len(bits)) + 1, device=flat.device)
    for number, part in enumerate(torch.split(bits, _CHUNK)):
        wide: Int[Tensor, " part"] = part.to(torch.int64)
        plain += wide.sum()
        ordered += (wide * weights[: len(wide)]).sum() * (2 * number + 1)
    yield int(plain)
    yield int(ordered)
