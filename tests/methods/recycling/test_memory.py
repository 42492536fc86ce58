"""A memory against a plain dictionary that forgets the least recently used entries."""

import tracemalloc
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from speclm.errors import OptionError
from speclm.methods.recycling.memory import CandidateMemory

VOCAB = 6
LOG_PROB_TOLERANCE = 1e-3  # float16 keeps 11 bits


def candidates(seed, count, width=2, vocab=VOCAB):
    """Return ids and log-probabilities that a seed decides."""
    generator = np.random.default_rng(seed)
    ids = np.stack([generator.permutation(vocab)[:width] for _ in range(count)])
    return ids, -np.sort(generator.random((count, width)), axis=1)


class Model:
    """The same in Python: two dictionaries, one ordered by last use."""

    def __init__(self, max_pairs):
        self.max_pairs, self.tokens, self.pairs = max_pairs, {}, OrderedDict()

    def store(self, previous, tokens, ids):
        for before, token, row in zip(previous, tokens, ids.tolist(), strict=True):
            self.tokens[token] = row
            if before < 0 or not self.max_pairs:
                continue
            if (before, token) not in self.pairs and len(self.pairs) == self.max_pairs:
                for _ in range(max(self.max_pairs // 16, 1)):
                    self.pairs.popitem(last=False)
            self.pairs[before, token] = row
            self.pairs.move_to_end((before, token))

    def find(self, previous, token):
        if (previous, token) in self.pairs:
            self.pairs.move_to_end((previous, token))
            return 1, self.pairs[previous, token]
        return (0, self.tokens[token]) if token in self.tokens else None


def require_equal(memory, model):
    """Compare all that both know, without a trace in the order of use."""
    assert memory.num_tokens == len(model.tokens)
    keys = [before * VOCAB + token for before, token in model.pairs]
    assert memory._by_age().tolist() == keys
    rows = [memory._rows[key] for key in keys]
    assert memory._pair_ids[rows].tolist() == list(model.pairs.values())
    for token, row in model.tokens.items():
        assert memory._token_ids[token].tolist() == row


tokens_or_none = st.integers(-1, VOCAB - 1)
tokens = st.integers(0, VOCAB - 1)
steps = st.lists(
    st.one_of(
        st.lists(st.tuples(tokens_or_none, tokens), max_size=6),  # a store
        st.tuples(tokens_or_none, tokens),  # a look-up
    ),
    max_size=25,
)


@given(steps, st.sampled_from([0, 1, 3, 20, 40]))
def test_memory_knows_what_a_dictionary_with_least_recent_eviction_knows(steps, max_pairs):
    memory = CandidateMemory(vocab_size=VOCAB, num_candidates=2, max_pairs=max_pairs)
    model, hits = Model(max_pairs), [0, 0, 0]
    for seed, step in enumerate(steps):
        if isinstance(step, list):
            previous, last = [before for before, _ in step], [token for _, token in step]
            ids, log_probs = candidates(seed, len(step)) if step else (np.zeros((0, 2), int),) * 2
            memory.store(previous, last, ids, log_probs.astype(np.float32))
            model.store(previous, last, ids)
        else:
            found, expected = memory.find(*step), model.find(*step)
            assert (found and found[:2]) == expected
            hits[2 if found is None else found[0]] += 1
        require_equal(memory, model)
    assert memory.num_lookups == sum(hits)
    assert memory.num_hits == (hits[0], hits[1])


def test_log_probabilities_come_back_and_impossible_ones_become_the_nearest():
    memory = CandidateMemory(vocab_size=9, num_candidates=4)
    given_log_probs = np.array([[1e-7, -0.5, -np.inf, np.nan]], np.float32)
    memory.store([-1], [3], np.array([[1, 2, 3, 4]]), given_log_probs)
    order, ids, log_probs = memory.find(8, 3)
    assert (order, ids) == (0, [1, 2, 3, 4])
    assert log_probs == [0.0, -0.5, -60000.0, -60000.0]


def test_of_pairs_in_a_merge_the_others_are_the_older_ones():
    mine, other = (CandidateMemory(vocab_size=50, num_candidates=2, max_pairs=6) for _ in "ab")
    old, new = np.array([[1, 2]]), np.array([[3, 4]])
    scores = np.full((1, 2), -1.0, np.float32)
    for token in range(5):
        other.store([token], [token + 1], old, scores)
    for token in range(3, 6):
        mine.store([token], [token + 1], new, scores)
    mine.merge(other)  # (3, 4), (4, 5) are known, and of the others there is room for three
    assert [divmod(key, 50) for key in mine._by_age()] == [
        *((0, 1), (1, 2), (2, 3)),
        *((3, 4), (4, 5), (5, 6)),
    ]
    assert mine.find(3, 4)[1] == [3, 4]
    assert mine.find(2, 3)[1] == [1, 2]
    assert mine.find(-1, 1)[1] == [1, 2]
    mine.store([9, 9], [9, 8], np.array([[7, 8], [7, 8]]), np.repeat(scores, 2, axis=0))
    assert mine.find(0, 1)[0] == mine.find(1, 2)[0] == 0  # the least recent
    assert other.num_pairs == 5
    first = CandidateMemory(vocab_size=50, num_candidates=2, max_pairs=2)
    first.merge(mine)
    assert first._by_age().tolist() == mine._by_age()[-2:].tolist()
    assert first.has_changed


def test_clearing_forgets_all_but_the_counts():
    memory = CandidateMemory(vocab_size=VOCAB, num_candidates=2)
    memory.clear()
    assert not memory.has_changed
    memory.store([1], [2], *candidates(0, 1))
    memory.find(1, 2)
    memory.clear()
    assert memory.find(1, 2) is None
    assert (memory.num_tokens, memory.num_pairs, memory.num_lookups) == (0, 0, 2)
    assert memory.has_changed


def filled(*, max_pairs=40):
    memory = CandidateMemory(vocab_size=VOCAB, num_candidates=2, max_pairs=max_pairs)
    previous, last = np.random.default_rng(0).integers(0, VOCAB - 1, (2, 30)).tolist()
    memory.store(previous, last, *candidates(7, 30))
    memory.find(previous[0], last[0])
    return memory


def test_a_saved_memory_comes_back_with_its_order_of_use(tmp_path):
    path, memory = tmp_path / "memory.safetensors", filled()
    assert memory.has_changed
    memory.save(path, fingerprint="f")
    found = CandidateMemory.load(path, vocab_size=VOCAB, fingerprint="f")
    assert not found.has_changed
    assert not memory.has_changed
    assert found._by_age().tolist() == memory._by_age().tolist()
    for previous in range(-1, VOCAB):
        for token in range(VOCAB):
            assert found.find(previous, token) == memory.find(previous, token)
    few = CandidateMemory.load(path, vocab_size=VOCAB, fingerprint="f", max_pairs=3)
    again = filled()
    assert few._by_age().tolist() == again._by_age()[-3:].tolist()
    none = CandidateMemory.load(path, vocab_size=VOCAB, fingerprint="f", max_pairs=0)
    assert (none.num_pairs, none.num_tokens) == (0, memory.num_tokens)
    empty = CandidateMemory(vocab_size=VOCAB)
    empty.save(path, fingerprint="f")
    assert CandidateMemory.load(path, vocab_size=VOCAB, fingerprint="f").num_pairs == 0


def test_a_vocabulary_smaller_than_the_candidates_bounds_them():
    assert CandidateMemory(vocab_size=3).num_candidates == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_pairs": -1}, "max_pairs is -1, expected 0"),
        ({"max_pairs": "many"}, "max_pairs is 'many', a str, expected a whole number"),
        ({"num_candidates": 0}, "num_candidates is 0, expected 1"),
        ({"vocab_size": 0}, "vocab_size is 0, expected at least 1"),
    ],
)
def test_numbers_out_of_range_are_named(options, message, tmp_path):
    with pytest.raises(OptionError, match=message):
        CandidateMemory(**{"vocab_size": VOCAB, **options})
    if "max_pairs" in options:
        with pytest.raises(OptionError, match=message):
            CandidateMemory.load(tmp_path, vocab_size=VOCAB, fingerprint="", **options)


