"""Sets of nodes as bits of words."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from speclm.tree.words import num_words, pack_words, signed_words, unpack_words


def test_unpacked_words_are_cut_to_the_number_of_bits():
    words = torch.tensor([[5, 1]])
    assert unpack_words(words, num_bits=65)[0].nonzero().flatten().tolist() == [0, 2, 64]


@given(num_bits=st.integers(1, 200), seed=st.integers(0, 9))
def test_words_hold_the_bits_that_were_packed(num_bits, seed):
    generator = torch.Generator().manual_seed(seed)
    bits = torch.rand(2, 3, num_bits, generator=generator) < 0.5
    bits[0, 0] = True  # the last bit of a word is its sign
    words = pack_words(bits)
    assert words.shape == (2, 3, num_words(num_bits))
    assert torch.equal(unpack_words(words, num_bits=num_bits), bits)
    padding = unpack_words(words, num_bits=64 * num_words(num_bits))[..., num_bits:]
    assert not padding.any()


def test_words_of_a_number_are_those_of_its_bits():
    assert signed_words(5, 1) == [5]
    assert signed_words(5, 2) == [5, 0]
    assert signed_words(1 << 63 | 1 << 64, 2) == [-(2**63), 1]
