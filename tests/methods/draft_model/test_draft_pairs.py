"""Draft models of another family than the base, and of a vocabulary that is padded further."""

from functools import cache
from itertools import product

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from speclm import SpecModel
from speclm.errors import VocabularyMismatchError
from speclm.methods.draft_model.chain_proposer import ChainDraftProposer
from speclm.methods.draft_model.proposer import MAX_PADDING, DraftModelProposer, SharedVocabulary
from speclm.target import TargetView
from tests.exactness import MODES, require_exact, tiny
from tests.grids import turns
from tests.models import generate, prompts

NUM_IDS = 64
TREE = {"depth": 3, "width": 2, "min_probability": 0.0, "min_confidence": 0.0}
LENGTHS = ((9,), (9, 4, 2))
SIZES = ((64, 80), (80, 64))  # of the vocabularies of base and draft model

FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config,
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "cohere": (CohereForCausalLM, CohereConfig, {"logit_scale": 1.5}),
    "granite": (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 0.5}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"query_pre_attn_scalar": 8}),
}
PAIRS = (
    ("llama", "gpt2"),
    ("gpt2", "qwen2"),
    ("qwen2", "cohere"),
    ("cohere", "llama"),
    ("granite", "gemma2"),
    ("gemma2", "granite"),
)


@cache
def related(family, num_ids=NUM_IDS, seed=0):
    """Return a model that mostly says what the others of any family do."""
    model_type, config_type, own = FAMILIES[family]
    settings = {"vocab_size": num_ids, "tie_word_embeddings": False, **own}
    model = tiny(model_type, config_type, **settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("o_proj", "down_proj", "c_proj", "wpe")):
                parameter.mul_(0.005)  # what depends on more than the last token
            elif "norm" in name or "ln_" in name:
                bias = name.endswith("bias") or family == "gemma2"  # which adds one to weights
                parameter.fill_(0.0 if bias else 1.0)
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            shared = torch.randn(256, 32, generator=generator)
            module.weight.copy_(shared[:num_ids])
    return model


def require_pair(base, draft, lengths, *, vocab_size=60, **settings):
    spec = SpecModel(base, None)

    def proposer(reference):
        return DraftModelProposer(draft, target=base, **TREE)

    inputs = prompts(*lengths, vocab_size=vocab_size)
    require_exact(spec, inputs, proposer=proposer, max_new_tokens=14, **settings)
    return spec.last_speculation


@pytest.mark.parametrize(("pair", "case"), turns(PAIRS, tuple(product(MODES, LENGTHS))))
def test_draft_model_of_another_family_saves_forwards(pair, case):
    (base, draft), (mode, lengths) = pair, case
    require_pair(related(base), related(draft), lengths, **MODES[mode])


@pytest.mark.parametrize(("sizes", "lengths", "mode"), turns(SIZES, LENGTHS, MODES))
def test_vocabularies_that_differ_by_padding_save_forwards(sizes, lengths, mode):
    num_base, num_draft = sizes
    base, draft = related("llama", num_base), related("qwen2", num_draft)
    # Random models use all ids, so that the draft model is given some that it does not know.
    require_pair(base, draft, lengths, vocab_size=num_base, **MODES[mode])


@pytest.mark.parametrize(("sizes", "mode"), turns(SIZES, MODES))
def test_chains_are_drafted_from_a_padded_vocabulary_too(sizes, mode):
    num_base, num_draft = sizes
    base, draft = related("llama", num_base), related("qwen2", num_draft)

    def proposer(reference):
        return ChainDraftProposer(draft, target=base, num_draft_tokens=3, min_confidence=0.0)

    inputs = prompts(9, 4, vocab_size=num_base)
    require_exact(
        SpecModel(base, None), inputs, proposer=proposer, max_new_tokens=14, **MODES[mode]
    )


@pytest.mark.parametrize(("sizes", "acceptance"), turns(SIZES, ["rejection", "typical"]))
def test_other_accept_rules_take_drafts_of_a_padded_vocabulary(sizes, acceptance):
    num_base, num_draft = sizes
    base, draft = related("llama", num_base), related("qwen2", num_draft)
    spec = SpecModel(base, DraftModelProposer(draft, target=base, **TREE))
    inputs = prompts(9, 4, vocab_size=num_base)
    output, _ = generate(spec, inputs, max_new_tokens=14, acceptance=acceptance, do_sample=True)
    assert int(output.max()) < num_base
    assert spec.last_speculation.total.num_draft_tokens > 0


def test_ids_that_the_draft_model_lacks_are_never_drafted_and_never_fed():
    base, draft = related("llama", 80), related("qwen2", 64)
    proposer = DraftModelProposer(draft, target=base, **TREE)
    fed, drafted = [], []
    hook = draft.get_input_embeddings().register_forward_pre_hook(
        lambda _, arguments: fed.append(int(arguments[0].max()))
    )
    propose = proposer.propose

    def proposed(roots, *, noise):
        found = propose(roots, noise=noise)
        drafted.append(int(found.tokens[:, 1:].max()))
        return found

    proposer.propose = proposed
    spec = SpecModel(base, proposer)
    spec.generate(**prompts(9, vocab_size=80), suppress_tokens=list(range(60)), max_new_tokens=12)
    hook.remove()
    assert max(fed) < 64
    assert max(drafted) < 64


@pytest.mark.parametrize(
    ("num_draft", "num_target", "is_padding"),
    [
        (151936, 152064, True),  # Qwen2.5 of 0.5 and 7 billion parameters
        (50304, 50688, True),  # Pythia of 70 million and 12 billion
        (50688, 50304, True),
        (32000, 32000 + MAX_PADDING, True),
        (32000, 32001 + MAX_PADDING, False),
        (160, 192, True),
        (90, 160, False),
        (32000, 128256, False),
    ],
)
def test_padding_is_told_from_another_tokenizer(num_draft, num_target, is_padding):
    views = [View(num_draft), View(num_target)]
    if is_padding:
        assert SharedVocabulary.of(*views) == SharedVocabulary(num_draft, num_target)
        return
    words = rf"vocabulary of {num_draft}, .* one of {num_target}, .* at most {MAX_PADDING} ids"
    with pytest.raises(VocabularyMismatchError, match=words):
        SharedVocabulary.of(*views)


class View(TargetView):
    """Stands for a view of a model that would be large."""

    vocab_size = 0
    name = "model"

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size
