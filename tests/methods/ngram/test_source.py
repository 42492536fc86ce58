from hypothesis import given
from hypothesis import strategies as st

from speclm.methods.ngram.source import MAX_FOLLOWERS, NgramIndex, NgramSource


def followers(text: list[int], context: tuple[int, ...], max_ngram: int) -> list[int]:
    """Every token that followed the longest known n-gram, oldest first, by brute force."""
    for length in range(min(max_ngram, len(context)), 0, -1):
        ngram = list(context[-length:])
        found = [
            text[i + length] for i in range(len(text) - length) if text[i : i + length] == ngram
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
    expected = set(followers(text, index.context, max_ngram))
    found = index.candidates(index.match(index.context))
    tokens = [token for token, _ in found]
    assert len(set(tokens)) == len(tokens) == len(expected)
    assert set(tokens) <= expected
    assert all(0 <= key < len(NgramSource.start_rates) for _, key in found)


def best(prompt: list[int], output: list[int] | None = None) -> tuple[int, float]:
    index = NgramIndex(prompt, max_ngram=9)
    index.extend(output or [])
    token, key = index.candidates(index.match(index.context))[0]
    return token, NgramSource.start_rates[key]


def test_longer_matches_and_agreeing_followers_have_keys_of_higher_rates():
    _, once = best([1, 2, 9, 1])
    assert best([5, 1, 2, 9, 5, 1])[1] > once
    assert best([1, 2, 9, 1, 2, 8, 1])[1] > once
    assert best([1, 2, 9, 1, 3, 8, 1])[1] < once
    assert best([7, 8], [1, 2, 9, 1])[1] > once


def test_of_several_followers_the_last_in_the_output_or_the_first_in_the_prompt_comes_first():
    assert best([1, 2, 9, 1, 3, 8, 1])[0] == 2
    assert best([7], [1, 2, 9, 1, 3, 8, 1])[0] == 3


def test_number_of_followers_is_bounded():
    text = [token for follower in range(10, 40) for token in (1, follower)]
    index = NgramIndex(text, max_ngram=1)
    assert len(index._followers[(1,)]) == MAX_FOLLOWERS
