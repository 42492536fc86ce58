"""Choose a draft vocabulary: the tokens that are most frequent in the training data."""

from collections.abc import Iterable

import torch
from jaxtyping import Int
from torch import Tensor

from speclm.config import require_count
from speclm.errors import OptionError
from speclm.training.conversations import Example


def count_tokens(dataset: Iterable[Example], *, vocab_size: int) -> Int[Tensor, " vocab"]:
    """Count each token among those that the assistant wrote.

    Args:
        dataset: The training set.
        vocab_size: Width of the target's logits.

    Raises:
        OptionError: If an example has a token outside the vocabulary.
    """
    counts = torch.zeros(vocab_size, dtype=torch.int64, device="cpu")
    for index, example in enumerate(dataset):
        tokens = torch.tensor(example["input_ids"], dtype=torch.long, device="cpu")
        counted = tokens[torch.tensor(example["loss_mask"], dtype=torch.bool, device="cpu")]
        if len(counted) and int(counted.max()) >= vocab_size:
            raise OptionError(
                f"example {index} has token {int(counted.max())}, expected ids below "
                f"{vocab_size}, the target's vocabulary; tokenize with the target's own tokenizer"
            )
        counts += torch.bincount(counted, minlength=vocab_size)
    return counts


def choose_columns(counts: Int[Tensor, " vocab"], size: int) -> Int[Tensor, " draft_vocab"]:
    """Return the `size` most frequent tokens in the order of their ids.

    If fewer tokens occur, those with the lowest ids are added.

    Args:
        counts: Result of `count_tokens`.
        size: Number of tokens to choose.

    Raises:
        OptionError: If `size` exceeds the vocabulary.

    Example:
        >>> choose_columns(torch.tensor([0, 5, 0, 9, 1]), 3).tolist()
        [1, 3, 4]
    """
    require_count("draft_vocab_size", size, low=1, high=len(counts))
    order = counts.argsort(descending=True, stable=True)
    return order[:size].sort().values
