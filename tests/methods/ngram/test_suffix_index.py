import copy
import json
import pickle
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from speclm.errors import CheckpointError, OptionError, SpeclmError, VocabularyMismatchError
from speclm.methods.ngram.suffix_index import MAX_MATCH, SEPARATOR, SuffixIndex

VOCAB = 8
IDENTITY = {"vocab_size": VOCAB, "fingerprint": "a"}
DOCUMENTS = [[1, 2, 3, 1, 2, 4], [5, 1, 2, 3], [], [7]]

# Few tokens, so that long matches occur; repeated texts, so that they are longer than is sorted.
documents = st.lists(
    st.builds(
        lambda part, times: part * times,
        st.lists(st.integers(0, 3), max_size=12),
        st.sampled_from([1, 1, 2, 20]),
    ),
    max_size=6,
)


def occurrences(texts, tokens):
    """Return what follows each occurrence of some tokens; a separator at the end of a text."""
    length = len(tokens)
    return [
        [*text, SEPARATOR][i + length]
        for text in texts
        for i in range(len(text) - length + 1)
        if text[i : i + length] == tokens
    ]


@settings(deadline=None, max_examples=80)
@given(documents, st.lists(st.integers(0, 4), min_size=1, max_size=20))
def test_matches_and_followers_are_those_of_a_search_through_the_texts(texts, tokens):
    index = SuffixIndex.build(texts)
    expected = occurrences(texts, tokens)

    match = index.find(tokens)

    assert (match is None) == (not expected)
    if match is not None:
        low, high, length = match
        assert (high - low, length) == (len(expected), len(tokens))
        if len(expected) <= 32:
            counts = Counter(expected)
            del counts[SEPARATOR]
            found = index.followers(match)
            assert dict(found) == dict(counts)
            assert [count for _, count in found] == sorted(counts.values(), reverse=True)


@settings(deadline=None, max_examples=80)
@given(documents, st.lists(st.integers(0, 3), max_size=24), st.integers(1, MAX_MATCH))
def test_longest_match_is_the_longest_end_of_the_context_that_occurs(texts, context, longest):
    index = SuffixIndex.build(texts)
    lengths = range(2, min(len(context), longest) + 1)
    known = [n for n in lengths if occurrences(texts, context[-n:])]

    match = index.find_longest(context, longest=longest)

    assert (0 if match is None else match[2]) == max(known, default=0)
    assert match is None or match == index.find(context[-match[2] :])


def test_a_match_stays_one_for_a_whole_draft_and_ends_where_nothing_is_sorted():
    index = SuffixIndex.build([[1] * 200, [1] * 200])
    match = index.find([1] * MAX_MATCH)
    for _ in range(64):
        match = index.narrow(match, 1)
    assert match[2] == MAX_MATCH + 64
    assert index.narrow(match, 1) is None


def test_followers_of_many_occurrences_are_a_sample():
    index = SuffixIndex.build([[1, 2]] * 900 + [[1, 3]] * 300)
    found = index.followers(index.find([1]))
    assert found == [(2, 24), (3, 8)]


def test_few_of_the_pairs_that_were_looked_up_are_kept(monkeypatch):
    monkeypatch.setattr("speclm.methods.ngram.suffix_index._MAX_PAIRS", 3)
    index = SuffixIndex.build([list(range(8))])
    for _ in range(2):
        found = [index.find([token, token + 1]) for token in range(8)]
        assert [match is not None for match in found] == [True] * 7 + [False]
    assert len(index._pairs) <= 3


def test_an_index_of_nothing_finds_nothing():
    index = SuffixIndex.build([])
    assert len(index) == 0
    assert index.find([0]) is None
    assert index.find_longest([]) is None


def test_copies_find_the_same():
    index = SuffixIndex.build(DOCUMENTS)
    assert copy.deepcopy(index) is index
    assert pickle.loads(pickle.dumps(index)).find([1, 2]) == index.find([1, 2])


@pytest.mark.parametrize("token", [-1, 2**24])
def test_tokens_that_are_none_are_refused(token):
    with pytest.raises(
        OptionError, match=rf"document 1 has the token {token}, expected .*drop padding"
    ):
        SuffixIndex.build([[1], [2, token]])


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "texts.index"
    SuffixIndex.build(DOCUMENTS).save(path, **IDENTITY)
    return path


