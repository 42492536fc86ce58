"""Assistants compute what Transformers computes with them, from the cache of the target."""

import pytest
import torch

from speclm.methods.gemma_assistant.checkpoint import require_match
from speclm.methods.gemma_assistant.network import AssistantNetwork, AssistantRun
from speclm.target import TargetFeatures, TargetView
from tests.methods.gemma_assistant.assistants import (
    NUM_TOKENS,
    build_assistant,
    build_base,
    transformers_chain,
)
from tests.models import VOCAB_SIZE, WINDOW, prompts

TOLERANCE = 1e-4  # of logits: attention adds in another order


@pytest.mark.parametrize("has_clusters", [False, True], ids=["tied", "clusters"])
def test_logits_of_every_step_are_those_of_transformers(has_clusters):
    base, assistant = build_base(), build_assistant(has_clusters=has_clusters)
    view = TargetView(base)
    network = AssistantNetwork(assistant, layers=require_match(assistant, view))
    inputs = prompts(20, 5, WINDOW + 3)
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = view.new_cache((mask == 0).sum(1))
    with torch.no_grad(), view.decoding(TargetFeatures.LAST_HIDDEN):
        view.prefill(tokens[:, :-1], cache, attention_mask=mask[:, :-1])
        assert view.features.shape[:2] == tokens[:, :-1].shape  # also where layers share keys
        run = AssistantRun(
            network,
            base.get_input_embeddings(),
            network.read(cache),
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
