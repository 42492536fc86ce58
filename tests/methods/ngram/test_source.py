from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from speclm.methods.ngram.source import MAX_FOLLOWERS, NgramIndex, NgramSource


def followers(text: list[int], context: tuple[int, ...], max_ngram: int) -> list[int]:
    """Every token that followed the longest known n-gram, oldest first, by brute force."""
    for length in range(min(max_ngram, len(context)), 0, -1):
        ngram = list(context[-length:])
        found = [
            text[i + length]
            for i in range(len(text) - length)
            if text[i : i + length] == ngram
        ]
        if found:
            return found
    return []


@given(
    text=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    max_ngram=st.integers(1, 5),
)
def test_candidates_are_the_followers_of_the_longest_known_ngram(text, max_ngram):
    index = NgramIndex(text, max_ngram=max_ngram)
    expected = followers(text, index.context, max_ngram)
    counts, latest = defaultdict(int), {}
    for age, token in enumerate(expected):
        counts[token] += 1
        latest[token] = age
    ranked = sorted(counts, key=lambda token: (-counts[token], -latest[token]))
    found = index.candidates(index.context)
    assert [token for token, _ in found] == ranked[: len(found)]
    assert len(found) == min(len(ranked), 3)
    assert all(0 <= key < len(NgramSource.start_rates) for _, key in found)


def test_longer_matches_and_agreeing_followers_have_keys_of_higher_rates():
    def rate(text: list[int]) -> float:
        index = NgramIndex(text, max_ngram=6)
        ((_, key),) = index.candidates(index.context)[:1]
        return NgramSource.start_rates[key]

    once = rate([1, 2, 9, 1])
    assert rate([5, 1, 2, 9, 5, 1]) > once
    assert rate([1, 2, 9, 1, 2, 8, 1]) > once
    assert rate([1, 2, 9, 1, 3, 8, 1]) < once


def test_number_of_followers_is_bounded():
    text = [token for follower in range(10, 40) for token in (1, follower)]
    index = NgramIndex(text, max_ngram=1)
    assert len(index._followers[(1,)]) == MAX_FOLLOWERS
