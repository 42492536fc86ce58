"""What an assistant reads of the target while rows advance by different numbers of tokens."""

import gc
import pickle
from copy import deepcopy

import pytest
import torch

from speclm import SpecModel
from speclm.errors import UnsupportedModelError
from speclm.methods.gemma_assistant.proposer import GemmaAssistantProposer
from speclm.testing import check_proposer
from tests.exactness import GREEDY
from tests.methods.gemma_assistant.assistants import (
    NUM_TOKENS,
    build_assistant,
    build_base,
    transformers_chain,
)
from tests.models import VOCAB_SIZE, prompts
from tests.proposers import HittingProposer

CHAIN = {"depth": NUM_TOKENS, "branches": 1}
CHAIN |= {"min_probability": 0.0, "min_confidence": 0.0, "min_growing": 0.0}


@pytest.fixture(scope="module")
def base():
    return build_base()


def test_drafts_in_every_round_of_ragged_rows_are_those_of_transformers(base):
    assistant, inputs = build_assistant(has_clusters=True), prompts(12, 5, 3)
    expected = base.generate(**inputs, max_new_tokens=24, **GREEDY)
    proposer = GemmaAssistantProposer(assistant, target=base, **CHAIN)
    drafts, own = [], proposer.propose

    def propose(roots, *, noise):
        draft = own(roots, noise=noise)
        drafts.append((proposer._own._cache().host_lengths, draft.tokens[:, 1:].tolist()))
        return draft

    proposer.propose = propose
    hitting = HittingProposer(proposer, expected[:, 12:].tolist())
    spec = SpecModel(base, hitting, adaptive=False)
    assert spec.generate(**inputs, max_new_tokens=24, **GREEDY).tolist() == expected.tolist()
    assert any(len(set(lengths)) > 1 for lengths, _ in drafts)
    for lengths, drafted in drafts[:4]:
        for row, length in enumerate(lengths):
            text = expected[row, 12 - (12, 5, 3)[row] : length + 1].tolist()
            assert drafted[row] == transformers_chain(base, assistant, text)[0]


def test_copies_draft_for_the_copied_base_and_free_the_cache_of_a_call(base):
    options = {"width": 2, "num_draft_tokens": 8, "min_probability": 0.0, "min_confidence": 0.0}
    spec = SpecModel.from_pretrained(base, build_assistant(), heads_kwargs=options)
    inputs = prompts(6)
    expected = spec.generate(**inputs, max_new_tokens=6, **GREEDY)
    again = pickle.loads(pickle.dumps(spec.proposer.model))
    assert torch.equal(again.lm_head.weight, spec.proposer.model.lm_head.weight)
    assert spec.last_speculation.fallbacks == []
    gc.collect()  # layers of a cache know it
    assert spec.proposer._own._cache() is None
    copied = deepcopy(spec)
    assert copied.generate(**inputs, max_new_tokens=6, **GREEDY).tolist() == expected.tolist()


def test_targets_that_verify_no_trees_are_refused(base):
    proposer = GemmaAssistantProposer(build_assistant(), target=base)
    with pytest.raises(UnsupportedModelError, match="keys and values of committed tokens"):
        check_proposer(proposer, vocab_size=VOCAB_SIZE, hidden_size=40)