def test_sizes_that_do_not_agree_are_refused():
    memory = CandidateMemory(vocab_size=VOCAB, num_candidates=2)
    ids, log_probs = candidates(0, 2)
    for previous, last in (([1], [2, 3]), ([1], [2])):
        with pytest.raises(OptionError, match=r"ids are \(2, 2\) .* pass num_candidates"):
            memory.store(previous, last, ids, log_probs)
    for other in ({"vocab_size": 7}, {"vocab_size": VOCAB, "num_candidates": 3}):
        with pytest.raises(OptionError, match="merge memories of one model"):
            memory.merge(CandidateMemory(**other))


def test_pairs_and_single_tokens_take_few_bytes_which_are_counted():
    vocab, count = 152_064, 10_000
    tracemalloc.start()
    try:
        memory = CandidateMemory(vocab_size=vocab, max_pairs=count)
        singles = tracemalloc.get_traced_memory()[0]
        ids, log_probs = candidates(0, 50, width=8, vocab=64)
        for start in range(0, 2 * count, 50):  # evicts often
            last = list(range(start + 1, start + 51))
            memory.store([token * 7919 % vocab for token in last], last, ids, log_probs)
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert memory.num_pairs > 0.9 * count
    assert singles < 10e6
    assert taken - singles < 200 * count  # 20 MB of 100,000
    assert 0.9 * taken < memory.num_bytes < 1.1 * taken
