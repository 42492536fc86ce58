"""A proposer that was built for one base, used with another."""

import copy

import jaxtyping
import pytest
import torch

from speclm import SpecModel
from speclm.drafting.combined import CombinedProposer
from speclm.errors import OptionError, SpeclmError, VocabularyMismatchError
from speclm.methods.draft_model.proposer import DraftModelProposer
from speclm.methods.medusa.network import MedusaHeads, MedusaHeadsConfig
from speclm.methods.medusa.proposer import MedusaProposer
from speclm.methods.ngram.proposer import NgramProposer
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
def test_calls_after_the_embeddings_were_resized_are_decoded_plainly(build, sampled, caplog):
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
