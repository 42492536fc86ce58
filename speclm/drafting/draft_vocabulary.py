"""The lists of a draft vocabulary in checkpoints: ``d2t`` and ``t2d``, as others publish them."""

from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from speclm.errors import CheckpointError

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def read_columns(
    path: Path, offsets: Tensor, is_drafted: Tensor | None, *, vocab_size: int, num_columns: int
) -> Int[Tensor, " draft_vocab"]:
    """Return the target's id of each token of the draft vocabulary.

    Args:
        path: The file, for messages.
        offsets: ``d2t``: for each draft token, the target's id minus the draft id.
        is_drafted: ``t2d``: whether each of the target's tokens is in the draft vocabulary.
        vocab_size: Tokens of the target.
        num_columns: Tokens of the draft vocabulary.

    Raises:
        CheckpointError: If a list has another length, or they contradict each other.
    """
    _require_list(path, "d2t", offsets, num_columns, "columns of the logits")
    columns = offsets.to(torch.int64) + torch.arange(num_columns, device="cpu")
    outside = (columns < 0) | (columns >= vocab_size)
    if outside.any():
        token = int(outside.nonzero()[0])
        raise CheckpointError(
            f"{path}: 'd2t' maps draft token {token} to {int(columns[token])}, expected a token "
            f"from 0 to {vocab_size - 1}; the file belongs to another vocabulary, or holds ids in "
            "place of offsets: export the heads again"
        )
    falls = columns[1:] <= columns[:-1]
    if falls.any():
        token = int(falls.nonzero()[0])
        raise CheckpointError(
            f"{path}: 'd2t' maps draft tokens {token} and {token + 1} to {int(columns[token])} and "
            f"{int(columns[token + 1])}, expected increasing tokens; export the heads again with a "
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
    if found.shape != (length,) or found.dtype not in _INTEGERS:
        raise CheckpointError(
            f"{path}: {key!r} is {found.dtype} of shape {list(found.shape)}, expected whole "
            f"numbers of shape [{length}], the {of}; export the heads again"
        )


def draft_lists(
    columns: Int[Tensor, " draft_vocab"] | None, *, vocab_size: int
) -> dict[str, Tensor]:
    """Return both lists of a draft vocabulary; None stands for a complete one."""
    if columns is None:
        columns = torch.arange(vocab_size, device="cpu")
    columns = columns.cpu()
    is_drafted = torch.zeros(vocab_size, dtype=torch.bool, device="cpu")
    is_drafted[columns] = True
    return {"d2t": columns - torch.arange(len(columns), device="cpu"), "t2d": is_drafted}
