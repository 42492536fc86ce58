"""A draft model on its own weights gives the logits and the cache of its own forward."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from speclm.cache.tree_cache import TreeCache
from speclm.methods.draft_model.network import DraftNetwork
from speclm.methods.draft_model.runs import LevelRun, ModelRun, NetworkRun, last_of
from speclm.target import TargetView
from tests.grids import turns
from tests.models import FAMILIES, VOCAB_SIZE, build_model, prompts, shared_model

TOLERANCE = 5e-4  # of logits of about 3, in float32: other sums, and large random weights
HALF_TOLERANCE = 0.2  # bfloat16 has 8 bits, of which each of a dozen steps rounds the last
WITHOUT_WINDOW = {"sliding_window": None}
DEPTH = 2


def model_of(family: str) -> PreTrainedModel:
    has_window = family in {"qwen2", "mistral"}
    return build_model(family, **WITHOUT_WINDOW) if has_window else shared_model(family)


def read(view: TargetView, lengths: tuple[int, ...]) -> TreeCache:
    inputs = prompts(*lengths)
    mask = inputs["attention_mask"]
    cache = view.new_cache((mask == 0).sum(1))
    view.prefill(inputs["input_ids"], cache, attention_mask=mask if cache.has_padding else None)
    return cache


def draft(run: LevelRun, unseen: list[list[int]], width: int) -> list[Tensor]:
    """Return the logits of unseen tokens and of two levels, of which the second has cousins."""
    generator = torch.Generator().manual_seed(sum(map(len, unseen)))
    longest = max(map(len, unseen))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in unseen])
    found, parents = [run.catch_up(tokens)], torch.zeros(len(unseen), width, dtype=torch.long)
    for _ in range(DEPTH):
        tokens = torch.randint(1, VOCAB_SIZE, (len(unseen), width), generator=generator)
        found.append(run.below(tokens, parents))
        parents = torch.randint(width, (len(unseen), width), generator=generator)
    return found


def runs(view: TargetView, caches: list[TreeCache], unseen: list[list[int]], width: int):
    counts, is_chain = [len(row) for row in unseen], width == 1
    network = DraftNetwork(view.model)
    shape = {"depth": DEPTH, "max_nodes": DEPTH * width, "is_chain": is_chain}
    return (
        ModelRun(view, caches[0], counts, is_chain=is_chain),
        NetworkRun(network, caches[1], counts, **shape),
    )


@pytest.mark.parametrize(
    ("width", "family", "lengths"), turns([1, 3], FAMILIES, [(7,), (7, 3, 10)])
)
@torch.no_grad()
def test_logits_and_cache_are_those_of_the_model_after_uneven_rounds(width, family, lengths):
    view = TargetView(model_of(family))
    caches = [read(view, lengths) for _ in range(2)]
    rounds = ([[5], [6], [7]], [[5, 9], [6, 8], [7, 4]], [[5], [6, 9, 8], [7, 4]])
    for number, all_unseen in enumerate(rounds):
        unseen = all_unseen[: len(lengths)]
        wanted, found = (draft(run, unseen, width) for run in runs(view, caches, unseen, width))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE)
        first = max(map(len, unseen))
        kept = [
            [*range(len(row)), *([first + width - 1] if index == number else [])]
            for index, row in enumerate(unseen)
        ]
        for cache in caches:
            cache.keep(kept)
    assert caches[0].host_lengths == caches[1].host_lengths
    assert caches[0].is_ragged == (len(lengths) > 1)
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        for row, length in enumerate(caches[0].host_lengths):
            keys, others = one.keys[row, :, :length], other.keys[row, :, :length]
            torch.testing.assert_close(keys, others, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_half_precision_is_that_of_the_model():
    view = TargetView(build_model("qwen3").to(torch.bfloat16))
    caches = [read(view, (7, 3)) for _ in range(2)]
    unseen = [[5], [6, 9]]
    wanted, found = (draft(run, unseen, 2) for run in runs(view, caches, unseen, 2))
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one, other, rtol=0, atol=HALF_TOLERANCE)


@torch.no_grad()
def test_changes_of_weights_in_place_are_followed_and_rotations_grow_with_the_text():
    model = build_model("llama")
    view, network = TargetView(model), DraftNetwork(model)
    for part in (model.lm_head, model.model.layers[1].self_attn.k_proj):
        part.weight.data.mul_(1.5)  # counts no version
    short = network.rotation(4)[0].shape[1]
    caches = [read(view, (short + 40,)) for _ in range(2)]
    one, other = (
        ModelRun(view, caches[0], [1], is_chain=True),
        NetworkRun(network, caches[1], [1], depth=DEPTH, max_nodes=DEPTH, is_chain=True),
    )
    for found, wanted in zip(draft(other, [[5]], 1), draft(one, [[5]], 1), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)


def test_last_states_are_those_at_each_rows_length():
    states = torch.arange(6.0).view(2, 3, 1)
    assert last_of(states, [3, 3]).flatten().tolist() == [2, 5]
    assert last_of(states, [1, 2]).flatten().tolist() == [0, 4]
