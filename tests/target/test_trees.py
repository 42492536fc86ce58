"""A session over trees: what it reads, keeps and leaves behind."""

import pytest
import torch
from transformers import DynamicCache

from speclm.cache import TreeCache, import_cache
from speclm.errors import CacheError
from speclm.target import TargetView
from speclm.target.tree_session import TreeSession
from speclm.tree.topology import chain, from_parents
from tests.models import build_model, prompts, shared_model

TOLERANCE = 2e-4  # of logits whose spread is about 3, in float32


def session_of(view: TargetView, cache: TreeCache, mask: torch.Tensor | None = None) -> TreeSession:
    return TreeSession(view, cache, attention_mask=mask)


@torch.no_grad()
def test_prompt_read_alone_or_with_its_first_draft_gives_the_same_logits():
    view, inputs = TargetView(shared_model("qwen2")), prompts(9, 4)
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    padding = (mask == 0).sum(1)
    alone = session_of(view, view.new_cache(padding), mask)
    merged = session_of(view, view.new_cache(padding), mask)
    topology = from_parents([[0, 0, 1]], device=torch.device("cpu"))
    draft = torch.cat([tokens[:, -1:], torch.tensor([[5, 6], [7, 8]])], dim=1)
    first = alone.prefill(tokens)
    both = merged.verify(draft, topology, prompt=tokens[:, :-1])
    assert first.shape == (2, 1, both.shape[2])
    assert torch.allclose(first[:, 0], both[:, 0], atol=TOLERANCE)
    alone.keep([[0], [0]])
    merged.keep([[0], [0]])
    root = torch.tensor([[5], [7]])
    found, wanted = (each.verify(root, chain(0)) for each in (merged, alone))
    assert torch.allclose(found, wanted, atol=TOLERANCE)


@torch.no_grad()
def test_slots_of_an_imported_cache_are_not_read_again():
    model = shared_model("llama")
    view, tokens = TargetView(model), prompts(8)["input_ids"]
    given = DynamicCache(config=model.config)
    model(input_ids=tokens[:, :5], past_key_values=given, use_cache=True)
    cache = view.new_cache(torch.tensor([0]))
    import_cache(cache, given, room=8)
    session = session_of(view, cache)
    assert session.num_cached == 5
    logits = session.prefill(tokens[:, 5:])
    expected = model(input_ids=tokens).logits[:, -1:]
    assert torch.allclose(logits, expected, atol=TOLERANCE)
    session.keep([[0]])
    session.hand_over(given, torch.cat([tokens, torch.tensor([[3]])], dim=1))
    assert given.get_seq_length() == 8
    session.abandon()
    assert given.get_seq_length() == 8


@torch.no_grad()
def test_images_in_slots_beside_those_of_the_text_are_refused():
    model, tokens = build_model("llama"), prompts(5)["input_ids"]

    def prepare(tokens, *, is_first_iteration, position_ids, images, **inputs):
        assert is_first_iteration
        return {"input_ids": torch.cat([images, tokens], dim=1), **inputs}

    model.prepare_inputs_for_generation = prepare
    view = TargetView(model)
    cache = view.new_cache(torch.tensor([0]))
    session = TreeSession(view, cache, images={"images": tokens[:, :3]})
    with pytest.raises(CacheError, match=r"5 tokens wrote 8 slots.*\.base\.generate"):
        session.prefill(tokens)
