"""Write the hidden states that a training reads once, so that no epoch runs the base's decoder."""

import errno
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor, nn

from speclm.config import require_count
from speclm.errors import FeatureError, OptionError, reason_of
from speclm.files.atomic import write_file
from speclm.target.features import decoder_layers
from speclm.training.conversations import Example
from speclm.training.dataset import collate_examples
from speclm.training.feature_cache import (
    MANIFEST_NAME,
    FeatureManifest,
    Shard,
    checksum,
    distinct_texts,
    hash_base,
)
from speclm.training.partitions import is_divided
from speclm.training.run_summary import size_text
from speclm.training.training_model import TrainingModel

_log = logging.getLogger("speclm")

SHARD_BYTES = 2**29
"""Bytes of a file of features; twice as many are in memory while it is written."""


@dataclass(frozen=True, slots=True, eq=False)
class FeaturePlan:
    """What has to be written before a training can read its features.

    Args:
        folder: Where the files are or will be.
        manifest: What they belong to.
        texts: Key and tokens of each text, file by file.
        missing: Indices of the files that have to be written.
    """

    folder: Path
    manifest: FeatureManifest
    texts: tuple[list[tuple[bytes, list[int]]], ...]
    missing: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the features in the files that have to be written."""
        token_bytes = self.manifest.width * self.manifest.torch_dtype.itemsize
        parts = (self.texts[index] for index in self.missing)
        return sum(len(tokens) for part in parts for _, tokens in part) * token_bytes

    def prepare(self) -> None:
        """Check that the features fit on the disk, and write the manifest.

        Raises:
            FeatureError: If there is too little space, or the folder cannot be written to.
        """
        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for remnant in _remnants(self.folder):
                remnant.unlink()
            free = shutil.disk_usage(self.folder).free
            if self.num_bytes > free:
                raise FeatureError(
                    f"{self.folder}: the features need {size_text(self.num_bytes)} and "
                    f"{size_text(free)} are free; name a folder on a larger disk, or train on less "
                    "data with --limit or --max-length"
                )
            self.manifest.write(self.folder)

    def write(
        self,
        model: TrainingModel,
        *,
        batch_size: int,
        process: tuple[int, int] = (0, 1),
        progress: Callable[[int], object] = lambda _: None,
    ) -> None:
        """Run the base over all texts whose features are missing, file by file.

        A file appears whole or not at all, so the same call after an interruption goes on with the
        next file. Call `prepare` before, in one process.

        Args:
            model: Heads and base.
            batch_size: Texts of a forward.
            process: Index of this process and number of processes, each of which writes its share.
            progress: Called with the number of texts after each forward.

        Raises:
            FeatureError: If a file cannot be written, for example because the disk is full.
        """
        require_count("batch_size", batch_size, low=1, high=2**31 - 1)
        index, num_processes = process
        for shard in self.missing[index::num_processes]:
            self._write_shard(model, shard, batch_size, progress)

    def _write_shard(
        self, model: TrainingModel, index: int, batch_size: int, progress: Callable[[int], object]
    ) -> None:
        texts = self.texts[index]
        starts = [0, *accumulate(len(tokens) for _, tokens in texts)]
        shape = (starts[-1], self.manifest.width)
        states = torch.empty(shape, dtype=self.manifest.torch_dtype, device="cpu")
        order = sorted(range(len(texts)), key=lambda row: len(texts[row][1]))
        for first in range(0, len(order), batch_size):
            batch_rows = order[first : first + batch_size]
            found = _read(model, [texts[row][1] for row in batch_rows], self.manifest.layers)
            for row, part in zip(batch_rows, found, strict=True):
                states[starts[row] : starts[row + 1]] = part[: starts[row + 1] - starts[row]]
            progress(len(batch_rows))
        checksums = [checksum(states[start:end]) for start, end in pairwise(starts)]
        keys = b"".join(key for key, _ in texts)
        path, size = self.manifest.shard_path(self.folder, index), (len(texts), -1)
        with _writing(path):
            content = save(
                {
                    "states": states,
                    "starts": torch.tensor(starts, dtype=torch.long, device="cpu"),
                    "checksums": torch.tensor(checksums, dtype=torch.long, device="cpu"),
                    "keys": torch.frombuffer(bytearray(keys), dtype=torch.uint8).view(*size),
                }
            )
            write_file(path, content)


def plan_features(
    model: TrainingModel,
    datasets: Sequence[Any],
    folder: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> FeaturePlan:
    """Return what has to be written so that a training can read its features from a folder.

    Args:
        model: Heads and base; the heads decide which hidden states are read.
        datasets: Examples to train and to evaluate on, each with a length. A text that occurs
            several times is stored once.
        folder: Folder of features: new, empty, or one of the same training.
        shard_bytes: Bytes of a file, as far as texts allow.

    Raises:
        OptionError: If the model trains the base too or its layers are divided, a dataset is a
            stream, or `shard_bytes` is below 1.
        FeatureError: If the folder has features of another base, data, layers or type, or other
            files.
        UnsupportedModelError: If a weight of the base is not in memory.
    """
    require_count("shard_bytes", shard_bytes, low=1, high=2**63)
    layers, folder = model.layers_read, Path(folder)
    if layers is None:
        raise OptionError(
            f"{type(model).__name__} does not learn from hidden states of a frozen base, expected "
            "Medusa, EAGLE or block heads; train without cached features"
        )
    if is_divided(model.view.model):
        raise OptionError(
            "the base's layers are divided by FSDP or ZeRO-3, expected a whole base to read its "
            "features; leave one of the two out: with cached features the layers are released"
        )
    for dataset in datasets:
        if not hasattr(dataset, "__len__"):
            raise OptionError(
                f"data is a {type(dataset).__name__} without a length, expected examples that can "
                "be read twice; train on a stream without cached features"
            )
    texts = distinct_texts(datasets)
    (probe,) = _read(model, [[0]], layers)
    width = probe.shape[-1]
    token_bytes = width * probe.dtype.itemsize
    base: Any = model.view.model
    wanted = FeatureManifest(
        base=model.view.name,
        weights=hash_base(base),
        texts=sha256(b"".join(texts)).hexdigest(),
        num_texts=len(texts),
        num_tokens=sum(map(len, texts.values())),
        layers=layers,
        dtype=str(probe.dtype).removeprefix("torch."),
        width=width,
        shards=_cut([len(tokens) * token_bytes for tokens in texts.values()], shard_bytes),
    )
    if (folder / MANIFEST_NAME).exists():
        found = FeatureManifest.read(folder)
        found.require_same(wanted, folder)
        wanted = replace(wanted, shards=found.shards)
    elif folder.exists() and (not folder.is_dir() or set(folder.iterdir()) != _remnants(folder)):
        raise FeatureError(
            f"{folder} is a file or holds other files, expected an empty folder or one of cached "
            "features; name another"
        )
    bounds, items = accumulate(wanted.shards, initial=0), [*texts.items()]
    parts = tuple(items[start:end] for start, end in pairwise(bounds))
    plan = FeaturePlan(folder, wanted, parts, ())
    missing = [index for index in range(len(wanted.shards)) if not _is_written(plan, index)]
    return replace(plan, missing=tuple(missing))


def _remnants(folder: Path) -> set[Path]:
    """Return the unfinished files of processes that were killed."""
    return set(folder.glob(".writing-*"))


def release_decoder(model: TrainingModel) -> None:
    """Free the memory of the decoder layers of a base; embeddings and head stay.

    The base cannot run any more: every batch needs its hidden states from a cache.

    Args:
        model: Heads and base.

    Raises:
        UnsupportedModelError: If the decoder has no list of layers.
    """
    layers = decoder_layers(model.view.decoder, model.view.num_layers)
    for index in range(len(layers)):
        layers[index] = _Released()


class _Released(nn.Module):
    """Stands where a layer of the base was."""

    def forward(self, *arguments: Any, **named: Any) -> Any:  # noqa: ARG002
        raise FeatureError(
            "the base is asked to run and its layers were released, expected a batch with cached "
            "features; load the base again, or make batches with FeatureCache.collate"
        )


def _is_written(plan: FeaturePlan, index: int) -> bool:
    """Return whether a file of features is finished; one that cannot be read is written again."""
    path = plan.manifest.shard_path(plan.folder, index)
    if not path.is_file():
        return False
    try:
        shard = Shard.open(plan.manifest, plan.folder, index)
    except FeatureError as error:
        _log.warning("%s", error)
        return False
    return shard.keys == [key for key, _ in plan.texts[index]]


def _read(
    model: TrainingModel, texts: Sequence[list[int]], layers: tuple[int, ...]
) -> Float[Tensor, "texts seq width"]:
    """Return the hidden states of some texts, padded, on the CPU."""
    examples = [Example(input_ids=tokens, loss_mask=[0] * len(tokens)) for tokens in texts]
    batch = collate_examples(examples)
    return model.run_base(batch["input_ids"], batch["attention_mask"], layers).cpu()


def _cut(sizes: Sequence[int], most: int) -> tuple[int, ...]:
    """Return how many texts each file gets, so that its size is at most `most` if it has two.

    Example:
        >>> _cut([4, 4, 9, 1], 8)
        (2, 1, 1)
    """
    counts, used = [0], 0
    for size in sizes:
        if counts[-1] and used + size > most:
            counts.append(0)
            used = 0
        counts[-1] += 1
        used += size
    return tuple(counts)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        action = "name a folder that you may write to"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            action = "free space and run the same command, which goes on with this file"
        raise FeatureError(f"{path} cannot be written ({reason_of(error)}); {action}") from error
