"""Layers use the kernel where it computes the same, and log why where it does not."""

import functools
import importlib
import logging

import pytest
import torch
from torch import Tensor

from speclm.attention import TreeMask, TreeStep, functions, kernel_calls
from speclm.attention.functions import grouped_attention, previous_function
from speclm.attention.kernel_calls import attend_by_kernel, taken_arguments
from speclm.cache import TreeCache
from speclm.target import TargetView
from speclm.tree.topology import chain, from_parents
from tests.attention.tree_models import CPU, MODELS, build, largest_error
from tests.models import build_model, prompts

TOLERANCE = 1e-4
"""Of the logits' spread: sums in another order, which the routing of experts enlarges."""
BY_KERNEL = {"softcap, window and full", "two rotations", "sinks", "window in the mask"}
BY_KERNEL |= {"window in some masks"}
"""Of `MODELS`; the others change their mask, compute in their own code, or have unequal widths."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Have models go through the kernel's reference; the options of every call."""
    monkeypatch.setenv("SPECLM_KERNELS", "reference")
    made, own = [], kernel_calls.tree_attention

    def recorded(*states, **options):
        made.append(options)
        return own(*states, **options)

    monkeypatch.setattr(kernel_calls, "tree_attention", recorded)
    return made


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_node_is_what_its_path_gives_by_kernel(name, calls):
    model = build(name)
    if name == "softcap, window and full":  # whose default has been sdpa, which ignores the cap
        model.set_attn_implementation("eager")
    assert largest_error(model) < TOLERANCE
    assert bool(calls) == (name in BY_KERNEL)
    if name == "softcap, window and full":
        assert {call["softcap"] for call in calls} == {2.0}
        assert len({call["window"] for call in calls}) == 2
    if name == "sinks":
        assert all(call["sinks"] is not None for call in calls)


@torch.no_grad()
def test_mask_is_never_made_where_all_layers_take_the_kernel(calls, monkeypatch):
    monkeypatch.setattr(TreeStep, "_build", None)
    model = build_model("llama")
    view, topology = TargetView(model), from_parents([[0, 0, 0]], device=CPU)
    view.forward_tree(prompts(3)["input_ids"], topology, view.new_cache(torch.tensor([0])))
    assert len(calls) == model.config.num_hidden_layers
    assert not any(call["check_values"] for call in calls)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flash_attention_2"])
@torch.no_grad()
def test_any_implementation_gives_way_to_the_kernel_in_trees(implementation, calls):
    model = build_model("mistral")
    model.config._attn_implementation_internal = implementation
    view, topology = TargetView(model), from_parents([[0, 0, 0]], device=CPU)
    tree = prompts(3)["input_ids"]
    found = view.forward_tree(tree, topology, view.new_cache(torch.tensor([0])))
    assert len(calls) == model.config.num_hidden_layers
    model.config._attn_implementation_internal = "sdpa"
    expected = view.forward_tree(tree, topology, view.new_cache(torch.tensor([0])))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("family", "taken"),
    [
        ("llama", set()),
        ("qwen3", set()),
        ("gemma2", {"softcap"}),
        ("gemma3", {"softcap"}),
        ("gpt_oss", {"s_aux"}),
        ("llama4", None),  # in chunks
        ("gpt2", None),  # scales by layer
    ],
)
def test_eager_attention_is_known_by_its_code(family, taken):
    file = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    function = file.eager_attention_forward
    found = taken_arguments("eager", function, torch.float32)
    assert found == (None if taken is None else frozenset(taken))
    assert taken_arguments("eager", function, torch.bfloat16) is None  # rounds scores to it


def test_patched_eager_attention_is_not_taken_for_what_it_replaces(monkeypatch):
    from transformers.models.llama import modeling_llama
    from transformers.models.qwen3 import modeling_qwen3

    def patched(module, query, key, value, attention_mask, scaling, **kwargs):
        return query, None

    for other in (patched, functools.partial(patched), len):
        monkeypatch.setattr(modeling_llama, "eager_attention_forward", other)
        assert taken_arguments("eager", other, torch.float32) is None
        own = modeling_qwen3.eager_attention_forward
        assert taken_arguments("eager", own, torch.float32) == frozenset()
    monkeypatch.setattr(modeling_qwen3, "repeat_kv", patched)
    assert taken_arguments("eager", own, torch.float32) is None


def test_what_an_implementation_takes_beyond_a_softmax():
    for dtype in (torch.float32, torch.bfloat16):
        assert taken_arguments("sdpa", len, dtype) == frozenset()
        assert taken_arguments("flash_attention_3", len, dtype) == {"softcap", "s_aux"}


def mask_and_step() -> tuple[TreeMask, TreeStep]:
    topology, cache = chain(1), TreeCache(num_layers=1, num_padding=torch.tensor([0]))
    step = TreeStep(topology.ancestor_mask, topology.depths, cache)
    mask = step.lazy_bias(None, torch.float32)
    assert isinstance(mask, TreeMask)
    return mask, step


