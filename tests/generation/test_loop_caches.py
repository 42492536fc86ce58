"""After every round the cache holds what a prefill of the committed tokens would."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from speclm import SpecModel
from speclm.cache import CACHE_NAME, TreeCache
from speclm.testing import ScriptedProposer
from tests.grids import turns
from tests.models import FAMILIES, VOCAB_SIZE, generate, prompts, shared_model
from tests.proposers import RandomTreeProposer

TOLERANCE = 1e-5  # of values of about 1: sums over other shapes round differently in float32


class Snapshots:
    """Copies of a cache's committed slots, taken after every `keep`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rounds: list[tuple[list[int], list[Tensor], list[Tensor]]] = []
        original = TreeCache.keep

        def keep(cache: TreeCache, *args: Any, **kwargs: Any) -> None:
            original(cache, *args, **kwargs)
            assert cache.num_pending == 0
            assert cache.tree_start == max(cache.host_lengths)
            assert cache.lengths.tolist() == cache.host_lengths
            keys = [layer.keys[:, :, : cache.tree_start].clone() for layer in cache.layers]
            values = [layer.values[:, :, : cache.tree_start].clone() for layer in cache.layers]
            self.rounds.append((list(cache.host_lengths), keys, values))

        monkeypatch.setattr(TreeCache, "keep", keep)


@torch.no_grad()
def fresh_prefill(model: PreTrainedModel, tokens: Tensor) -> DynamicCache:
    cache = DynamicCache()
    model(input_ids=tokens[None], **{CACHE_NAME: cache}, use_cache=True)
    return cache


@pytest.mark.parametrize(
    ("family", "kind", "lengths", "cell"),
    turns(
        FAMILIES,
        ["scripted", "random tree"],
        [(9,), (11, 4, 2)],
        [{"do_sample": False}, {"do_sample": True, "top_p": 0.9}],
    ),
)
def test_cache_equals_a_fresh_prefill_after_every_round(family, lengths, kind, cell, monkeypatch):
    model, inputs = shared_model(family), prompts(*lengths)
    settings = {"max_new_tokens": 18, **cell}
    expected, _ = generate(model, inputs, **settings)
    width = inputs["input_ids"].shape[1]
    reference = expected[:, width:].tolist()
    proposer = (
        ScriptedProposer(reference, depth=4, wrong_at=(2, 7, 8))
        if kind == "scripted"
        else RandomTreeProposer(reference, vocab_size=VOCAB_SIZE, seed=3)
    )
    spec = SpecModel(model, proposer)  # its self-check keeps paths as well
    snapshots = Snapshots(monkeypatch)
    output, _ = generate(spec, inputs, **settings)
    assert torch.equal(output, expected)
    # The prompt's own forward commits before the first round; the last round needs no commit.
    assert len(snapshots.rounds) == spec.last_speculation.rounds
    for row, length in enumerate(lengths):
        padding = width - length
        prefill = fresh_prefill(model, output[row, padding:])
        for committed, keys, values in snapshots.rounds:
            end = committed[row]
            for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
                for found, wanted in (
                    (key, prefill.layers[layer].keys),
                    (value, prefill.layers[layer].values),
                ):
                    difference = found[row, :, padding:end] - wanted[0, :, : end - padding]
                    scale = max(1.0, float(wanted.abs().max()))
                    assert float(difference.abs().max()) <= TOLERANCE * scale


def test_rows_of_a_batch_commit_different_numbers_of_tokens(monkeypatch):
    model, inputs = shared_model("llama"), prompts(5, 5)
    expected, _ = generate(model, inputs, max_new_tokens=12, do_sample=False)
    reference = expected[:, 5:].tolist()
    wrong = [(token + 1) % VOCAB_SIZE for token in reference[1]]
    spec = SpecModel(model, ScriptedProposer([reference[0], wrong], depth=3, num_siblings=0))
    snapshots = Snapshots(monkeypatch)
    output, _ = generate(spec, inputs, max_new_tokens=12, do_sample=False)
    assert torch.equal(output, expected)
    assert [lengths for lengths, _, _ in snapshots.rounds[:3]] == [[8, 5], [12, 6], [16, 7]]
