import copy
import logging
import pickle

import pytest
import torch

from speclm.drafting.combined import CombinedProposer
from speclm.methods.medusa.proposer import MedusaProposer
from speclm.methods.medusa.training import new_medusa_heads
from speclm.methods.ngram.proposer import NgramProposer
from speclm.model.misses import FEWEST_DRAFTS, ROUNDS_BEFORE_WARNING, MissWatch
from speclm.model.spec_model import SpecModel
from speclm.stats import RowStats, SpeculationStats
from speclm.target import TargetView
from speclm.testing import ScriptedProposer
from tests.models import prompts, shared_model


@pytest.fixture(scope="module")
def base():
    return shared_model("llama", 0)


def heads(base, value=0.5):
    made = new_medusa_heads(base, num_heads=2)
    with torch.no_grad():
        for weight in made.parameters():
            weight.fill_(value)
    return MedusaProposer(made, target=base)


def call(accepted_lengths, *, depth=2, rows=1):
    """Return the counters of a call whose drafts all had one depth."""
    stats = SpeculationStats([RowStats() for _ in range(rows)], len(accepted_lengths))
    for row in stats.rows:
        for length in accepted_lengths:
            row.add_round(accepted_length=length, depth=depth, num_draft_tokens=depth)
    return stats


def look(watch, proposer, stats, base):
    watch.look(proposer, stats, target=TargetView(base))


HALF = [0] * (ROUNDS_BEFORE_WARNING // 2)


def test_one_warning_after_many_misses_over_calls_and_rows(base, caplog):
    watch, proposer = MissWatch(), heads(base)
    look(watch, proposer, call(HALF), base)
    assert caplog.records == []
    look(watch, proposer, call(HALF[: len(HALF) // 2], rows=2), base)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("speclm", logging.WARNING)
    message = record.getMessage()
    assert f"in the last {ROUNDS_BEFORE_WARNING} rounds" in message
    assert "accepted no token of MedusaProposer" in message
    for word in ("this very base", "tokenizer and vocabulary", "layer ids", "dtype"):
        assert word in message
    assert "weight" not in message
    look(watch, proposer, call(HALF * 2), base)
    assert len(caplog.records) == 1


def test_paused_drafts_are_noticed_too(base, caplog):
    watch, proposer = MissWatch(), heads(base)
    for _ in range(FEWEST_DRAFTS):
        assert caplog.records == []
        stats = call([0])
        stats.rounds = ROUNDS_BEFORE_WARNING // FEWEST_DRAFTS + 1
        look(watch, proposer, stats, base)
    assert len(caplog.records) == 1


def test_accepted_token_begins_the_count_anew(base, caplog):
    watch, proposer = MissWatch(), heads(base)
    for stats in (call(HALF), call([1, *HALF]), call(HALF)):
        look(watch, proposer, stats, base)
    assert caplog.records == []


def test_rounds_without_a_draft_do_not_count(base, caplog):
    look(MissWatch(), heads(base), call(HALF * 3, depth=0), base)
    assert caplog.records == []


def test_each_proposer_has_its_own_count_and_warning(base, caplog):
    watch, first, second = MissWatch(), heads(base), heads(base)
    for proposer in (first, second, first, second, first, second):
        look(watch, proposer, call(HALF), base)
    assert len(caplog.records) == 2


@pytest.mark.parametrize(
    ("value", "words"), [(float("nan"), "not finite"), (0.0, "is all zero, as if it was not")]
)
def test_weights_that_cannot_be_meant_so_are_named(base, caplog, value, words):
    look(MissWatch(), heads(base, value), call(HALF * 2), base)
    assert f"its weight 'weight' {'is all' if value == 0 else 'holds'}" in caplog.text
    assert words in caplog.text


def test_proposers_without_weights_may_have_nothing_to_copy(base, caplog):
    watch = MissWatch()
    for proposer in (None, NgramProposer(), ScriptedProposer([[1]])):
        look(watch, proposer, call(HALF * 2), base)
    assert caplog.records == []
    look(watch, CombinedProposer([NgramProposer(), heads(base)]), call(HALF * 2), base)
    assert len(caplog.records) == 1


def test_watch_keeps_no_proposer_alive_and_is_copied_empty(base):
    watch = MissWatch()
    look(watch, NgramProposer(), call(HALF), base)
    assert watch._tallies[0].proposer() is None
    assert copy.deepcopy(watch)._tallies == pickle.loads(pickle.dumps(watch))._tallies == []


def test_weights_are_looked_at_once_where_nothing_is_drafted(base, caplog, monkeypatch):
    watch, looks = MissWatch(), []
    monkeypatch.setattr("speclm.model.misses._bad_weights", lambda _: iter(looks.append(1) or []))
    proposer = heads(base)
    for _ in range(3):
        look(watch, proposer, call(HALF * 2, depth=0), base)
    assert (looks, caplog.records) == ([1], [])


@pytest.mark.parametrize("is_silent", [False, True])
def test_generate_warns_of_heads_that_never_hit(base, caplog, monkeypatch, is_silent):
    monkeypatch.setattr("speclm.model.misses.ROUNDS_BEFORE_WARNING", 15)
    inputs, options = prompts(3), {"do_sample": False, "max_new_tokens": 12}
    proposer = heads(base, float("nan"))  # drafts nothing at all
    if not is_silent:
        tokens = base.generate(**inputs, **options)[:, 3:].tolist()
        proposer = ScriptedProposer(tokens, wrong_at=range(12))
        proposer.network = torch.nn.Linear(2, 2)
    spec = SpecModel(base, proposer)
    for _ in range(3):
        spec.generate(**inputs, **options)
    assert bool(spec.last_speculation.acceptance_by_depth) != is_silent
    assert caplog.text.count(f"accepted no token of {type(proposer).__name__}") == 1
