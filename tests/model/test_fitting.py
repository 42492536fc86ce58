"""A proposer has to fit its base, and is watched for drafts that never hit."""

import copy
import logging
import pickle

import jaxtyping
import pytest
import torch

from speclm import SpecModel
from speclm.drafting.combined import CombinedProposer
from speclm.errors import OptionError, SpeclmError, VocabularyMismatchError
from speclm.methods.draft_model.proposer import DraftModelProposer
from speclm.methods.medusa.network import MedusaHeads, MedusaHeadsConfig
from speclm.methods.medusa.proposer import MedusaProposer
from speclm.methods.medusa.training import new_medusa_heads
from speclm.methods.ngram.proposer import NgramProposer
from speclm.model.fitting import FEWEST_DRAFTS, ROUNDS_BEFORE_WARNING, MissWatch
from speclm.stats import RowStats, SpeculationStats
from speclm.target import TargetView
from speclm.testing import ScriptedProposer
from tests.models import VOCAB_SIZE, build_model, generate, prompts, shared_model

SETTINGS = {"max_new_tokens": 8, "do_sample": False}


def medusa(base, *, has_own_lm_head=False, **options):
    config = MedusaHeadsConfig(
        hidden_size=base.config.hidden_size,
        vocab_size=base.config.vocab_size,
        num_heads=2,
        has_own_lm_head=has_own_lm_head,
    )
    return MedusaProposer(MedusaHeads(config), target=base, **options)


def small_vocabulary():
    return build_model("llama", vocab_size=96)


def narrow():
    return build_model("llama", hidden_size=24)


