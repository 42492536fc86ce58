"""Sets of nodes as bits of 64-bit words."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from speclm.config import MAX_NODES

_WORD_BITS = 64
_LARGEST_WORD = 2 ** (_WORD_BITS - 1)


def num_words(num_bits: int) -> int:
    """Return the number of int64 words that hold `num_bits` bits."""
    return -(-num_bits // _WORD_BITS)


def pack_words(bits: Bool[Tensor, "*axes num_bits"]) -> Int[Tensor, "*axes words"]:
    """Pack booleans into int64 words, the first into the lowest bit of the first word."""
    words = num_words(bits.shape[-1])
    padded = F.pad(bits, (0, words * _WORD_BITS - bits.shape[-1]))
    by_word = padded.view(*bits.shape[:-1], words, _WORD_BITS).long()
    shifts = torch.arange(_WORD_BITS, device=bits.device)
    # Bits do not overlap, so their sum is their union; that of the last one is negative.
    return (by_word << shifts).sum(-1)


def unpack_words(
    words: Int[Tensor, "*axes words"], *, num_bits: int
) -> Bool[Tensor, "*axes num_bits"]:
    """Spread packed int64 words into one boolean per bit."""
    word, shift = _bit_positions(num_bits, words.device)
    return (words[..., word] >> shift).bitwise_and_(1).bool()


@lru_cache(maxsize=MAX_NODES)
def _bit_positions(num_bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the word and the shift of each bit."""
    bits = torch.arange(num_bits, device=device)
    return bits // _WORD_BITS, bits % _WORD_BITS


def signed_words(bits: int, count: int) -> list[int]:
    """Return the words of bits that are given as a number."""
    if count == 1 and bits < _LARGEST_WORD:
        return [bits]  # most trees
    words = [bits >> (_WORD_BITS * word) & (2**_WORD_BITS - 1) for word in range(count)]
    return [word - 2**_WORD_BITS if word >> (_WORD_BITS - 1) else word for word in words]
