"""Assistants of Gemma 4 change no token, and save forwards when they are right."""

from dataclasses import replace

import pytest
import torch

from speclm import SpecModel
from speclm.drafting.interface import Proposer
from speclm.methods.gemma_assistant.proposer import GemmaAssistantProposer
from speclm.target import TargetView
from speclm.testing import check_proposer
from tests.exactness import GREEDY, SAMPLED
from tests.grids import turns
from tests.methods.gemma_assistant.assistants import (
    FULL,
    NUM_TOKENS,
    SLIDING,
    build_assistant,
    build_base,
    plant,
)
from tests.models import VOCAB_SIZE, generate, prompts
from tests.proposers import HittingProposer

WHOLE = {"min_probability": 0.0, "min_confidence": 0.0, "min_growing": 0.0}
TREE = {**WHOLE, "depth": 4, "width": 3, "num_draft_tokens": 12}


@pytest.fixture(scope="module")
def base():
    return build_base()


@pytest.mark.parametrize(
    ("has_clusters", "lengths", "options", "cell"),
    turns([False, True], [(9,), (1,), (7, 2, 10)], [TREE, {}], [GREEDY, SAMPLED]),
)
def test_tokens_and_generator_are_those_of_the_base(base, has_clusters, lengths, options, cell):
    inputs = prompts(*lengths)
    expected = generate(base, inputs, max_new_tokens=14, **cell)
    proposer = GemmaAssistantProposer(
        build_assistant(has_clusters=has_clusters), target=base, **options
    )
    hitting = HittingProposer(proposer, expected[0][:, max(lengths) :].tolist())
    spec = SpecModel(base, hitting, adaptive=False)
    found = generate(spec, inputs, max_new_tokens=14, **cell)
    assert found[0].tolist() == expected[0].tolist()
    assert torch.equal(found[1], expected[1])
    assert spec.last_speculation.fallbacks == []


def test_drafts_that_are_mostly_right_save_half_of_the_forwards():
    base = build_base(seed=2)
    assistant, inputs = plant(base), prompts(20, 5)
    expected = base.generate(**inputs, max_new_tokens=24, **GREEDY)
    spec = SpecModel.from_pretrained(base, assistant, adaptive=False)
    assert spec.proposer.config.depth == NUM_TOKENS
    for options in ({}, {"tree": [2, 2, 1]}, {"tree": "auto"}, {"acceptance": "rejection"}):
        found = spec.generate(**inputs, max_new_tokens=24, **options, **GREEDY)
        assert found.tolist() == expected.tolist()
        assert spec.last_speculation.fallbacks == []
        assert spec.last_speculation.rounds <= 12
    torch.manual_seed(5)
    spec.generate(**inputs, max_new_tokens=24, acceptance="rejection", **SAMPLED)
    assert spec.last_speculation.rounds <= 12  # it draws from nearly the same distribution


class OverOwnCache(Proposer):
    """Gives another proposer the cache that the decode loop would give it."""

    def __init__(self, inner, target):
        self.inner, self.view, self.config = inner, TargetView(target), inner.config
        self.features = inner.features

    def begin(self, prompt):
        self.cache = self.view.new_cache(prompt.num_padding)
        slots = torch.arange(prompt.tokens.shape[1])
        seen = (slots >= prompt.num_padding[:, None]).long()
        self.view.prefill(prompt.tokens, self.cache, attention_mask=seen)
        self.roots = prompt.first_tokens.tolist()
        self.inner.begin(replace(prompt, cache=self.cache))

    def propose(self, roots, *, noise):
        return self.inner.propose(roots, noise=noise)

    def commit(self, accepted):
        rows = list(zip(self.roots, accepted.emitted, strict=True))
        fed = [[root, *new][: len(new)] for root, new in rows]
        longest = max(map(len, fed))
        if longest:
            steps = torch.arange(longest)
            tokens = torch.tensor([row + [0] * (longest - len(row)) for row in fed])
            causal = (steps[:, None] >= steps)[None]
            self.view.forward_nodes(tokens, causal, steps[None], self.cache)
            self.cache.keep([range(len(row)) for row in fed])
        self.roots = [new[-1] if new else root for root, new in rows]
        self.inner.commit(accepted)


def test_it_keeps_the_contract_of_proposers():
    types = {"num_hidden_layers": 2, "layer_types": [SLIDING, FULL]}
    base, assistant = build_base(num_kv_shared_layers=0, **types), build_assistant(**types)
    whole = {**WHOLE, "depth": 2, "width": 2, "num_draft_tokens": 64}
    check_proposer(
        lambda: OverOwnCache(GemmaAssistantProposer(assistant, target=base, **whole), base),
        vocab_size=VOCAB_SIZE,
        hidden_size=40,
        max_length=32,
    )