CASES = {
    "draft model": (
        lambda: DraftModelProposer(small_vocabulary(), target=small_vocabulary()),
        VocabularyMismatchError,
        rf"DraftModelProposer.*vocabulary of 96, the base \w+ has one of {VOCAB_SIZE}.*target=base",
    ),
    "vocabulary of heads": (
        lambda: medusa(small_vocabulary(), has_own_lm_head=True),
        VocabularyMismatchError,
        rf"MedusaProposer.*vocabulary of 96, the base \w+ has one of {VOCAB_SIZE}.*target=base",
    ),
    "width of heads": (
        lambda: medusa(narrow(), has_own_lm_head=True),
        OptionError,
        r"hidden states 24 wide, those of the base \w+ are 40 wide.*target=base",
    ),
    "output matrix of another model": (
        lambda: medusa(build_model("llama", seed=5)),
        OptionError,
        r"MedusaProposer uses the output matrix of another model.*LlamaForCausalLM.*target=base",
    ),
    "part of a joined proposer": (
        lambda: CombinedProposer([NgramProposer(), CombinedProposer([medusa(narrow())])]),
        OptionError,
        "MedusaProposer was built for hidden states 24 wide",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_proposer_of_another_base_is_refused_where_a_model_is_given_it(case):
    build, error, words = CASES[case]
    base, proposer = shared_model("llama"), build()
    with pytest.raises(error, match=words) as caught:
        SpecModel(base, proposer)
    assert isinstance(caught.value, SpeclmError)
    with pytest.raises(error, match=words):
        SpecModel.from_pretrained(base, proposer)
    spec = SpecModel(base, None)
    with pytest.raises(error, match=words):
        spec.proposer = proposer
    assert spec.proposer is None


@pytest.mark.parametrize("wrong", [3, NgramProposer])
def test_what_is_no_proposer_is_refused(wrong, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    spec = SpecModel(shared_model("llama"), None)
    with pytest.raises(OptionError, match="expected a Proposer or None"):
        SpecModel(spec.base, wrong)
    with pytest.raises(OptionError, match="expected a Proposer or None"):
        spec.proposer = wrong


@pytest.mark.parametrize("build", [medusa, lambda base: medusa(base, has_own_lm_head=True)])
def test_copies_of_a_whole_model_fit_themselves(build):
    base = build_model("llama")
    spec = copy.deepcopy(SpecModel(base, build(base)))
    assert spec.base is not base
    spec.proposer = spec.proposer
    expected = generate(base, prompts(6), **SETTINGS)[0]
    assert torch.equal(generate(spec, prompts(6), **SETTINGS)[0], expected)


def test_heads_with_a_matrix_of_their_own_fit_any_base_of_their_size():
    base = shared_model("llama")
    spec = SpecModel(base, medusa(build_model("llama", seed=5), has_own_lm_head=True))
    expected = generate(base, prompts(6), **SETTINGS)[0]
    assert torch.equal(generate(spec, prompts(6), **SETTINGS)[0], expected)


def resized_draft(base):
    return DraftModelProposer(build_model("llama", seed=7), target=base)


@pytest.mark.parametrize("build", [resized_draft, medusa])
@pytest.mark.parametrize("sampled", [False, True])
def test_calls_after_the_embeddings_were_resized_use_regular_generation(build, sampled, caplog):
    base = build_model("llama")
    spec = SpecModel(base, CombinedProposer([NgramProposer(), build(base)]))
    base.resize_token_embeddings(VOCAB_SIZE + 10, mean_resizing=False)
    settings = {**SETTINGS, "do_sample": sampled}
    expected, state = generate(base, prompts(6), **settings)
    found, state_found = generate(spec, prompts(6), **settings)
    assert torch.equal(found, expected)
    assert torch.equal(state_found, state)
    (reason,) = spec.last_speculation.fallbacks
    assert "built for a vocabulary of 160" in reason
    assert "170" in reason
    assert reason in caplog.text


def test_ngrams_go_on_after_the_embeddings_were_resized():
    base = build_model("llama")
    spec = SpecModel(base, NgramProposer())
    base.resize_token_embeddings(VOCAB_SIZE + 10, mean_resizing=False)
    expected = generate(base, prompts(6), do_sample=True, max_new_tokens=8)[0]
    assert torch.equal(generate(spec, prompts(6), do_sample=True, max_new_tokens=8)[0], expected)
    assert spec.last_speculation.fallbacks == []


@pytest.mark.parametrize("num_tokens", [VOCAB_SIZE - 10, VOCAB_SIZE + 10])
def test_a_draft_model_whose_embeddings_were_resized_goes_on(num_tokens):
    base, draft = build_model("llama"), build_model("llama", seed=7)
    spec = SpecModel(base, DraftModelProposer(draft, target=base))
    draft.resize_token_embeddings(num_tokens, mean_resizing=False)
    expected = generate(base, prompts(6), do_sample=True, max_new_tokens=8)[0]
    assert torch.equal(generate(spec, prompts(6), do_sample=True, max_new_tokens=8)[0], expected)
    assert spec.last_speculation.fallbacks == []


@pytest.fixture(scope="module")
def base():
    return shared_model("llama", 0)


def filled_heads(base, value=0.5):
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
    watch, proposer = MissWatch(), filled_heads(base)
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
    watch, proposer = MissWatch(), filled_heads(base)
    for _ in range(FEWEST_DRAFTS):
        assert caplog.records == []
        stats = call([0])
        stats.rounds = ROUNDS_BEFORE_WARNING // FEWEST_DRAFTS + 1
        look(watch, proposer, stats, base)
    assert len(caplog.records) == 1


def test_accepted_token_begins_the_count_anew(base, caplog):
    watch, proposer = MissWatch(), filled_heads(base)
    for stats in (call(HALF), call([1, *HALF]), call(HALF)):
        look(watch, proposer, stats, base)
    assert caplog.records == []


def test_rounds_without_a_draft_do_not_count(base, caplog):
    look(MissWatch(), filled_heads(base), call(HALF * 3, depth=0), base)
    assert caplog.records == []


def test_each_proposer_has_its_own_count_and_warning(base, caplog):
    watch, first, second = MissWatch(), filled_heads(base), filled_heads(base)
    for proposer in (first, second, first, second, first, second):
        look(watch, proposer, call(HALF), base)
    assert len(caplog.records) == 2


@pytest.mark.parametrize(
    ("value", "words"), [(float("nan"), "not finite"), (0.0, "is all zero, as if it was not")]
)
def test_weights_that_cannot_be_right_are_named(base, caplog, value, words):
    look(MissWatch(), filled_heads(base, value), call(HALF * 2), base)
    assert f"its weight 'weight' {'is all' if value == 0 else 'holds'}" in caplog.text
    assert words in caplog.text


def test_proposers_without_weights_may_have_nothing_to_copy(base, caplog):
    watch = MissWatch()
    for proposer in (None, NgramProposer(), ScriptedProposer([[1]])):
        look(watch, proposer, call(HALF * 2), base)
    assert caplog.records == []
    look(watch, CombinedProposer([NgramProposer(), filled_heads(base)]), call(HALF * 2), base)
    assert len(caplog.records) == 1


def test_watch_keeps_no_proposer_alive_and_is_copied_empty(base):
    watch = MissWatch()
    look(watch, NgramProposer(), call(HALF), base)
    assert watch._tallies[0].proposer() is None
    assert copy.deepcopy(watch)._tallies == pickle.loads(pickle.dumps(watch))._tallies == []


def test_weights_are_looked_at_once_where_nothing_is_drafted(base, caplog, monkeypatch):
    watch, looks = MissWatch(), []
    monkeypatch.setattr("speclm.model.fitting._bad_weights", lambda _: iter(looks.append(1) or []))
    proposer = filled_heads(base)
    for _ in range(3):
        look(watch, proposer, call(HALF * 2, depth=0), base)
    assert (looks, caplog.records) == ([1], [])


@pytest.mark.parametrize("is_silent", [False, True])
def test_generate_warns_of_heads_that_never_hit(base, caplog, monkeypatch, is_silent):
    monkeypatch.setattr("speclm.model.fitting.ROUNDS_BEFORE_WARNING", 15)
    inputs, options = prompts(3), {"do_sample": False, "max_new_tokens": 12}
    proposer = filled_heads(base, float("nan"))  # drafts nothing at all
    if not is_silent:
        tokens = base.generate(**inputs, **options)[:, 3:].tolist()
        proposer = ScriptedProposer(tokens, wrong_at=range(12))
        proposer.network = torch.nn.Linear(2, 2)
    spec = SpecModel(base, proposer)
    for _ in range(3):
        spec.generate(**inputs, **options)
    assert bool(spec.last_speculation.acceptance_by_depth) != is_silent
    assert caplog.text.count(f"accepted no token of {type(proposer).__name__}") == 1
