"""A proposer that was built for one base, used with another."""

import copy

import jaxtyping
import pytest
import torch

from speclm import SpecModel
from speclm.errors import OptionError, SpeclmError, VocabularyMismatchError
from speclm.heads import MedusaHeads, MedusaHeadsConfig
from speclm.proposers import CombinedProposer, DraftModelProposer, MedusaProposer, NgramProposer
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


def test_heads_of_another_dtype_than_the_matrix_they_use_are_refused():
    base = build_model("llama").bfloat16()
    with pytest.raises(OptionError, match=r"float32.*bfloat16.*\.to\(base\.dtype\)"):
        medusa(base)
    assert medusa(base, has_own_lm_head=True).needs.model is None