def states(
    *,
    value_dim: int = 8,
    nodes: int = 2,
    batch: int = 1,
    q_heads: int = 4,
    kv_len: int = 2,
    kind: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    query = torch.randn(batch, q_heads, nodes, 8)
    return (
        query,
        torch.randn(batch, 2, kv_len, 8),
        torch.randn(batch, 2, kv_len, value_dim).to(kind),
    )


@pytest.mark.parametrize(
    ("takes", "extras", "given", "reason"),
    [
        (None, {}, {}, "its own kind of eager"),
        (frozenset(), {"softcap": 2.0}, {}, "layers pass softcap to attention"),
        (frozenset({"s_aux"}), {"position_bias": 1}, {}, "layers pass position_bias"),
        (frozenset(), {"dropout": 0.1}, {}, "layers pass dropout"),
        (frozenset(), {}, {"value_dim": 5}, "differ in more than the kernel takes"),
        (frozenset(), {}, {"nodes": 1}, "differ in more than the kernel takes"),
        (frozenset(), {}, {"batch": 2}, "differ in more than the kernel takes"),
        (frozenset(), {}, {"kv_len": 3}, "differ in more than the kernel takes"),
        (frozenset(), {}, {"q_heads": 3}, "differ in more than the kernel takes"),
        (frozenset(), {}, {"kind": torch.bfloat16}, "values torch.bfloat16"),
    ],
)
def test_reason_against_the_kernel_is_logged_once(takes, extras, given, reason, calls, caplog):
    mask, step = mask_and_step()
    kernel_calls._log_once.cache_clear()
    with caplog.at_level(logging.INFO, "speclm"):
        for _ in range(2):
            found = attend_by_kernel(
                mask, step, states(**given), takes=takes, scaling=None, extras=extras
            )
            assert found is None
    assert not calls
    (line,) = caplog.messages
    assert reason in line


def test_types_that_autocast_chooses_and_factors_that_are_tensors_are_left_alone(calls):
    mask, step = mask_and_step()
    options = {"takes": frozenset(), "extras": {}}
    with torch.autocast("cpu", torch.bfloat16):
        assert attend_by_kernel(mask, step, states(), scaling=None, **options) is None
    for scaling in (torch.tensor(0.5), 0.0, -1.0, float("inf")):
        obstacle = kernel_calls._obstacle(mask, states(), scaling=scaling, **options)
        assert "scaling of layers is" in obstacle
    assert not calls
    for scaling in (None, 0.5, 1):  # a config may hold a whole number
        assert kernel_calls._obstacle(mask, states(), scaling=scaling, **options) is None


def test_soft_cap_that_is_no_cap_is_left_to_the_layer(calls):
    mask, step = mask_and_step()
    extras, takes = {"softcap": 0.0}, frozenset({"softcap"})
    found = attend_by_kernel(mask, step, states(), takes=takes, scaling=None, extras=extras)
    assert found is None
    assert not calls


@torch.no_grad()
def test_prompt_with_much_padding_that_is_read_with_a_tree_has_no_prefix(calls):
    model, inputs = build_model("llama"), prompts(50, 5)
    view, topology = TargetView(model), from_parents([[0, 0, 0, 1]], device=CPU)
    padding = (inputs["attention_mask"] == 0).sum(1)
    tree = prompts(4, 4, seed=1)["input_ids"]
    found = view.forward_tree(tree, topology, view.new_cache(padding), prompt=inputs["input_ids"])
    for call in calls:
        assert (call["prefix_starts"] <= call["prefix_lengths"]).all()
    for row, skip in enumerate(padding.tolist()):
        text = torch.cat([inputs["input_ids"][row, skip:], tree[row, [0, 1, 3]]])[None]
        expected = model(input_ids=text).logits[0, -3:]
        torch.testing.assert_close(found[row, [0, 1, 3]], expected, rtol=1e-3, atol=1e-3)


def test_head_width_that_triton_does_not_take_is_left_to_pytorch(monkeypatch, caplog):
    monkeypatch.setenv("SPECLM_KERNELS", "reference")
    mask, step = mask_and_step()
    monkeypatch.setenv("SPECLM_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kernel_calls._log_once.cache_clear()
    with caplog.at_level(logging.INFO, "speclm"):
        found = attend_by_kernel(mask, step, states(), takes=frozenset(), scaling=None, extras={})
    assert found is None
    assert "heads of 16, 32" in caplog.messages[0]


@torch.no_grad()
def test_forced_sdpa_computes_with_the_mask(calls, monkeypatch):
    monkeypatch.setenv("SPECLM_KERNELS", "sdpa")
    used, own = [], grouped_attention
    record = lambda *given, **options: used.append(1) or own(*given, **options)  # noqa: E731
    monkeypatch.setattr(functions, "grouped_attention", record)
    view, topology = TargetView(build_model("llama")), from_parents([[0, 0, 0]], device=CPU)
    view.forward_tree(prompts(3)["input_ids"], topology, view.new_cache(torch.tensor([0])))
    assert used
    assert not calls


def test_function_of_a_name_is_the_registered_one():
    module = build_model("llama").model.layers[0].self_attn
    assert previous_function("sdpa", module).__name__ == "sdpa_attention_forward"
    assert previous_function("eager", module).__module__.endswith("modeling_llama")
