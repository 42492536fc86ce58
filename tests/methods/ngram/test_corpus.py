import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from speclm.drafting.interface import Prefill
from speclm.errors import OptionError
from speclm.methods.ngram.corpus import CorpusSource, OutputHistory, vocabulary_fingerprint
from speclm.methods.ngram.suffix_index import MAX_MATCH, SuffixIndex


def prefill(*rows):
    """Return a prompt of rows of any lengths, padded on the left with token 1."""
    width = max(map(len, rows))
    padded = torch.tensor([[1] * (width - len(row)) + row for row in rows])
    return Prefill(
        tokens=padded[:, :-1],
        num_padding=torch.tensor([width - len(row) for row in rows]),
        first_tokens=padded[:, -1],
        temperature=0.0,
        max_new_tokens=64,
    )


class TestOutputHistory:
    def test_keeps_the_latest_outputs_within_its_bound(self):
        history = OutputHistory(max_tokens=100)
        for token in range(30):
            history.append([token] * 7)
        assert history.num_tokens == 98
        index = history.index()
        assert index.find([15]) is None
        assert index.find([16] * 7) is not None

        history.append(list(range(200)))
        assert history.num_tokens == 100
        history.append([])
        assert history.num_tokens == 100
        history.index()
        assert history.index().find([99, 100]) is None
        assert history.index().find([100, 101]) is not None

    def test_index_is_built_again_when_an_eighth_and_512_tokens_are_new(self):
        history = OutputHistory()
        history.append([1] * 512)
        empty = history.index()
        history.append([2])
        first = history.index()
        assert (len(empty), len(first)) == (0, 513)
        history.append([3] * (513 // 8 + 512))
        assert history.index() is first
        history.append([4])
        assert len(history.index()) == 513 + 513 // 8 + 513

    def test_forgets_everything_when_it_is_cleared(self):
        history = OutputHistory()
        history.append([1] * 600)
        assert len(history.index()) == 600
        history.clear()
        assert (history.num_tokens, len(history.index())) == (0, 0)

    def test_a_bound_of_0_switches_it_off(self):
        history = OutputHistory(max_tokens=0)
        history.append([1] * 600)
        assert (history.num_tokens, len(history.index())) == (0, 0)

    @pytest.mark.parametrize("bound", [-1, 1 << 25, 1.5])
    def test_bounds_out_of_range_are_refused(self, bound):
        with pytest.raises(OptionError, match="max_tokens is"):
            OutputHistory(max_tokens=bound)


class TestCorpusSource:
    def test_follows_the_longest_match_and_goes_on_past_it(self):
        source = CorpusSource(SuffixIndex.build([[1, 2, 3, 4, 5], [9, 2, 3, 6]]))
        source.begin(prefill([7, 1, 2], [9, 2]))
        state = source.root(0)
        for token in (3, 4, 5):
            ((found, _),) = source.candidates(state, None)
            assert found == token
            state = source.advance(state, token)
        assert source.candidates(state, None) == []
        state = source.advance(source.root(1), 3)
        assert [token for token, _ in source.candidates(state, None)] == [6]

    def test_a_token_that_did_not_follow_leaves_a_shorter_match(self):
        source = CorpusSource(SuffixIndex.build([[1, 2, 3], [2, 4, 5], [4, 6, 8]]))
        source.begin(prefill([1, 2]))
        state = source.advance(source.root(0), 4)
        assert [token for token, _ in source.candidates(state, None)] == [5]
        state = source.advance(state, 7)
        assert source.candidates(state, None) == []
        state = source.advance(source.advance(state, 4), 6)
        assert [token for token, _ in source.candidates(state, None)] == [8]

    def test_keys_are_of_match_length_and_agreement(self):
        text = [[1, 2, 3], [5, 6, 7], [5, 6, 7], [8, 9, 4], [8, 9, 4], [8, 9, 3]]
        source = CorpusSource(SuffixIndex.build([*text, list(range(20, 40))]))
        source.begin(prefill([1, 2], [5, 6], [8, 9], [20, 21, 22], list(range(20, 29))))
        found = [source.candidates(source.root(row), None) for row in range(5)]
        assert found == [[(3, 0)], [(7, 1)], [(4, 2), (3, 3)], [(23, 4)], [(29, 12)]]
        assert len(source.start_rates) == 16
        assert all(0 < rate < 1 for rate in source.start_rates)

    @settings(deadline=None, max_examples=50)
    @given(
        st.lists(st.lists(st.integers(0, 3), max_size=40), max_size=4),
        st.lists(st.lists(st.integers(0, 3), max_size=9), max_size=8),
        st.booleans(),
    )
    def test_root_is_the_longest_match_whatever_was_committed(self, texts, rounds, asks):
        index = SuffixIndex.build(texts)
        source = CorpusSource(index)
        source.begin(prefill([0, 1]))
        text = [0, 1]
        for emitted in rounds:
            source.commit(0, emitted)
            text += emitted
            if asks:
                source.root(0)
        state = source.root(0)
        assert (state is None) == (len(index) == 0)
        if state is not None:
            assert state == (index.find_longest(text[-MAX_MATCH:]), text[-MAX_MATCH:])

    def test_outputs_enter_the_history_when_the_next_generation_begins(self):
        history = OutputHistory(max_tokens=64)
        source = CorpusSource(history=history)
        source.begin(prefill([1, 2, 3, 4, 5, 6], [1, 9]))
        assert source.root(0) is None
        source.commit(0, [7, 8])
        source.commit(0, [9])
        assert history.num_tokens == 0
        source.begin(prefill([5, 6], [2, 3]))
        assert history.num_tokens == 7
        source.begin(prefill([5, 6], [2, 3]))
        assert history.num_tokens == 7
        history.append([0, 0, 0])
        source.begin(prefill([5, 6], [2, 3]))
        assert source.candidates(source.root(0), None) == [(7, 0)]
        assert source.candidates(source.root(1), None) == []

    def test_exactly_one_index_is_needed(self):
        for options in ({}, {"corpus": SuffixIndex.build([]), "history": OutputHistory()}):
            with pytest.raises(OptionError, match="both or none of corpus and history"):
                CorpusSource(**options)


def test_fingerprints_differ_where_vocabularies_do():
    first, same = LlamaConfig(vocab_size=9), LlamaConfig(vocab_size=9, num_hidden_layers=2)
    others = [LlamaConfig(vocab_size=8), LlamaConfig(vocab_size=9, eos_token_id=7)]
    assert vocabulary_fingerprint(first) == vocabulary_fingerprint(same)
    assert vocabulary_fingerprint(first) not in map(vocabulary_fingerprint, others)


def test_history_is_forgotten_with_the_last_output_and_a_corpus_stays():
    for source in (
        CorpusSource(history=OutputHistory(max_tokens=64)),
        CorpusSource(SuffixIndex.build([[5, 6, 7, 8]])),
    ):
        is_history = source._history is not None
        for _ in range(2):
            source.begin(prefill([1, 5, 6]))
            source.commit(0, [7, 8])
        source.forget()
        source.begin(prefill([1, 5, 6]))
        state = source.root(0)
        assert (state is None) == is_history
