import json
from functools import partial

import pytest
import torch

from speclm import SpecModel
from speclm.adaptive import memory as timing
from speclm.adaptive.memory import (
    MAX_RATIO,
    SIZES,
    Memory,
    bucket_of_context,
    bucket_of_rows,
    find_timings,
    forward_timings,
    keep_timings,
    measure_forwards,
    timings_digest,
)
from speclm.methods.eagle.proposer import EagleProposer
from speclm.self_check.fingerprint import Fingerprint, fingerprint
from speclm.target import Session, TargetView
from speclm.target.session import TreeSession
from tests.models import build_model, prompts
from tests.proposers import random_eagle

TIMINGS = ((1, 0.25), (2, 0.5))


class FakeSession(Session):
    """Takes a given time for a size, more the first time, and wants its nodes dropped."""

    needs_lockstep, num_cached, merges_prompt = False, 0, True

    def __init__(self, seconds):
        self.now, self.seen, self.pending, self.seconds = 0.0, [], 0, seconds

    def verify(self, tokens, topology, *, prompt=None, max_length=None):
        assert self.pending == 0
        size = tokens.shape[1]
        assert topology.max_depth == min(size - 1, 1)
        self.now += self.seconds(size) + (1.0 if size not in self.seen else 0.0)
        self.seen.append(size)
        self.pending = size
        return torch.zeros(*tokens.shape, 3)

    def keep(self, paths):
        assert paths == [[], []]
        self.pending = 0

    def prefill(self, tokens):
        raise NotImplementedError

    def hand_over(self, into, sequences):
        raise NotImplementedError

    def abandon(self):
        raise NotImplementedError


def measure(seconds):
    session = FakeSession(seconds)
    roots = torch.tensor([1, 2])
    return measure_forwards(session, roots, max_length=9, clock=lambda: session.now), session


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECLM_CACHE", str(tmp_path))
    monkeypatch.setattr(timing, "_IN_MEMORY", {})
    return tmp_path


def digest_of(digest="d", *, batch=1, context=5):
    model = Fingerprint(digest, (), is_lasting=True)
    return timings_digest(model, batch=batch, context=context)


find, keep = (partial(call, is_lasting=True) for call in (find_timings, keep_timings))


def test_records_are_recalled_until_the_proposer_changes_or_many_others_came():
    memory = Memory()
    for proposer in ("a", "b"):
        memory.begin_call(proposer)
        assert memory.recall("key", list) == []
        memory.recall("key", list).append(1)
        memory.begin_call(proposer)
        assert memory.recall("key", list) == [1]
    for other in range(200):
        memory.recall(other, list)
    assert memory.recall("key", list) == []


def test_the_best_of_several_forwards_counts():
    timings, session = measure(lambda size: 0.01 + 0.001 * size)

    assert [size for size, _ in timings] == list(SIZES)
    assert [seconds for _, seconds in timings] == pytest.approx([0.01 + 0.001 * n for n in SIZES])
    assert session.pending == 0


def test_sizes_end_where_no_larger_tree_can_pay():
    timings, _ = measure(lambda size: 0.01 * size)

    assert timings[-1][1] > MAX_RATIO * timings[0][1]
    assert timings[-2][1] <= MAX_RATIO * timings[0][1]


def test_more_nodes_never_take_less():
    timings, _ = measure(lambda size: 0.01 if size != 5 else 0.02)

    assert [seconds for size, seconds in timings if size >= 5] == pytest.approx([0.02] * 7)


def test_long_forwards_are_not_repeated():
    _, session = measure(lambda size: 1.0)

    assert [session.seen.count(size) for size in SIZES] == [2] * len(SIZES)


def test_a_generation_goes_on_as_if_nothing_had_been_measured(empty_cache):
    view = TargetView(build_model("llama"))  # of its own: others may change what names the kind
    inputs = prompts(9, 4)
    mask = inputs["attention_mask"]
    cache = view.new_cache((1 - mask).sum(1))
    session = TreeSession(view, cache, attention_mask=mask)
    kind = fingerprint(view)
    with torch.no_grad(), view.decoding():
        session.prefill(inputs["input_ids"])
        session.keep([[0], [0]])
        lengths = list(cache.host_lengths)

        roots = torch.tensor([3, 4])
        found = forward_timings(kind, session, roots, context=9, max_length=40)
        again = forward_timings(kind, session, roots, context=9, max_length=40)

    assert found == again
    assert found[0][0] == 1
    assert cache.host_lengths == lengths
    assert cache.num_pending == 0
    assert len(list((empty_cache / "timings").iterdir())) == 1


def test_timings_are_kept_where_a_proposer_reads_features(empty_cache):
    base = build_model("llama")
    model = SpecModel(base, EagleProposer(random_eagle(base), target=base), tree="auto")

    model.generate(**prompts(9, 4), max_new_tokens=8, do_sample=False)

    assert len(list((empty_cache / "timings").iterdir())) == 1


def test_timings_are_kept_for_other_processes(empty_cache, monkeypatch):
    keep(digest_of(), TIMINGS)
    monkeypatch.setattr(timing, "_IN_MEMORY", {})

    assert find(digest_of()) == TIMINGS
    assert find(digest_of("other")) is None


def test_timings_belong_to_rows_context_and_threads(empty_cache):
    keep(digest_of(batch=3, context=5), TIMINGS)

    assert find(digest_of(batch=4, context=100)) == TIMINGS
    assert find(digest_of(batch=5, context=5)) is None
    assert find(digest_of(batch=3, context=600)) is None
    assert [bucket_of_rows(rows) for rows in (0, 1, 2, 3, 4, 5, 16)] == [0, 0, 1, 2, 2, 3, 4]
    assert [bucket_of_context(size) for size in (0, 511, 512, 1024, 5000)] == [0, 0, 1, 2, 4]


@pytest.mark.parametrize("damage", ["{", '{"timings": [[1, 2.0]], "checksum": "no"}', "[]"])
def test_damaged_files_are_ignored(damage, empty_cache, monkeypatch, caplog):
    keep(digest_of(), TIMINGS)
    (path,) = (empty_cache / "timings").iterdir()
    assert json.loads(path.read_text())["timings"] == [[1, 0.25], [2, 0.5]]
    path.write_text(damage)
    monkeypatch.setattr(timing, "_IN_MEMORY", {})

    with caplog.at_level("DEBUG", logger="speclm"):
        assert find(digest_of()) is None
    assert "ignoring the timings" in caplog.text


def test_nothing_is_written_where_nothing_is_to_be_kept(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(timing, "_IN_MEMORY", {})
    monkeypatch.setenv("SPECLM_CACHE", "")
    keep(digest_of(), TIMINGS)
    assert find(digest_of()) == TIMINGS  # in this process

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPECLM_CACHE", str(tmp_path / "file"))
    with caplog.at_level("DEBUG", logger="speclm"):
        keep(digest_of(), TIMINGS)
    assert "not keeping timings" in caplog.text
