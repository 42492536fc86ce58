"""Masks against brute force, and a model that is left as it was found."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from speclm.attention import TreeStep, attached, attention_configs, tree_step
from speclm.cache import TreeCache
from speclm.errors import UnsupportedModelError
from speclm.target import TargetView
from speclm.tree.topology import chain, from_parents
from tests.models import FAMILIES, prompts, shared_model

CPU = torch.device("cpu")


def cache_of(lengths: Sequence[int], padding: Sequence[int], *, pending: int = 0) -> TreeCache:
    cache = TreeCache(num_layers=1, num_padding=torch.tensor(padding))
    cache._set_lengths(list(lengths))
    cache.append(pending)
    return cache


def brute_force(
    lengths: Sequence[int],
    padding: Sequence[int],
    parents: Sequence[Sequence[int]],
    window: int | None,
) -> list[list[list[bool]]]:
    """Say for each row, node and slot whether the node sees the slot, by walking up the tree."""
    start, mask = max(lengths), []
    for row, length in enumerate(lengths):
        shape = parents[row if len(parents) > 1 else 0]
        rows = []
        for node in range(len(shape)):
            path = [node]
            while path[-1] and shape[path[-1]] != path[-1]:
                path.append(shape[path[-1]])
            position = length + len(path) - 1
            seen = {slot: slot for slot in range(padding[row], length)}
            seen |= {start + above: position - up for up, above in enumerate(path)}
            rows.append(
                [
                    slot in seen and (window is None or position - seen[slot] < window)
                    for slot in range(start + len(shape))
                ]
            )
        mask.append(rows)
    return mask


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[int], list[int], list[list[int]]]:
    batch, nodes = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    lengths = draw(st.lists(st.integers(1, 9), min_size=batch, max_size=batch))
    padding = [draw(st.integers(0, length - 1)) for length in lengths]
    parents = []
    for _ in range(draw(st.sampled_from([1, batch]))):
        row = [0]
        for node in range(1, nodes):
            row.append(draw(st.sampled_from([p for p in range(node) if row[p] != p or not p])))
        parents.append(row)
    return lengths, padding, parents


@given(case=steps(), window=st.one_of(st.none(), st.integers(1, 12)))
def test_mask_equals_brute_force(case, window):
    lengths, padding, parents = case
    topology = from_parents(parents, device=CPU)
    step = TreeStep(topology.ancestor_mask, topology.depths, cache_of(lengths, padding))
    mask, expected = step.mask(window), brute_force(lengths, padding, parents, window)
    if mask is None:
        assert all(map(all, expected[0]))
        assert topology.num_nodes == 1
        return
    mask = mask.expand(len(lengths), -1, -1, -1)
    assert mask[:, 0].tolist() == expected
    bias = step.bias(window, torch.float32).expand_as(mask)
    assert torch.equal(bias == 0, mask)
    assert torch.equal(bias.isinf(), ~mask)


def test_window_counts_positions_and_not_slots():
    # Nodes 1 and 2 are siblings: the second is two slots behind the root, but one position.
    topology = from_parents([[0, 0, 0]], device=CPU)
    step = TreeStep(topology.ancestor_mask, topology.depths, cache_of([4], [0]))
    assert step.mask(2)[0, 0].int().tolist() == [
        [0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1, 0, 1],
    ]


def test_one_node_that_sees_everything_needs_no_mask():
    topology = chain(0)
    plain = TreeStep(topology.ancestor_mask, topology.depths, cache_of([5], [0]))
    assert plain.mask(None) is None
    assert plain.bias(None, torch.float32) is None
    assert plain.mask(4) is not None
    ragged = TreeStep(topology.ancestor_mask, topology.depths, cache_of([5, 3], [0, 0]))
    assert ragged.mask(None)[1, 0].int().tolist() == [[1, 1, 1, 0, 0, 1]]
    padded = TreeStep(topology.ancestor_mask, topology.depths, cache_of([5, 5], [0, 2]))
    assert padded.mask(None)[1, 0].int().tolist() == [[0, 0, 1, 1, 1, 1]]


def test_mask_of_a_window_is_built_once_a_step():
    topology = chain(2)
    step = TreeStep(topology.ancestor_mask, topology.depths, cache_of([5], [0]))
    assert step.mask(3) is step.mask(3)
    assert step.bias(3, torch.float32) is step.bias(3, torch.float32)
    assert step.bias(3, torch.bfloat16).dtype == torch.bfloat16


def test_implementation_is_ours_inside_and_restored_behind():
    model = shared_model("llama")
    configs = attention_configs(model)
    assert model.config in configs
    with attached(configs):
        assert model.config._attn_implementation == "speclm_sdpa"
        with attached(configs):  # a draft model that is the target
            assert model.config._attn_implementation == "speclm_sdpa"
        assert model.config._attn_implementation == "speclm_sdpa"
    assert model.config._attn_implementation == "sdpa"


def test_implementation_is_ours_until_the_last_of_two_threads_has_left():
    configs = attention_configs(shared_model("llama"))
    first, second = attached(configs), attached(configs)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert configs[0]._attn_implementation == "speclm_sdpa"
    second.__exit__(None, None, None)
    assert configs[0]._attn_implementation == "sdpa"


def test_implementation_is_restored_after_an_exception():
    configs = attention_configs(shared_model("llama"))
    with pytest.raises(KeyboardInterrupt), attached(configs):
        raise KeyboardInterrupt
    assert configs[0]._attn_implementation == "sdpa"


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_is_bit_equal_to_the_models_own(family, implementation):
    model = shared_model(family)
    model.set_attn_implementation(implementation)
    try:
        inputs = prompts(11, 5)
        with torch.no_grad():
            output = model(**inputs, position_ids=positions(inputs), logits_to_keep=1)
            expected = output.logits[:, -1]
            view = TargetView(model)
            cache = view.new_cache((inputs["attention_mask"] == 0).sum(1))
            found = view.prefill(
                inputs["input_ids"], cache, attention_mask=inputs["attention_mask"]
            )
        assert torch.equal(found, expected)
    finally:
        model.set_attn_implementation("sdpa")


def positions(inputs: dict[str, Tensor]) -> Tensor:
    return (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_attention_with_more_than_a_softmax_is_refused(name):
    model = shared_model("llama")
    topology = chain(1)
    states = torch.zeros(1, 2, 2, 4)
    step = TreeStep(topology.ancestor_mask, topology.depths, cache_of([0], [0]))
    with attached(attention_configs(model)), tree_step(step):
        module = model.model.layers[0].self_attn  # any module of a modeling file
        function = ALL_ATTENTION_FUNCTIONS["speclm_sdpa"]
        with pytest.raises(UnsupportedModelError, match=f"{name}.*without trees"):
            function(module, states, states, states, None, scaling=1.0, **{name: torch.ones(2)})
