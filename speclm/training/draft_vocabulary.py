"""Which of the target's tokens EAGLE-3 heads may guess: those that the training set has most."""

from collections.abc import Iterable

import torch
from jaxtyping import Int
from torch import Tensor

from speclm.config import require_count
from speclm.errors import OptionError
from speclm.training.rows import Item


def count_tokens(rows: Iterable[Item], *, vocab_size: int) -> Int[Tensor, " vocab"]:
    """Count the tokens that the loss counts.

    Args:
        rows: The training set.
        vocab_size: Width of the target's logits.

    Raises:
        OptionError: If a row has a token outside the vocabulary.
    """
    counts = torch.zeros(vocab_size, dtype=torch.int64, device="cpu")
    for index, row in enumerate(rows):
        tokens = torch.tensor(row["input_ids"], dtype=torch.long, device="cpu")
        counted = tokens[torch.tensor(row["loss_mask"], dtype=torch.bool, device="cpu")]
        if len(counted) and int(counted.max()) >= vocab_size:
            raise OptionError(
                f"row {index} has token {int(counted.max())}, expected ids below {vocab_size}, the "
                "target's vocabulary; tokenize with the target's own tokenizer"
            )
        counts += torch.bincount(counted, minlength=vocab_size)
    return counts


def choose_columns(counts: Int[Tensor, " vocab"], size: int) -> Int[Tensor, " draft_vocab"]:
    """Return the `size` most frequent tokens in the order of their ids.

    Where fewer occur, the lowest other ids fill up.

    Args:
        counts: Result of `count_tokens`.
        size: Tokens to choose.

    Raises:
        OptionError: If there are not as many.

    Example:
        >>> choose_columns(torch.tensor([0, 5, 0, 9, 1]), 3).tolist()
        [1, 3, 4]
    """
    require_count("draft_vocab_size", size, low=1, high=len(counts))
    order = counts.argsort(descending=True, stable=True)
    return order[:size].sort().values
