import copy
import gc
import os
import pickle

import numpy as np
import pytest
import torch

from speclm.drafting.interface import Prefill
from speclm.errors import OptionError
from speclm.methods.lookup.proposer import LookupProposer
from speclm.methods.recycling.proposer import RecyclingProposer
from speclm.methods.recycling.source import RecyclingSource
from tests.models import shared_model


def source(memory="model", *, temperature: float = 0.0, **options) -> RecyclingSource:
    made = RecyclingSource(shared_model("llama"), memory=memory, **{"max_pairs": 100, **options})
    begin(made, temperature)
    return made


def begin(made: RecyclingSource, temperature: float = 0.0) -> None:
    made.begin(
        Prefill(
            tokens=torch.tensor([[3, 4]]),
            num_padding=torch.tensor([0]),
            first_tokens=torch.tensor([5]),
            temperature=temperature,
            max_new_tokens=9,
        )
    )


def observe(made, previous, token, ids, probs, *, is_rejected=False) -> None:
    width = made.num_observed
    ids = [*ids, *(i for i in range(20, 40) if i not in ids)][:width]
    probs = [*probs, *[1e-4] * width][:width]
    made.observe(
        [previous],
        [token],
        np.array([ids]),
        np.log(np.array([probs], dtype=np.float32)),
        num_rejected=int(is_rejected),
    )


def tokens(made: RecyclingSource, *state: int, noise=None) -> list[int]:
    return [token for token, _ in made.candidates(state, noise)]


def test_nothing_is_known_at_first():
    made = source()
    assert made.root(0) == (4, 5)
    assert made.candidates(made.root(0), None) == []


def test_pair_decides_where_it_is_known_and_the_token_elsewhere():
    made = source()
    observe(made, 4, 5, [7, 8], [0.9, 0.05])
    observe(made, 6, 5, [9, 7], [0.6, 0.2])
    assert tokens(made, 4, 5)[:2] == [7, 8]
    assert tokens(made, 11, 5)[:2] == [9, 7]
    by_pair, by_token = made.candidates((4, 5), None)[0], made.candidates((11, 5), None)[0]
    assert made.start_rates[by_pair[1]] > made.start_rates[by_token[1]]


def test_state_follows_the_tree_and_the_emitted_tokens():
    made = source()
    assert made.advance(made.root(0), 8) == (5, 8)
    made.commit(0, [6, 7])
    assert made.root(0) == (6, 7)
    made.commit(0, [])
    assert made.root(0) == (6, 7)
    made.commit(0, [8])
    assert made.root(0) == (7, 8)


def test_rejected_nodes_fill_gaps_and_do_not_replace_what_is_known():
    made = source()
    observe(made, 4, 5, [7], [0.9], is_rejected=True)
    assert tokens(made, 4, 5)[0] == 7
    observe(made, 4, 5, [8], [0.9], is_rejected=True)
    assert tokens(made, 4, 5)[0] == 7
    observe(made, 4, 5, [9], [0.9])
    assert tokens(made, 4, 5)[0] == 9


def test_noise_ranks_the_candidates_of_a_sampling_target():
    made = source(temperature=1.0)
    observe(made, 4, 5, [7, 8], [0.5, 0.4])
    noise = np.ones(made.memory.vocab_size, dtype=np.float32)
    assert tokens(made, 4, 5, noise=noise)[:2] == [7, 8]
    noise[8] = 0.1
    assert tokens(made, 4, 5, noise=noise)[:2] == [8, 7]
    noise[7] = 1e-3
    assert tokens(made, 4, 5, noise=noise)[:2] == [7, 8]


def test_low_temperature_outweighs_the_noise():
    made = source(temperature=0.1)
    observe(made, 4, 5, [7, 8], [0.6, 0.2])
    noise = np.ones(made.memory.vocab_size, dtype=np.float32)
    noise[8] = 0.1
    assert tokens(made, 4, 5, noise=noise)[0] == 7


