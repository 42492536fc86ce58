"""Sessions of either kind are the same target: the same chains give the same logits."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from speclm.target import Session, TargetView
from speclm.target.chain_session import ChainSession
from speclm.target.tree_session import TreeSession
from speclm.tree.topology import chain
from tests.models import prompts, shared_model

TOLERANCE = 2e-4  # of logits whose spread is about 3, in float32
ROUNDS = (((9, 20, 31), 1), ((7, 7), 2), ((12,), 1), ((3, 4, 5, 6), 3))


def tree_session(model: PreTrainedModel, mask: Tensor) -> tuple[Session, DynamicCache]:
    view = TargetView(model)
    cache = view.new_cache((mask == 0).sum(1))
    return TreeSession(view, cache, attention_mask=mask), DynamicCache(config=model.config)


def chain_session(model: PreTrainedModel, mask: Tensor) -> tuple[Session, DynamicCache]:
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {
        "past_key_values": cache,
        "attention_mask": mask,
        "position_ids": positions,
        "use_cache": True,
        "logits_to_keep": 1,
    }
    session = ChainSession(TargetView(model), inputs, num_cached=0, is_callers=True)
    return session, cache


@torch.no_grad()
def run(
    session: Session, given: DynamicCache, inputs: dict[str, Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    tokens = inputs["input_ids"]
    logits = [session.prefill(tokens)]
    session.keep([[0]] * len(tokens))
    text = [tokens]
    for drafted, num_kept in ROUNDS:
        row = torch.tensor([drafted]).expand(len(tokens), -1)
        logits.append(session.verify(row, chain(len(drafted) - 1)))
        session.keep([range(num_kept)] * len(tokens))
        text.append(row[:, :num_kept])
    text.append(tokens[:, :1])  # the last one is never read
    session.hand_over(given, torch.cat(text, dim=1))
    kept = [getattr(layer, name) for layer in given.layers for name in ("keys", "values")]
    return logits, kept


@pytest.mark.parametrize("lengths", [(9,), (9, 4, 6)])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_trees_and_chains_score_and_keep_alike(family, lengths):
    model, inputs = shared_model(family), prompts(*lengths)
    mask = inputs["attention_mask"]
    trees, chains = (
        run(*open_session(model, mask), inputs) for open_session in (tree_session, chain_session)
    )
    for one, other in zip(trees[0], chains[0], strict=True):
        assert torch.allclose(one, other, atol=TOLERANCE)
    first = int((mask == 0).sum(1).max())
    for one, other in zip(trees[1], chains[1], strict=True):
        assert one.shape == other.shape
        assert torch.allclose(one[:, :, first:], other[:, :, first:], atol=TOLERANCE)


@torch.no_grad()
def test_chains_leave_a_callers_cache_as_it_was_after_an_error():
    model = shared_model("mistral")
    session, cache = chain_session(model, torch.ones(1, 9, dtype=torch.long))
    session.prefill(prompts(9)["input_ids"])
    session.abandon()
    assert cache.get_seq_length() == 0
