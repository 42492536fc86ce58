"""Draws rows so that those of one batch are about equally long."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from speclm.errors import OptionError

_POOL_BATCHES = 50  # enough for batches of like lengths, few enough that epochs differ


class LengthSampler(Sampler[int]):
    """Sorts random pools of rows by length, cuts them into batches and shuffles the batches.

    The order is a function of seed and epoch alone, so that a resumed training sees the rows that
    the killed one would have seen.
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int, seed: int = 0) -> None:
        """Draw rows of the given lengths.

        Args:
            lengths: Tokens of each row.
            batch_size: Rows that the caller puts into a batch.
            seed: Decides the order, together with the epoch.

        Raises:
            OptionError: If `batch_size` is below 1.
        """
        if batch_size < 1:
            raise OptionError(f"batch_size is {batch_size!r}, expected at least 1; raise it")
        self._lengths = list(lengths)
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; Accelerate calls this before each."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        shuffled = torch.randperm(len(self._lengths), generator=generator, device="cpu").tolist()
        size, pool_size = self._batch_size, self._batch_size * _POOL_BATCHES
        batches = []
        for start in range(0, len(shuffled), pool_size):
            pool = sorted(shuffled[start : start + pool_size], key=lambda row: self._lengths[row])
            batches += [pool[i : i + size] for i in range(0, len(pool), size)]
        # A short batch anywhere but at the end would shift all after it.
        full = [batch for batch in batches if len(batch) == size]
        order = torch.randperm(len(full), generator=generator, device="cpu").tolist()
        for batch in [*(full[i] for i in order), *(b for b in batches if len(b) < size)]:
            yield from batch