def test_candidates_that_are_all_but_impossible_are_left_out():
    made = source(temperature=0.01)  # their probabilities underflow
    observe(made, 4, 5, [7, 8], [0.6, 0.2])
    noise = np.ones(made.memory.vocab_size, dtype=np.float32)
    assert tokens(made, 4, 5, noise=noise) == [7]


def test_memory_outlives_a_call_unless_it_is_asked_not_to():
    kept, cleared = source("model"), source("call")
    for made in (kept, cleared):
        observe(made, 4, 5, [7], [0.9])
        begin(made)
    assert tokens(kept, 4, 5)[0] == 7
    assert tokens(cleared, 4, 5) == []


def test_memory_is_described_with_its_size_and_hits():
    made = source()
    observe(made, 4, 5, [7], [0.9])
    tokens(made, 4, 5), tokens(made, 3, 5), tokens(made, 3, 3), tokens(made, 3, 3)
    text = made.describe()
    assert "memory of 1 tokens and 1 pairs" in text
    assert "25% of look-ups found by the pair, 25% by the token" in text


def copied(made: RecyclingSource) -> RecyclingSource:
    return copy.deepcopy(made)


def pickled(made: RecyclingSource) -> RecyclingSource:
    return pickle.loads(pickle.dumps(made))


@pytest.mark.parametrize("same", [lambda made: made, copied, pickled])
def test_file_is_written_when_a_source_or_a_copy_of_it_is_dropped(same, tmp_path):
    made = same(source(tmp_path / "memory"))
    observe(made, 4, 5, [7], [0.9])
    del made
    gc.collect()
    assert tokens(source(tmp_path / "memory"), 4, 5)[0] == 7


def test_copy_that_another_program_received_writes_the_file(tmp_path, monkeypatch):
    sent = pickle.dumps(source(tmp_path / "memory"))
    monkeypatch.setattr(os, "getpid", lambda: -1)
    received = pickle.loads(sent)
    observe(received, 4, 5, [7], [0.9])
    del received
    gc.collect()
    assert (tmp_path / "memory").exists()


@pytest.mark.parametrize("wrong", ["", 3, None])
def test_memory_of_another_kind_is_an_option_error(wrong, monkeypatch):
    import jaxtyping

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    with pytest.raises(OptionError, match="expected 'model', 'call' or the path of a file"):
        source(wrong)


def test_number_of_pairs_out_of_range_is_an_option_error():
    with pytest.raises(OptionError, match="max_pairs is -1"):
        source(max_pairs=-1)


def test_forgotten_memory_is_empty_and_that_of_a_file_as_it_was_read(tmp_path):
    first = source(tmp_path / "memory")
    observe(first, 4, 5, [7], [0.9])
    del first
    gc.collect()
    for made, left in ((source(), []), (source(tmp_path / "memory"), [7])):
        observe(made, 4, 5, [8], [0.9])
        observe(made, 3, 6, [9], [0.9])
        made.forget()
        assert tokens(made, 4, 5)[:1] == left
        assert tokens(made, 3, 6) == []


class TestMemoryProposer:
    def test_saved_memory_is_read_by_the_option_memory(self, tmp_path):
        base = shared_model("llama")
        for kind in (RecyclingProposer, LookupProposer):
            proposer = kind(base, memory=tmp_path / "own")
            proposer.memory.store([4], [5], *candidates(proposer.memory))
            proposer.save_memory(tmp_path / "saved")
            assert proposer.memory.has_changed  # and is still written into its own file
            again = kind(base, memory=tmp_path / "saved").memory
            assert again.find(4, 5) == proposer.memory.find(4, 5)

    def test_path_that_cannot_be_written_is_an_option_error(self, tmp_path, monkeypatch):
        import jaxtyping

        monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
        proposer = RecyclingProposer(shared_model("llama"))
        for path, message in (
            (tmp_path / "no such folder" / "memory", "cannot be written"),
            (None, "path is None, expected the path of a file"),
        ):
            with pytest.raises(OptionError, match=message):
                proposer.save_memory(path)


def candidates(memory) -> tuple[np.ndarray, np.ndarray]:
    width = memory.num_candidates
    return np.arange(width)[None], np.full((1, width), -2.0)
