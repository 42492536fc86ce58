"""Nodes against their paths, and attention functions against the models' own."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel, masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from speclm.attention import TreeStep, attached, functions, tree_step
from speclm.attention.functions import grouped_attention, previous_function
from speclm.errors import UnsupportedModelError
from speclm.target import TargetView
from speclm.tree.topology import chain, from_parents
from tests.attention.tree_models import CPU, MODELS, TOLERANCE, build, cache_of, largest_error
from tests.models import FAMILIES, build_model, prompts, shared_model


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


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_node_is_what_its_path_gives(name):
    model = build(name)
    implementation = model.config._attn_implementation
    assert largest_error(model) < TOLERANCE
    assert type(model.config._attn_implementation) is str
    assert model.config._attn_implementation == implementation
    assert TargetView(model).tree_obstacle() is None


@pytest.mark.parametrize("name", ["two rotations", "by name", "mask of its own"])
@torch.no_grad()
def test_every_node_is_what_its_path_gives_in_eager_attention(name):
    model = build(name)
    model.set_attn_implementation("eager")
    assert largest_error(model) < TOLERANCE


@torch.no_grad()
def test_implementation_that_takes_no_mask_is_replaced_only_in_trees():
    def masked(*args, **kwargs):
        raise AssertionError("called for a tree")

    AttentionInterface.register("takes_no_mask", masked)
    model = build_model("mistral")
    model.config._attn_implementation_internal = "takes_no_mask"
    view, topology = TargetView(model), from_parents([[0, 0, 0]], device=CPU)
    tree = prompts(3)["input_ids"]
    found = view.forward_tree(tree, topology, view.new_cache(torch.tensor([0])))
    with pytest.raises(AssertionError, match="called for a tree"):
        view.prefill(tree, view.new_cache(torch.tensor([0])))
    model.config._attn_implementation_internal = "sdpa"
    expected = view.forward_tree(tree, topology, view.new_cache(torch.tensor([0])))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_attention_is_computed_without_copies_of_shared_heads(family, monkeypatch):
    calls, own = [], functions.grouped_attention
    record = lambda *given, **options: calls.append(1) or own(*given, **options)  # noqa: E731
    monkeypatch.setattr(functions, "grouped_attention", record)
    model = shared_model(family)
    view, topology = TargetView(model), from_parents([[0, 0, 0]], device=CPU)
    view.forward_tree(prompts(3)["input_ids"], topology, view.new_cache(torch.tensor([0])))
    assert len(calls) == model.config.num_hidden_layers


def states_of(model: PreTrainedModel, nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    config, generator = model.config, torch.Generator().manual_seed(3)
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    return tuple(torch.randn(1, count, nodes, 8, generator=generator) for count in heads)


def attend(model: PreTrainedModel, previous: str, mask: Tensor | None, **extras: object) -> Tensor:
    """Call attention of a tree of two nodes as a layer of the model does."""
    topology, module = chain(1), model.model.layers[0].self_attn
    step = TreeStep(topology.ancestor_mask, topology.depths, cache_of([0], [0]))
    model.config._attn_implementation_internal = previous
    with attached([model.config]), tree_step(step):
        function = ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation]
        return function(module, *states_of(model, 2), mask, scaling=0.5, **extras)[0]


MASK = torch.zeros(1, 1, 2, 2).masked_fill_(~torch.ones(2, 2).tril().bool(), -1e30)


def test_extra_arguments_are_left_to_the_models_function():
    model = build("softcap, window and full")
    plain = attend(model, "eager", MASK)
    capped = attend(model, "eager", MASK, softcap=0.5)
    assert not torch.allclose(plain, capped, atol=1e-3)
    # An implementation that takes no mask cannot be asked, the modeling file's own can.
    assert torch.equal(attend(model, "flash_attention_2", MASK, softcap=0.5), capped)
    torch.testing.assert_close(attend(model, "flash_attention_2", MASK), plain)
    torch.testing.assert_close(attend(model, "sdpa", MASK, sliding_window=3), plain)


def test_biases_of_positions_are_added_to_the_mask():
    model, bias = build("softcap, window and full"), torch.randn(1, 4, 2, 2)
    found = attend(model, "sdpa", MASK, position_bias=bias)
    torch.testing.assert_close(found, attend(model, "sdpa", MASK + bias))


@pytest.mark.parametrize("mask_heads", [1, 4])
@pytest.mark.parametrize("nodes", [1, 3, 8, 9])  # the heads are 8 wide
def test_heads_that_share_keys_attend_like_heads_with_copies(nodes, mask_heads):
    generator = torch.Generator().manual_seed(4)
    query, key, value = (
        torch.randn(2, heads, length, width, generator=generator)
        for heads, length, width in ((4, nodes, 8), (2, 11, 8), (2, 11, 5))
    )
    bias = torch.randn(2, mask_heads, nodes, 11, generator=generator)
    copies = (states.repeat_interleave(2, 1) for states in (key, value))
    expected = F.scaled_dot_product_attention(query, *copies, attn_mask=bias, scale=0.3)
    repeat = lambda mask, groups: mask.repeat(1, 1, groups, 1)  # noqa: E731
    found = grouped_attention(query, key, value, bias, scale=0.3, repeat=repeat)
    torch.testing.assert_close(found, expected.transpose(1, 2))


def test_masks_of_another_precision_are_taken():
    model = build("softcap, window and full")
    expected = attend(model, "sdpa", MASK)
    torch.testing.assert_close(attend(model, "sdpa", MASK.double()), expected)


def test_attention_without_a_mask_is_refused_in_a_tree():
    model = build("softcap, window and full")
    with pytest.raises(UnsupportedModelError, match="Gemma2Attention attends without a mask"):
        attend(model, "sdpa", None)


def test_module_without_an_eager_function_is_refused():
    with pytest.raises(UnsupportedModelError, match="no eager_attention_forward next to Linear"):
        previous_function("eager", torch.nn.Linear(1, 1))


def mask_for(function: object, window: int | None) -> Tensor | None:
    topology = chain(1)
    step = TreeStep(topology.ancestor_mask, topology.depths, cache_of([4], [0]))
    config = build_model("llama").config
    with attached([config]), tree_step(step):
        make = ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation]
        return make(batch_size=1, mask_function=function, local_size=window, dtype=torch.float32)


def test_mask_is_that_of_the_window_of_the_layer():
    causal = masking_utils.causal_mask_function
    assert (mask_for(causal, None) == 0).int().tolist()[0][0] == [[1] * 5 + [0], [1] * 6]
    window = masking_utils.sliding_window_causal_mask_function(2)
    assert (mask_for(window, 2)[0, 0] == 0).int().tolist() == [[0, 0, 0, 1, 1, 0], [0] * 4 + [1, 1]]


def test_other_masks_than_causal_ones_are_refused():
    others = [
        (masking_utils.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long)), 4),
        (masking_utils.sliding_window_causal_mask_function(3), 4),
        (masking_utils.sliding_window_causal_mask_function(3), None),
        (masking_utils.causal_mask_function, 4),
        (masking_utils.bidirectional_mask_function, None),
        (masking_utils.sliding_window_bidirectional_mask_function(4), 4),
        (masking_utils.or_masks(masking_utils.causal_mask_function, lambda *_: 1), None),
        (len, None),
    ]
    for function, window in others:
        with pytest.raises(UnsupportedModelError, match=r"asks for a mask by.*sliding window"):
            mask_for(function, window)


@torch.no_grad()
def test_mask_that_a_model_writes_to_counts_for_all_layers(monkeypatch):
    model = build_model("llama")
    view, topology = TargetView(model), from_parents([[0, 0, 0]], device=CPU)
    tree = prompts(3)["input_ids"]
    layer, found = model.model.layers[0], {}

    def hide_the_first_slot(module, args, kwargs):
        kwargs["attention_mask"][..., 1:, 0] = -1e30

    with layer.register_forward_pre_hook(hide_the_first_slot, with_kwargs=True):
        for backend in ("sdpa", "reference"):
            monkeypatch.setenv("SPECLM_KERNELS", backend)
            found[backend] = view.forward_tree(tree, topology, view.new_cache(torch.tensor([0])))
    torch.testing.assert_close(found["reference"], found["sdpa"])
