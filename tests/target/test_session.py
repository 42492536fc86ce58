"""Sessions over trees and chains: what they read, keep and leave behind."""

from functools import cache as cached

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from speclm.cache import CACHE_NAME, TreeCache, import_cache
from speclm.errors import CacheError
from speclm.target import ChainSession, Session, TargetView, TreeSession
from speclm.target.session import fill_rows
from speclm.tree.topology import chain, from_parents
from tests.grids import turns
from tests.models import VOCAB_SIZE, build_model, prompts, randomise, shared_model

TOLERANCE = 2e-4  # of logits whose spread is about 3, and of keys and values, in float32
ROUNDS = (((9, 20, 31), 1), ((7, 7), 2), ((12,), 1), ((3, 4, 5, 6), 3))
PROMPT, NEW = 12, 9
SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}


def tree_session(model: PreTrainedModel, mask: Tensor) -> tuple[Session, DynamicCache]:
    view = TargetView(model)
    cache = view.new_cache((mask == 0).sum(1))
    return TreeSession(view, cache, attention_mask=mask), DynamicCache(config=model.config)


def chain_session(model: PreTrainedModel, mask: Tensor) -> tuple[Session, DynamicCache]:
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {
        CACHE_NAME: cache,
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


def session_of(view: TargetView, cache: TreeCache, mask: torch.Tensor | None = None) -> TreeSession:
    return TreeSession(view, cache, attention_mask=mask)


@torch.no_grad()
def test_prompt_read_separately_or_with_its_first_draft_gives_the_same_logits():
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
    model(input_ids=tokens[:, :5], **{CACHE_NAME: given}, use_cache=True)
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
def test_images_in_slots_of_their_own_are_refused():
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


def gpt2(num_positions: int) -> GPT2LMHeadModel:
    shape = {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 2, "n_head": 2}
    return randomise(GPT2LMHeadModel(GPT2Config(**shape, **SPECIAL, n_positions=num_positions)))


@cached
def model_of(family: str) -> PreTrainedModel:
    return gpt2(PROMPT + NEW) if family == "gpt2" else build_model(family)


@torch.no_grad()
def decoded(
    view: TargetView, inputs: dict[str, Tensor], tokens: Tensor, counts: list[int]
) -> TreeCache:
    """Return a cache with `counts` new tokens of each row, each row with a length of its own."""
    cache = view.new_cache((inputs["attention_mask"] == 0).sum(1))
    length = inputs["input_ids"].shape[1]
    view.prefill(inputs["input_ids"], cache, attention_mask=inputs["attention_mask"])
    for step in range(max(counts)):
        view.forward_tree(tokens[:, length + step, None], chain(0), cache)
        cache.keep([[0] if step < count else [] for count in counts])
    return cache


def require_equal(found: DynamicCache, expected: DynamicCache, padding: list[int]) -> None:
    assert found.get_seq_length() == expected.get_seq_length()
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert type(one) is type(other)
        assert one.keys.shape == other.keys.shape
        first = other.get_seq_length() - other.keys.shape[2]
        for row, count in enumerate(padding):
            skip = max(count - first, 0)  # what is at padding is of no meaning
            for stored, wanted in ((one.keys, other.keys), (one.values, other.values)):
                assert torch.allclose(stored[row, :, skip:], wanted[row, :, skip:], atol=TOLERANCE)


@pytest.mark.parametrize(
    ("family", "ends"),
    turns(["llama", "qwen2", "mistral", "gpt2"], [(2, 6), (0, 8), (4, 4), ()]),
)
@torch.no_grad()
def test_cache_is_that_of_regular_generation_when_rows_end_at_different_lengths(family, ends):
    model, inputs = model_of(family), prompts(PROMPT, PROMPT - 7, PROMPT - 3)
    free = model.generate(**inputs, max_new_tokens=NEW)[:, PROMPT:]
    stops = {"eos_token_id": [int(free[row, step]) for row, step in enumerate(ends)] or None}
    own = DynamicCache(config=model.config)
    tokens = model.generate(
        **inputs, **{CACHE_NAME: own}, max_new_tokens=NEW, pad_token_id=7, **stops
    )
    width = tokens.shape[1] - PROMPT - 1  # the last token is not fed
    counts = [min(step, width) for step in [*ends, width, width, width][:3]]
    view = TargetView(model)
    cache = decoded(view, inputs, tokens, counts)
    into = DynamicCache(config=model.config)
    TreeSession(view, cache).hand_over(into, tokens)
    require_equal(into, own, [0, 7, 3])


@torch.no_grad()
def test_rows_padded_alike_stay_within_learned_positions():
    model, inputs = gpt2(12), prompts(PROMPT)
    inputs["attention_mask"][:, :6] = 0
    inputs = {name: tensor.expand(2, -1) for name, tensor in inputs.items()}
    tokens = torch.cat([inputs["input_ids"], prompts(6, 6, seed=3)["input_ids"]], dim=1)
    view = TargetView(model)
    cache = decoded(view, inputs, tokens, [0, 5])  # the last of 5 is at position 10 of 0 to 11
    fill_rows(view, cache, tokens[:, :-1])
    assert cache.host_lengths == [PROMPT + 5] * 2


@torch.no_grad()
def test_pending_nodes_are_dropped():
    view, inputs = TargetView(model_of("llama")), prompts(PROMPT, PROMPT)
    tokens = torch.cat([inputs["input_ids"], prompts(6, 6, seed=3)["input_ids"]], dim=1)
    caches = [decoded(view, inputs, tokens, [1, 3]) for _ in range(2)]
    view.forward_tree(torch.ones(2, 4, dtype=torch.long), chain(3), caches[1])
    outputs = [DynamicCache(), DynamicCache()]
    for cache, into in zip(caches, outputs, strict=True):
        TreeSession(view, cache).hand_over(into, tokens)
    require_equal(*outputs, [0, 0])


@torch.no_grad()
def test_nothing_runs_when_no_row_lacks_a_token(monkeypatch):
    model, inputs = model_of("llama"), prompts(PROMPT, 5)
    past = DynamicCache(config=model.config)
    model(**{name: tensor[:, :4] for name, tensor in inputs.items()}, **{CACHE_NAME: past})
    view = TargetView(model)
    cache = view.new_cache(torch.tensor([0, 7]))
    import_cache(cache, past)
    view.prefill(inputs["input_ids"][:, 4:], cache, attention_mask=inputs["attention_mask"])
    monkeypatch.setattr(view, "forward_nodes", None)
    fill_rows(view, cache, inputs["input_ids"])
    TreeSession(view, cache).hand_over(past, inputs["input_ids"])
    assert past.get_seq_length() == PROMPT - 1
