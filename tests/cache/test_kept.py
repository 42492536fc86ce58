import pytest
import torch
from transformers.cache_utils import DynamicCache

from speclm.cache.kept import KeptCache


@pytest.fixture
def filled():
    """A function that returns a cache of so many tokens."""

    def make(length):
        cache = DynamicCache()
        states = torch.zeros(1, 1, length, 2)
        cache.update(states, states, 0)
        return cache

    return make


@pytest.mark.parametrize(
    ("prompt", "num_kept"),
    [([1, 2, 3, 4, 5], 3), ([1, 2, 9, 4], 2), ([1, 2, 3], 2), ([9], None), ([1], None)],
)
def test_cache_is_cropped_to_what_the_prompt_shares(filled, prompt, num_kept):
    kept = KeptCache()
    assert kept.take(prompt) is None
    kept.keep(filled(3), [1, 2, 3, 4])
    cache = kept.take(prompt)
    assert (cache and cache.get_seq_length()) == num_kept
    assert kept.take(prompt) is None  # it was given up


def test_a_copy_is_cropped_and_leaves_the_cache_as_it_is(filled):
    kept = KeptCache()
    assert kept.copy(2) is None
    kept.keep(filled(3), [1, 2, 3, 4])
    assert [kept.copy(length).get_seq_length() for length in (2, 3)] == [2, 3]
    assert kept.copy(0) is None
    assert kept.take([1, 2, 3, 4]).get_seq_length() == 3


def test_cache_that_cannot_be_cropped_is_dropped(filled):
    cache = filled(3)
    cache.crop = lambda _: (_ for _ in ()).throw(RuntimeError)
    kept = KeptCache()
    kept.keep(cache, [1, 2, 3])
    assert kept.copy(2) is None
    assert kept.take([1, 2, 9]) is None
