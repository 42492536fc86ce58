"""Draft vocabularies of EAGLE-3: which token of the target each column of the logits is."""

from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from speclm.errors import CheckpointError

_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def read_draft_columns(
    path: Path, *, offsets: Tensor, is_drafted: Tensor | None, num_columns: int, vocab_size: int
) -> Int[Tensor, " draft_vocab"]:
    """Return the target's token of each draft token.

    Args:
        path: The file, for messages.
        offsets: What ``d2t`` holds: the target's token less the draft token, of each.
        is_drafted: What ``t2d`` holds: whether each of the target's tokens is drafted.
        num_columns: Width of the heads' logits.
        vocab_size: Width of the target's.

    Raises:
        CheckpointError: If the offsets are not as many whole numbers, point outside of the
            target's vocabulary, or do not increase, or if the two disagree.
    """
    _require_list(path, "d2t", offsets, num_columns, "columns of the logits")
    columns = offsets.to(torch.int64) + torch.arange(num_columns, device="cpu")
    outside = (columns < 0) | (columns >= vocab_size)
    if outside.any():
        place = int(outside.nonzero()[0])
        raise CheckpointError(
            f"{path}: 'd2t' maps draft token {place} to {int(columns[place])}, expected a token "
            f"from 0 to {vocab_size - 1}; the file belongs to another vocabulary, or holds ids in "
            "place of offsets: export the heads again"
        )
    falls = columns[1:] <= columns[:-1]
    if falls.any():
        place = int(falls.nonzero()[0])
        raise CheckpointError(
            f"{path}: 'd2t' maps draft tokens {place} and {place + 1} to {int(columns[place])} and "
            f"{int(columns[place + 1])}, expected increasing tokens; export the heads again with a "
            "sorted vocabulary"
        )
    if is_drafted is not None:
        _require_list(path, "t2d", is_drafted, vocab_size, "tokens of the target")
        expected = torch.zeros(vocab_size, dtype=torch.bool, device="cpu")
        expected[columns] = True
        differs = (is_drafted != 0) != expected
        if differs.any():
            token = int(differs.nonzero()[0])
            raise CheckpointError(
                f"{path}: 't2d' holds {bool(is_drafted[token])} for token {token}, expected "
                f"{bool(expected[token])} as 'd2t' says ({int(differs.sum())} such tokens); one of "
                "them is of another run, export the heads again"
            )
    return columns


def _require_list(path: Path, key: str, found: Tensor, length: int, of: str) -> None:
    if found.shape != (length,) or found.dtype not in _WHOLE:
        raise CheckpointError(
            f"{path}: {key!r} is {found.dtype} of shape {list(found.shape)}, expected whole "
            f"numbers of shape [{length}], the {of}; export the heads again"
        )
