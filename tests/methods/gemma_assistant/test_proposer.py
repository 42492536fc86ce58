"""Assistants of Gemma 4 draft what Transformers drafts with them, and change no token."""

import gc
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers.generation.candidate_generator import SinglePositionMultiTokenCandidateGenerator

from speclm import SpecModel
from speclm.drafting.interface import Proposer
from speclm.errors import UnsupportedModelError
from speclm.methods.gemma_assistant.network import AssistantRun
from speclm.methods.gemma_assistant.proposer import GemmaAssistantProposer
from speclm.target import TargetView
from speclm.testing import check_proposer
from tests.exactness import GREEDY, SAMPLED
from tests.grids import turns
from tests.methods.gemma_assistant.assistants import NUM_TOKENS, build_assistant, build_base, plant
from tests.models import VOCAB_SIZE, WINDOW, generate, prompts
from tests.proposers import HittingProposer

TOLERANCE = 1e-4  # of logits: attention adds in another order
FULL = {"min_probability": 0.0, "min_confidence": 0.0, "min_growing": 0.0}
CHAIN = {**FULL, "depth": NUM_TOKENS, "branches": 1}
TREE = {**FULL, "depth": 4, "width": 3, "num_draft_tokens": 12}
HEADS = pytest.mark.parametrize("has_clusters", [False, True], ids=["tied", "clusters"])


@pytest.fixture(scope="module")
def base():
    return build_base()


def transformers_chain(base, assistant, tokens):
    """Return the tokens and logits that Transformers drafts after a text."""
    ids = torch.tensor([tokens])
    generator = SinglePositionMultiTokenCandidateGenerator(
        assistant, base.get_input_embeddings(), SimpleNamespace(max_length=512)
    )
    with torch.no_grad():
        outputs = base(ids[:, :-1], output_hidden_states=True, return_shared_kv_states=True)
        found, logits = generator.get_candidates(
            ids, {}, outputs, is_first_iteration=False, n_last_matches=0
        )
    return found[0, len(tokens) :].tolist(), logits[0]


@HEADS
def test_logits_of_every_step_are_those_of_transformers(base, has_clusters):
    assistant, view = build_assistant(has_clusters=has_clusters), TargetView(base)
    proposer = GemmaAssistantProposer(assistant, target=base)
    inputs = prompts(20, 5, WINDOW + 3)
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = view.new_cache((mask == 0).sum(1))
    with torch.no_grad(), view.decoding(proposer.features):
        view.prefill(tokens[:, :-1], cache, attention_mask=mask[:, :-1])
        run = AssistantRun(
            proposer._own._network,
            base.get_input_embeddings(),
            proposer._own._network.read(cache),
            roots=tokens[:, -1],
            hidden=view.features[:, -1],
        )
        steps = [run.logits[:, 0]]
        while len(steps) < NUM_TOKENS:
            run.below(steps[-1].argmax(-1)[:, None], torch.zeros(3, 1, dtype=torch.long))
            steps.append(run.logits[:, 0])
    found = torch.stack(steps, dim=1)
    for row, (text, seen) in enumerate(zip(tokens, mask, strict=True)):
        best, logits = transformers_chain(base, assistant, text[seen == 1].tolist())
        assert found[row].argmax(-1).tolist() == best
        known = found[row].isfinite()
        assert known.sum(1).tolist() == [40 if has_clusters else VOCAB_SIZE] * NUM_TOKENS
        assert torch.allclose(found[row][known], logits[known], atol=TOLERANCE)


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


def test_right_drafts_save_forwards_with_any_tree_and_rule():
    base = build_base(seed=2)
    assistant, inputs = plant(base), prompts(20, 5)
    expected = base.generate(**inputs, max_new_tokens=24, **GREEDY)
    spec = SpecModel.from_pretrained(base, assistant, adaptive=False)
    assert spec.proposer.config.depth == NUM_TOKENS
    for options in ({}, {"tree": [2, 2, 1]}, {"tree": "auto"}, {"acceptance": "rejection"}):
        found = spec.generate(**inputs, max_new_tokens=24, **options, **GREEDY)
        assert found.tolist() == expected.tolist()
        assert spec.last_speculation.rounds <= 24 / (1 + NUM_TOKENS) + 1 or "tree" in options
        assert spec.last_speculation.rounds <= 12
    spec.generate(**inputs, max_new_tokens=24, acceptance="rejection", **SAMPLED)
    assert spec.last_speculation.rounds <= 8  # it draws from the same distribution


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


def test_it_keeps_the_contract_of_proposers(base):
    assistant = build_assistant()
    whole = {**FULL, "depth": 2, "width": 2, "num_draft_tokens": 64}
    check_proposer(
        lambda: OverOwnCache(GemmaAssistantProposer(assistant, target=base, **whole), base),
        vocab_size=VOCAB_SIZE,
        hidden_size=40,
        max_length=32,
    )


def test_copies_draft_for_the_copied_base_and_free_the_cache_of_a_call(base):
    spec = SpecModel.from_pretrained(base, build_assistant())
    inputs = prompts(6)
    expected = spec.generate(**inputs, max_new_tokens=6, **GREEDY)
    gc.collect()  # layers of a cache know it
    assert spec.proposer._own._cache() is None
    copied = deepcopy(spec)
    assert copied.generate(**inputs, max_new_tokens=6, **GREEDY).tolist() == expected.tolist()


def test_targets_that_verify_no_trees_are_refused(base):
    proposer = GemmaAssistantProposer(build_assistant(), target=base)
    with pytest.raises(UnsupportedModelError, match="keys and values of committed tokens"):
        check_proposer(proposer, vocab_size=VOCAB_SIZE, hidden_size=40)