def test_a_loaded_index_finds_the_same(path):
    index, loaded = SuffixIndex.build(DOCUMENTS), SuffixIndex.load(path, **IDENTITY)
    assert len(loaded) == len(index) == 11
    for tokens in ([1], [1, 2], [1, 2, 3], [7], [6]):
        match = index.find(tokens)
        assert loaded.find(tokens) == match
        assert match is None or loaded.followers(match) == index.followers(match)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the list of mappings of Linux")
def test_a_loaded_index_stays_in_its_file(path):
    index = SuffixIndex.load(path, **IDENTITY)
    mapped = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(path.name)
    ]
    for view in (index._text, index._order):
        address = np.asarray(view).ctypes.data
        assert any(start <= address < end for start, end in mapped)


def test_a_file_may_be_replaced_while_it_is_in_use(path):
    index = SuffixIndex.load(path, **IDENTITY)
    SuffixIndex.build([[7] * 3]).save(path, **IDENTITY)
    assert index.find([1, 2, 3])[2] == 3


def test_an_index_with_tokens_that_the_base_lacks_is_not_written(tmp_path):
    with pytest.raises(OptionError, match=r"token 8, expected less than vocab_size 8.*tokenizer"):
        SuffixIndex.build([[8]]).save(tmp_path / "new", **IDENTITY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        ({"vocab_size": 9}, r"for vocab_size '8', the base has '9'; write one"),
        ({"fingerprint": "b"}, r"for fingerprint 'a', the base has 'b'; write one"),
    ],
)
def test_an_index_for_another_vocabulary_is_refused(path, identity, message):
    with pytest.raises(VocabularyMismatchError, match=message):
        SuffixIndex.load(path, **{**IDENTITY, **identity})


def metadata_of(path):
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": np.array([90] * 11, np.int32)}, r"suffixes start from 90 to 90 in 95 tokens"),
        ({"order": np.array([-1] * 11, np.int32)}, r"suffixes start from -1"),
        ({"order": np.zeros(10, np.int32)}, r"10 suffixes are sorted of 11"),
        ({"order": np.zeros(11, np.int64)}, r"torch.int64 of shape \(11,\).*int32 numbers"),
        ({"text": np.zeros((1, 1), np.int32)}, r"torch.int32 of shape \(1, 1\)"),
        ({"text": np.full(95, 9, np.int32)}, r"last 80 of 95 tokens are no separators"),
        ({"text": np.zeros(0, np.int32)}, r"last 80 of 0 tokens"),
        ({"text": np.array([9] + [-1] * 80, np.int32)}, r"from -1 to 9 with a vocabulary of 8"),
        ({"text": np.array([-2] + [-1] * 80, np.int32)}, r"from -2 to -1 with a vocabulary"),
        ({"more": np.zeros(1, np.int32)}, r"tensors \['more', 'order', 'text'\].*speclm index"),
    ],
)
def test_wrong_arrays_are_named(path, change, message):
    arrays, metadata = load_file(path), metadata_of(path)
    save_file({**arrays, **change}, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=message):
        SuffixIndex.load(path, **IDENTITY)


def test_files_of_something_else_are_named(path, tmp_path):
    save_file({"weight": np.zeros(3)}, tmp_path / "weights")
    save_file(load_file(path), path, metadata={**metadata_of(path), "version": "0"})
    with pytest.raises(CheckpointError, match=r"'version': '0'.*expected an index of.*name a file"):
        SuffixIndex.load(path, **IDENTITY)
    with pytest.raises(CheckpointError, match=r"\['weight'\].*expected an index"):
        SuffixIndex.load(tmp_path / "weights", **IDENTITY)
    for other in (tmp_path / "missing", tmp_path, Path(__file__)):
        with pytest.raises(
            CheckpointError, match=r"cannot be read.*speclm index.*missing, truncated"
        ):
            SuffixIndex.load(other, **IDENTITY)


WHOLE = SuffixIndex.build([[1, 2, 3] * 8, [4, 1, 2]])


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "index"
    WHOLE.save(path, **IDENTITY)
    return path.read_bytes()


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_damaged_files_raise_errors_of_speclm_or_can_be_searched(content, tmp_path_factory, data):
    damaged = bytearray(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    for _ in range(data.draw(st.integers(0, 4)) if damaged else 0):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(damaged)
    try:
        index = SuffixIndex.load(path, **IDENTITY)
    except SpeclmError:
        return
    for context in ([1, 2, 3] * 5, [4, 1, 2, 3], [0, 7]):
        match = index.find_longest(context)
        while match is not None:
            followers = index.followers(match)
            assert all(0 <= token < VOCAB for token, _ in followers)
            match = index.narrow(match, followers[0][0]) if followers else None
