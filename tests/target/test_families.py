"""Forwards over trees of every family that takes them, against the model's own over each path."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from speclm.cache import CACHE_NAME
from speclm.self_check.verdict import Verification
from speclm.target import TargetFeatures, TargetView
from speclm.tree.topology import from_parents
from tests.families import FAMILIES, ONCE, shared_family
from tests.models import VOCAB_SIZE, prompts

TOLERANCE = 1e-4  # of a spread, in float32: experts amplify rounding, an error would give 1
PARENTS = [[0, 0, 0, 1, 3, 2], [0, 0, 1, 2, 2, 5]]  # the last node of the second is padding
KEPT = ([[0, 1, 3], [0, 1, 2]], [[0, 2, 5], [0]])
LENGTHS = (11, 5)
WITH_TREES = [name for name, row in FAMILIES.items() if row.backend is Verification.TREES]


@dataclass(frozen=True, slots=True, eq=False)
class Round:
    """What a tree gave, and what the model's own forwards give.

    Args:
        logits: Ours and the model's own, of all nodes on paths.
        hidden: The same of hidden states after the final norm, which the head reads.
        cached: Keys or values that were kept and those of a fresh prefill, for every layer and row.
    """

    logits: list[tuple[Tensor, Tensor]]
    hidden: list[tuple[Tensor, Tensor]]
    cached: list[tuple[Tensor, Tensor]]


@torch.no_grad()
def rounds(name: str) -> list[Round]:
    """Verify a tree after two ragged rows, keep a path, and verify another tree after it."""
    view, inputs = TargetView(shared_family(name)), prompts(*LENGTHS)
    padding = (inputs["attention_mask"] == 0).sum(1)
    topology = from_parents(PARENTS, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    rows = [inputs["input_ids"][row, int(padding[row]) :] for row in range(len(LENGTHS))]
    cache, seen = view.new_cache(padding), []
    read_by_head: list[Tensor] = []
    head = view.model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, states: read_by_head.append(states[0]))
    with view.decoding(TargetFeatures.LAST_HIDDEN):
        view.prefill(inputs["input_ids"], cache, attention_mask=inputs["attention_mask"])
        for kept in KEPT:
            tokens = torch.randint(1, VOCAB_SIZE, (len(rows), len(PARENTS[0])), generator=generator)
            logits = view.forward_tree(tokens, topology, cache)
            hidden = view.features
            one = Round([], [], [])
            for row, prefix in enumerate(rows):
                for path in leaf_paths(PARENTS[row]):
                    own = view.model(
                        input_ids=torch.cat([prefix, tokens[row, path]])[None],
                        output_hidden_states=True,
                    )
                    past = slice(-len(path), None)
                    one.logits.append((logits[row, path], own.logits[0, past]))
                    last = own.hidden_states[-1]
                    if last.dim() == 3:  # Gemma 3n returns the streams that it makes one of
                        one.hidden.append((hidden[row, path], last[0, past]))
                    one.hidden.append((hidden[row, path], read_by_head[-1][0, past]))
            cache.keep(kept)
            rows = [torch.cat([rows[row], tokens[row, path]]) for row, path in enumerate(kept)]
            for row, text in enumerate(rows):
                own = DynamicCache()
                view.model(input_ids=text[None], **{CACHE_NAME: own}, use_cache=True)
                slots = slice(int(padding[row]), int(padding[row]) + len(text))
                # Layers may share what earlier ones cached; Transformers has none for them.
                for layer, reference in zip(cache.layers, own.layers, strict=False):
                    one.cached.append((layer.keys[row, :, slots].clone(), reference.keys[0]))
                    one.cached.append((layer.values[row, :, slots].clone(), reference.values[0]))
            seen.append(one)
    hook.remove()
    return seen


def leaf_paths(parents: list[int]) -> list[list[int]]:
    """Return the paths from the root to every leaf, padding left out."""
    paths = []
    for leaf in range(1, len(parents)):
        if leaf in parents:
            continue
        path = [leaf]
        while path[0]:
            path.insert(0, parents[path[0]])
        paths.append(path)
    return paths


def require_equal(pairs: list[tuple[Tensor, Tensor]]) -> None:
    assert pairs
    for found, expected in pairs:
        assert found.shape == expected.shape
        difference = float((found - expected).abs().max())
        assert difference <= TOLERANCE * max(float(expected.std()), 1e-3)


# One test, so that the rounds of a family are computed once.
@pytest.mark.parametrize("name", WITH_TREES, scope=ONCE)
def test_logits_hidden_states_and_cache_of_a_tree_are_those_of_its_paths(name):
    for one in rounds(name):
        require_equal(one.logits)
        require_equal(one.hidden)
        require_equal(one.cached)
