"""Masks against brute force, nodes against their paths, and a model left as it was found."""

import copy
import pickle
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    masking_utils,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from speclm import attention
from speclm.attention import TreeStep, attached, attention_configs, tree_step
from speclm.cache import TreeCache
from speclm.errors import UnsupportedModelError
from speclm.target import TargetView
from speclm.tree.topology import chain, from_parents
from tests.models import FAMILIES, VOCAB_SIZE, WINDOW, build_model, prompts, randomise, shared_model

CPU = torch.device("cpu")
TOLERANCE = 1e-5
"""Of the logits' spread: float32 sums over other numbers of slots round differently."""


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
    if mask is None:  # plain decoding's own mask is by slot, which here is the position
        assert step.is_plain
        assert topology.num_nodes == len(set(lengths)) == 1
        assert not any(padding)
        return
    mask = mask.expand(len(lengths), -1, -1, -1)
    assert mask[:, 0].tolist() == expected
    bias = step.bias(window, torch.float32)
    assert bias.shape == mask.shape
    assert torch.equal(bias == 0, mask)
    assert torch.equal(bias == torch.finfo(torch.float32).min, ~mask)


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
    assert plain.mask(4) is None
    assert TreeStep(None, torch.arange(3)[None], cache_of([5], [0], pending=2)).is_plain
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


SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
WIDE = {"head_dim": 8, "sliding_window": WINDOW}
KINDS = {"layer_types": ["sliding_attention", "full_attention"]}
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "softcap, window and full": ("gemma2", {**WIDE, **KINDS, "attn_logit_softcapping": 2.0}),
    "two rotations": ("gemma3_text", {**WIDE, **KINDS}),
    "sinks": ("gpt_oss", {**WIDE, **KINDS, **MIXTURE, "num_local_experts": 4}),
    "no interface": ("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}),
    "by name": ("falcon", {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "window in the mask": ("phimoe", {"sliding_window": WINDOW, "num_local_experts": 4}),
    "window in some masks": (
        "qwen2_moe",
        {**MIXTURE, "num_experts": 4, "shared_expert_intermediate_size": 8}
        | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "mask of its own": ("doge", {"sliding_window": WINDOW, "keep_window_size": 5}),
    "latent": (
        "deepseek_v3",
        {**LATENT, **MIXTURE, "v_head_dim": 12, "num_key_value_heads": 4, "head_dim": 8}
        | {"n_group": 1, "topk_group": 1, "n_routed_experts": 4, "first_k_dense_replace": 1},
    ),
}


def build(name: str) -> PreTrainedModel:
    model_type, settings = MODELS[name]
    known = dir(AutoConfig.for_model(model_type))
    shape = {key: value for key, value in SHAPE.items() if key in known}
    config = AutoConfig.for_model(model_type, **{**shape, **settings})
    return randomise(AutoModelForCausalLM.from_config(config).float())


PARENTS = [0, 0, 0, 1, 1, 3, 5, 6, 2]
"""Deeper than a half window, so that it ends in the prompt, in the kept path and in the tree."""
KEPT = [[0, 1, 4], [0, 2]]


def largest_error(model: PreTrainedModel) -> float:
    """Return how far trees of two rounds are from the model's own forward over each path."""
    view, topology = TargetView(model), from_parents([PARENTS], device=CPU)
    inputs = prompts(13, 10)
    padding = (inputs["attention_mask"] == 0).sum(1)
    rows = [row[skip:] for row, skip in zip(inputs["input_ids"], padding.tolist(), strict=True)]
    cache, worst = view.new_cache(padding), 0.0
    view.prefill(inputs["input_ids"], cache, attention_mask=inputs["attention_mask"])
    for seed in (1, 2):
        tree = prompts(len(PARENTS), len(PARENTS), seed=seed)["input_ids"]
        logits = view.forward_tree(tree, topology, cache)
        for row, before in enumerate(rows):
            for path in topology.path_indices[0].tolist():
                nodes = [node for node in path if node >= 0]
                text = torch.cat([before, tree[row, nodes]])
                expected = model(input_ids=text[None], use_cache=False).logits[0, -len(nodes) :]
                error = (logits[row, nodes] - expected).abs().max() / expected.std()
                worst = max(worst, float(error))
        cache.keep(KEPT)
        rows = [torch.cat([rows[row], tree[row, path]]) for row, path in enumerate(KEPT)]
    return worst


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
def test_implementation_that_takes_no_mask_is_replaced_in_trees_alone():
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
def test_plain_attention_is_computed_without_copies_of_shared_heads(family, monkeypatch):
    calls, own = [], attention._attend
    monkeypatch.setattr(attention, "_attend", lambda *given: calls.append(1) or own(*given))
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


def test_what_goes_beyond_a_softmax_is_left_to_the_models_function():
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
    cache = TreeCache(num_layers=1, num_padding=torch.tensor([0, 0]))
    step = TreeStep(None, torch.zeros(1, nodes, dtype=torch.long), cache)
    found = attention._attend(query, key, value, bias, 0.3, step)
    torch.testing.assert_close(found, expected.transpose(1, 2))


def test_mask_of_a_step_is_repeated_once_and_a_models_own_every_time():
    cache = TreeCache(num_layers=1, num_padding=torch.tensor([0, 1]))
    visible = torch.ones(1, 3, 3, dtype=torch.bool).tril()
    step = TreeStep(visible, torch.arange(3)[None], cache)
    bias = step.bias(None, torch.float32)
    first = step.repeated(bias, 2)
    assert step.repeated(bias, 2) is first
    assert torch.equal(first, torch.cat([bias, bias], dim=2))
    other = bias.clone()
    assert step.repeated(other, 2) is not step.repeated(other, 2)
    assert torch.equal(step.repeated(other, 3), torch.cat([bias] * 3, dim=2))


def test_masks_of_another_precision_are_taken():
    model = build("softcap, window and full")
    expected = attend(model, "sdpa", MASK)
    torch.testing.assert_close(attend(model, "sdpa", MASK.double()), expected)


def test_attention_without_a_mask_is_refused_in_a_tree():
    model = build("softcap, window and full")
    with pytest.raises(UnsupportedModelError, match="Gemma2Attention attends without a mask"):
        attend(model, "sdpa", None)


def test_module_without_an_eager_function_is_refused():
    with pytest.raises(UnsupportedModelError, match="no eager_attention_forward beside Linear"):
        attention._previous_function("eager", torch.nn.Linear(1, 1))


def mask_for(function: object, window: int | None) -> Tensor | None:
    topology = chain(1)
    step = TreeStep(topology.ancestor_mask, topology.depths, cache_of([4], [0]))
    config = build_model("llama").config
    with attached([config]), tree_step(step):
        make = ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation]
        return make(batch_size=1, mask_function=function, local_size=window, dtype=torch.float32)


def test_mask_is_that_of_the_window_that_is_asked_for():
    causal = masking_utils.causal_mask_function
    assert (mask_for(causal, None) == 0).int().tolist()[0][0] == [[1] * 5 + [0], [1] * 6]
    window = masking_utils.sliding_window_causal_mask_function(2)
    assert (mask_for(window, 2)[0, 0] == 0).int().tolist() == [[0, 0, 0, 1, 1, 0], [0] * 4 + [1, 1]]


@pytest.mark.parametrize(
    ("function", "window"),
    [
        (masking_utils.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long)), 4),
        (masking_utils.sliding_window_causal_mask_function(3), 4),
        (masking_utils.sliding_window_causal_mask_function(3), None),
        (masking_utils.causal_mask_function, 4),
        (masking_utils.bidirectional_mask_function, None),
        (masking_utils.sliding_window_bidirectional_mask_function(4), 4),
        (masking_utils.or_masks(masking_utils.causal_mask_function, lambda *_: 1), None),
        (len, None),
    ],
)
def test_other_masks_than_causal_ones_are_refused(function, window):
    with pytest.raises(UnsupportedModelError, match=r"asks for a mask by.*sliding window"):
        mask_for(function, window)


def test_name_is_found_by_its_text_and_equal_to_what_it_stands_for():
    config = shared_model("llama").config
    with attached([config]):
        name = config._attn_implementation
        assert name == "speclm_sdpa"
        assert name in ("eager", "sdpa")
        assert name not in ("eager", "flash_attention_2")
        assert name != "eager"
        assert not name != "sdpa"  # noqa: SIM202 - the operator that is tested
        assert name != None  # noqa: E711
        assert {"sdpa": 1, "speclm_sdpa": 2}[name] == 2
        for other in (copy.deepcopy(name), pickle.loads(pickle.dumps(name))):
            assert (other == "sdpa", str(other)) == (True, "speclm_sdpa")


@torch.no_grad()
def test_model_that_compares_the_name_computes_plain_forwards_as_ever_while_attached():
    model = build("by name")
    inputs = prompts(7)["input_ids"]
    expected = model(inputs).logits
    with attached(attention_configs(model)):
        assert torch.equal(model(inputs).logits, expected)
