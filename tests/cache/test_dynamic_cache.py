"""Imported, exported and rewound caches, against those of the model's own forwards."""

import inspect
from copy import deepcopy
from functools import cache as cached
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    Cache,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
    EncoderDecoderCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GenerationMixin,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    PreTrainedModel,
    StaticCache,
)
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput

from speclm.cache import (
    CACHE_NAME,
    Rewind,
    TreeCache,
    cache_name,
    export_cache,
    import_cache,
    import_obstacle,
    restore,
    snapshot,
)
from speclm.errors import CacheError
from speclm.target import TargetView
from speclm.tree.topology import from_parents
from tests.grids import turns
from tests.models import VOCAB_SIZE, WINDOW, build_model, prompts, randomise, shared_model

TOLERANCE = 2e-4  # of logits whose spread is about 3, and of keys and values, in float32
SPLIT = 13  # slots that regular generation has cached; more than a window
LENGTH = 22

_TINY = {"vocab_size": VOCAB_SIZE, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
_GEMMA = {
    **_TINY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_GEMMA4 = {  # the last two layers read what the first two have cached
    **_GEMMA,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "global_head_dim": 24,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB_SIZE,
}
_DEEPSEEK = {
    **_TINY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
}
_GPT2 = {**_TINY, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
_OTHERS = {
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**_GEMMA)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**_GEMMA)),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**_DEEPSEEK)),
    "gemma4": lambda: Gemma4ForCausalLM(Gemma4TextConfig(**_GEMMA4)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**_GPT2)),
}
FAMILIES = ("llama", "mistral", "qwen2", *_OTHERS)
TREE_FAMILIES = tuple(family for family in FAMILIES if family != "gemma2")  # it caps its scores
PARENTS = [0, 0, 0, 1, 2, 4]


@cached
def model_of(family: str) -> PreTrainedModel:
    return randomise(_OTHERS[family]()) if family in _OTHERS else build_model(family)


def padding_of(inputs: dict[str, Tensor]) -> Tensor:
    return (inputs["attention_mask"] == 0).sum(1)


@torch.no_grad()
def plain_cache(
    model: PreTrainedModel, inputs: dict[str, Tensor], length: int, *, with_config: bool = True
) -> DynamicCache:
    """Return what regular generation caches for the first slots."""
    cache = DynamicCache(config=model.config) if with_config else DynamicCache()
    mask = inputs["attention_mask"][:, :length]
    model(
        input_ids=inputs["input_ids"][:, :length],
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        **{CACHE_NAME: cache},
    )
    return cache


@torch.no_grad()
def continued(
    model: PreTrainedModel, inputs: dict[str, Tensor], past: DynamicCache
) -> tuple[Tensor, TargetView, TreeCache]:
    """Import a cache and run the rest of the prompt behind it."""
    view = TargetView(model)
    cache = view.new_cache(padding_of(inputs))
    import_cache(cache, past)
    length = past.get_seq_length()
    mask = inputs["attention_mask"]
    logits = view.prefill(
        inputs["input_ids"][:, length:], cache, attention_mask=mask if mask.eq(0).any() else None
    )
    return logits, view, cache


@torch.no_grad()
def last_logits(model: PreTrainedModel, row: Tensor) -> Tensor:
    return model(input_ids=row[None]).logits[0, -1]


def rows_of(inputs: dict[str, Tensor]) -> list[Tensor]:
    """Return the tokens of each row without its padding."""
    padding = padding_of(inputs).tolist()
    return [row[count:] for row, count in zip(inputs["input_ids"], padding, strict=True)]


def require_equal(found: DynamicCache, expected: DynamicCache, padding: Tensor) -> None:
    """Check layers, lengths, keys and values; what is at padding is of no meaning."""
    assert type(found) is type(expected)
    assert found.get_seq_length() == expected.get_seq_length()
    assert len(found.layers) == len(expected.layers)
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert type(one) is type(other)
        if other.keys is None:
            continue
        assert one.get_seq_length() == other.get_seq_length()
        assert one.get_mask_sizes(3) == other.get_mask_sizes(3)
        first = other.get_seq_length() - other.keys.shape[2]
        for stored, wanted in ((one.keys, other.keys), (one.values, other.values)):
            assert stored.shape == wanted.shape
            for row, count in enumerate(padding.tolist()):
                skip = max(count - first, 0)
                assert torch.allclose(stored[row, :, skip:], wanted[row, :, skip:], atol=TOLERANCE)


def slots_of(cache: DynamicCache) -> list[tuple[int, Tensor, Tensor]]:
    return [
        (layer.get_seq_length(), layer.keys.clone(), layer.values.clone()) for layer in cache.layers
    ]


def require_unchanged(cache: DynamicCache, before: list[tuple[int, Tensor, Tensor]]) -> None:
    for layer, (length, keys, values) in zip(cache.layers, before, strict=True):
        assert layer.get_seq_length() == length
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


@pytest.mark.parametrize(("family", "with_config"), turns(FAMILIES, [True, False]))
def test_prompt_after_an_imported_cache_has_the_logits_of_one_forward(family, with_config):
    model = model_of(family)
    for lengths in ((LENGTH, LENGTH - 7), (LENGTH, 5), (LENGTH,)):  # 5: padded beyond the cache
        inputs = prompts(*lengths)
        past = plain_cache(model, inputs, SPLIT, with_config=with_config)
        logits, _, cache = continued(model, inputs, past)
        assert cache.host_lengths == [LENGTH] * len(lengths)
        for row, tokens in enumerate(rows_of(inputs)):
            assert torch.allclose(logits[row], last_logits(model, tokens), atol=TOLERANCE)


@pytest.mark.parametrize("family", TREE_FAMILIES)
@torch.no_grad()
def test_trees_after_an_imported_cache_have_the_logits_of_their_paths(family):
    model, inputs = model_of(family), prompts(LENGTH, LENGTH - 7)
    _, view, cache = continued(model, inputs, plain_cache(model, inputs, SPLIT))
    rows = rows_of(inputs)
    topology = from_parents([PARENTS], device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    for kept in ([[0, 2, 4], [0]], [[0, 1], [0, 1, 3]], [[0], [0]]):
        tokens = torch.randint(1, VOCAB_SIZE, (2, len(PARENTS)), generator=generator)
        logits = view.forward_tree(tokens, topology, cache)
        for row, prefix in enumerate(rows):
            for node, path in enumerate(topology.path_indices[0].tolist()):
                above = [index for index in path if index >= 0]
                expected = last_logits(model, torch.cat([prefix, tokens[row, above]]))
                assert torch.allclose(logits[row, node], expected, atol=TOLERANCE)
        cache.keep(kept)
        rows = [torch.cat([rows[row], tokens[row, path]]) for row, path in enumerate(kept)]


@pytest.mark.parametrize(("family", "with_config"), turns(FAMILIES, [False, True]))
def test_exported_cache_is_that_of_regular_generation(family, with_config):
    model, inputs = model_of(family), prompts(LENGTH, LENGTH - 7)
    own = plain_cache(model, inputs, SPLIT, with_config=with_config)
    given_cache = deepcopy(own)
    output = model.generate(
        **inputs, **{CACHE_NAME: own}, max_new_tokens=9, return_dict_in_generate=True
    )
    text = {
        "input_ids": output.sequences[:, :-1],
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 8), value=1),
    }
    _, _, cache = continued(model, text, given_cache)
    export_cache(cache, given_cache, length=LENGTH + 8)
    require_equal(given_cache, own, padding_of(inputs))
    more = {
        "input_ids": torch.cat([output.sequences, prompts(4, 4, seed=2)["input_ids"]], dim=1),
        "attention_mask": torch.nn.functional.pad(text["attention_mask"], (0, 5), value=1),
    }
    continuations = [
        model.generate(**more, **{CACHE_NAME: past}, max_new_tokens=9)
        for past in (own, given_cache, None)
    ]
    assert torch.equal(continuations[0], continuations[1])
    assert torch.equal(continuations[0], continuations[2])
    require_equal(given_cache, own, padding_of(inputs))


@pytest.mark.parametrize("family", ["llama", "qwen2", "deepseek_v3"])
def test_export_to_a_new_cache_equals_a_plain_prefill(family):
    model, inputs = model_of(family), prompts(LENGTH, LENGTH - 7)
    _, _, cache = continued(model, inputs, DynamicCache())
    for length in (LENGTH, WINDOW, 3):
        for config in (model.config, None):
            into = DynamicCache(config=config)
            export_cache(cache, into, length=length)
            expected = plain_cache(model, inputs, length, with_config=config is not None)
            require_equal(into, expected, padding_of(inputs))


@torch.no_grad()
def test_exported_slots_are_copies():
    model, inputs = model_of("mistral"), prompts(LENGTH)
    _, view, cache = continued(model, inputs, DynamicCache())
    into = DynamicCache(config=model.config)
    export_cache(cache, into, length=LENGTH)
    before = slots_of(into)
    cache.crop(2)
    view.prefill(prompts(12, seed=4)["input_ids"], cache)
    require_unchanged(into, before)


@torch.no_grad()
def test_exported_cache_can_be_cropped_as_plain_ones_can():
    inputs = prompts(LENGTH)
    for family in ("llama", "mistral"):
        model = model_of(family)
        past = plain_cache(model, inputs, SPLIT)
        past.activate_past_recording()
        own = deepcopy(past)
        model(input_ids=inputs["input_ids"][:, SPLIT:], **{CACHE_NAME: own})
        _, _, cache = continued(model, inputs, past)
        export_cache(cache, past, length=LENGTH)
        require_equal(past, own, torch.tensor([0]))
        for layers in (past, own):
            layers.crop(-4)
        require_equal(past, own, torch.tensor([0]))
        _, _, again = continued(model, inputs, past)
        assert again.host_lengths == [LENGTH]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@torch.no_grad()
def test_given_cache_is_left_alone_until_the_export(family):
    model, inputs = model_of(family), prompts(LENGTH, LENGTH - 7)
    past = plain_cache(model, inputs, SPLIT)
    before = slots_of(past)
    _, view, cache = continued(model, inputs, past)
    topology = from_parents([PARENTS], device=torch.device("cpu"))
    view.forward_tree(torch.ones(2, len(PARENTS), dtype=torch.long), topology, cache)
    cache.keep([[0, 1], [0]])
    with pytest.raises(IndexError):
        view.forward_tree(
            torch.full((2, len(PARENTS)), VOCAB_SIZE, dtype=torch.long), topology, cache
        )
    require_unchanged(past, before)
    with pytest.raises(CacheError, match=r"23 committed.*13.*found 30.*keep the last path"):
        export_cache(cache, past, length=30)
    with pytest.raises(CacheError, match="found 12"):
        export_cache(cache, past, length=12)
    require_unchanged(past, before)
    export_cache(cache, past, length=SPLIT)
    require_unchanged(past, before)


def test_room_spares_a_second_copy():
    model, inputs = model_of("llama"), prompts(600)
    past = plain_cache(model, inputs, 200)
    for room, copies in ((400, False), (0, True)):
        view = TargetView(model)
        cache = view.new_cache(torch.tensor([0]))
        import_cache(cache, past, room=room)
        pointer = cache.layers[0].keys.data_ptr()
        with torch.no_grad():
            view.prefill(inputs["input_ids"][:, 200:], cache)
        assert (cache.layers[0].keys.data_ptr() != pointer) == copies


def test_empty_caches_leave_the_tree_cache_empty():
    for past in (DynamicCache(), DynamicCache(config=model_of("qwen2").config)):
        cache = TreeCache(num_layers=3, num_padding=torch.tensor([0]))
        import_cache(cache, past)
        assert cache.get_seq_length() == 0
        assert cache.capacity == 0


FACTS = {"num_layers": 2, "batch": 1, "num_tokens": 9}


def filled(cache: Cache, *, layers: int = 2, rows: int = 1, slots: int = 4) -> Cache:
    for index in range(layers):
        cache.update(torch.ones(rows, 2, slots, 6), torch.ones(rows, 2, slots, 6), index)
    return cache


def unequal() -> Cache:
    cache = filled(DynamicCache())
    cache.layers[1].crop(-1)
    return cache


class OwnCache(DynamicCache):
    """A cache whose methods may count in another way."""


OBSTACLES = {
    "is a EncoderDecoderCache": lambda: EncoderDecoderCache(DynamicCache(), DynamicCache()),
    "is a StaticCache": lambda: StaticCache(model_of("llama").config, max_cache_len=16),
    "is a OwnCache": OwnCache,
    "type LinearAttentionLayer": lambda: with_layers(DynamicLayer(), LinearAttentionLayer()),
    "of 3 to 4 slots": unequal,
    "has 3 layers, the model 2": lambda: filled(DynamicCache(), layers=3),
    "has 2 rows, the prompt 1": lambda: filled(DynamicCache(), rows=2),
    "holds 9 slots, so none of the prompt's 9": lambda: filled(DynamicCache(), slots=9),
}


def with_layers(*layers: object) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = list(layers)
    return cache


@pytest.mark.parametrize("words", OBSTACLES)
def test_caches_that_cannot_be_imported_are_named(words):
    past = OBSTACLES[words]()
    assert words in import_obstacle(past, **FACTS)
    if "none of" not in words:  # the tree cache does not know the prompt
        cache = TreeCache(num_layers=2, num_padding=torch.tensor([0]))
        with pytest.raises(CacheError, match=f"{words}.*pass a cache that this model made"):
            import_cache(cache, past)
        assert cache.get_seq_length() == 0


def test_caches_that_can_be_imported_have_no_obstacle():
    for past in (DynamicCache(), filled(DynamicCache()), filled(DynamicCache(), slots=8)):
        assert import_obstacle(past, **FACTS) is None
    sliding = with_layers(DynamicLayer(), DynamicSlidingWindowLayer(sliding_window=3))
    assert import_obstacle(filled(sliding), **FACTS) is None


def test_tuples_are_named():
    assert "is a tuple" in import_obstacle((), **FACTS)


def test_offloaded_caches_are_named():
    past = DynamicCache(offloading=True)
    assert "moves its layers off the device" in import_obstacle(past, **FACTS)


def test_import_into_a_cache_in_use_is_refused():
    cache = TreeCache(num_layers=2, num_padding=torch.tensor([0]))
    import_cache(cache, filled(DynamicCache()))
    with pytest.raises(CacheError, match=r"holds 4 slots.*before the first forward"):
        import_cache(cache, filled(DynamicCache()))


def test_cache_that_lacks_a_layer_is_refused_by_the_first_forward():
    model, inputs = model_of("llama"), prompts(9)
    past = plain_cache(model, inputs, 4)
    for layers in ([past.layers[0]], [past.layers[0], DynamicLayer()]):
        with pytest.raises(CacheError, match=r"4 slots and none of a layer.*this model made"):
            continued(model, inputs, with_layers(*layers))


@pytest.mark.parametrize(
    "past",
    [
        SimpleNamespace(heads=1, dtype=torch.float32),
        SimpleNamespace(heads=2, dtype=torch.float64),
    ],
    ids=["heads", "dtype"],
)
def test_cache_of_another_model_is_refused_by_the_first_forward(past):
    model, inputs = model_of("llama"), prompts(9)
    foreign = DynamicCache()
    states = torch.ones(1, past.heads, 4, 20, dtype=past.dtype)
    for index in range(2):
        foreign.update(states, states, index)
    before = slots_of(foreign)
    with pytest.raises(CacheError, match=r"rows and heads, the model wrote.*this model made"):
        continued(model, inputs, foreign)
    require_unchanged(foreign, before)


@st.composite
def exchanges(draw: st.DrawFn) -> dict[str, int]:
    """Slots before and after the import, and the window of a layer."""
    names = {"past": (0, 12), "new": (1, 12), "window": (2, 9), "batch": (1, 3), "drop": (0, 11)}
    return {name: draw(st.integers(*bounds)) for name, bounds in names.items()}


@given(case=exchanges())
def test_import_then_export_equals_updates_of_the_given_cache(case):
    past, new = case["past"], case["new"]
    given_cache, expected = (
        with_layers(DynamicLayer(), DynamicSlidingWindowLayer(sliding_window=case["window"]))
        for _ in range(2)
    )
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(2, 2, case["batch"], 2, past + new, 3, generator=generator)
    before, after = states.split([past, new], dim=4)
    if past:
        for index in range(2):
            given_cache.update(*before[index], index)
            expected.update(*before[index], index)
    cache = TreeCache(num_layers=2, num_padding=torch.zeros(case["batch"], dtype=torch.long))
    import_cache(cache, given_cache)
    cache.reserve(new)
    for index in range(2):
        keys, _ = cache.layers[index].update(*after[index])
        held = min(past, case["window"] - 1) if index else past
        assert torch.equal(keys[:, :, past - held :], states[index, 0, :, :, past - held :])
        assert not keys[:, :, : past - held].any()
    cache.append(new)
    cache.commit_prompt()
    length = past + max(new - case["drop"], 0)
    for index in range(2):
        if length > past:
            expected.update(*after[index, ..., : length - past, :], index)
    export_cache(cache, given_cache, length=length)
    for found, wanted in zip(given_cache.layers, expected.layers, strict=True):
        assert found.get_seq_length() == wanted.get_seq_length() == length
        if length:
            assert torch.equal(found.keys, wanted.keys)
            assert torch.equal(found.values, wanted.values)


@cached
def windowed(window: int) -> PreTrainedModel:
    return build_model("mistral", sliding_window=window)


@given(
    window=st.sampled_from([2, 5, 8, 64]),
    length=st.integers(2, 20),
    split=st.integers(1, 19),
    shorter=st.integers(0, 19),
)
def test_any_split_of_a_prompt_gives_the_logits_of_one_forward(window, length, split, shorter):
    model, split = windowed(window), min(split, length - 1)
    inputs = prompts(length, max(length - shorter, 1))
    past = plain_cache(model, inputs, split)
    logits, _, cache = continued(model, inputs, past)
    for row, tokens in enumerate(rows_of(inputs)):
        assert torch.allclose(logits[row], last_logits(model, tokens), atol=TOLERANCE)
    export_cache(cache, past, length=length)
    require_equal(past, plain_cache(model, inputs, length), padding_of(inputs))


TWO_ROWS = (11, 6)


def tensors_of(cache: DynamicCache) -> list[Tensor]:
    found: list[Tensor] = []
    for layer in cache.layers:
        for value in vars(layer).values():
            parts = value.values() if isinstance(value, dict) else [value]
            found += [part.clone() for part in parts if isinstance(part, Tensor)]
    return found


def attributes_of(cache: DynamicCache) -> list[dict[str, Any]]:
    plain = int | bool | None
    return [
        {n: v for n, v in vars(layer).items() if isinstance(v, plain)} for layer in cache.layers
    ]


@torch.no_grad()
def read(model: PreTrainedModel, cache: DynamicCache, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, **{CACHE_NAME: cache}, use_cache=True).logits


def after_prompt(model: PreTrainedModel) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    read(model, cache, prompts(TWO_ROWS[0], TWO_ROWS[0])["input_ids"])
    return cache


def some_tokens(num_tokens: int) -> Tensor:
    return torch.arange(2 * num_tokens).view(2, -1) * 7 % VOCAB_SIZE


def require_same(found: DynamicCache, expected: DynamicCache) -> None:
    for one, other in zip(tensors_of(found), tensors_of(expected), strict=True):
        assert torch.equal(one, other)
    assert attributes_of(found) == attributes_of(expected)


@pytest.mark.parametrize("num_dropped", [0, 1, 3])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_dropped_slots_leave_what_a_shorter_text_leaves(family, num_dropped):
    model, tokens = shared_model(family), some_tokens(3)
    cache, expected = after_prompt(model), after_prompt(model)
    rewind = Rewind(cache)
    assert rewind.is_croppable
    rewind.mark()
    read(model, cache, tokens)
    rewind.drop(num_dropped)
    if num_dropped < 3:
        read(model, expected, tokens[:, : 3 - num_dropped])
    rewind.release()
    assert cache.get_seq_length() == TWO_ROWS[0] + 3 - num_dropped
    for one, other in zip(tensors_of(cache), tensors_of(expected), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert attributes_of(cache) == attributes_of(expected)


def test_recurrent_states_are_restored_as_often_as_they_are_marked():
    model = shared_model("qwen3_next")
    cache, expected = after_prompt(model), after_prompt(model)
    rewind = Rewind(cache)
    assert not rewind.is_croppable
    for num_tokens in (1, 4):
        rewind.mark()
        read(model, cache, some_tokens(num_tokens))
        rewind.restore()
        require_same(cache, expected)
    rewind.release()
    require_same(cache, expected)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3_next"])
@pytest.mark.parametrize("is_empty", [True, False])
def test_snapshot_is_restored(family, is_empty):
    model = shared_model(family)
    cache, expected = (
        DynamicCache(config=model.config) if is_empty else after_prompt(model) for _ in range(2)
    )
    states = snapshot(cache)
    read(model, cache, some_tokens(5))
    restore(cache, states)
    require_same(cache, expected)


def test_layers_added_since_a_snapshot_are_removed():
    model, cache = shared_model("llama"), DynamicCache()
    states = snapshot(cache)
    read(model, cache, some_tokens(5))
    restore(cache, states)
    assert cache.layers == []


@torch.no_grad()
def test_a_further_forward_sees_no_slots_before_a_window():
    model, tokens = shared_model("mistral"), some_tokens(5)
    cache, expected = after_prompt(model), after_prompt(model)
    rewind = Rewind(cache)
    rewind.mark()
    read(model, cache, tokens[:, :3])
    for step in (3, 4):
        rewind.narrow()
        assert all(layer.keys.shape[-2] == layer.sliding_window - 1 for layer in cache.layers)
        read(model, cache, tokens[:, [step]])
    rewind.drop(2)
    rewind.release()
    read(model, expected, tokens[:, :3])
    require_same(cache, expected)


def test_models_take_and_return_a_cache_under_the_name():
    cache = DynamicCache()
    output = shared_model("llama")(**prompts(4), **{CACHE_NAME: cache}, use_cache=True)
    assert output[CACHE_NAME] is cache
    assert cache.get_seq_length() == 4
    assert CACHE_NAME in inspect.signature(LlamaForCausalLM.forward).parameters
    assert GenerateDecoderOnlyOutput(sequences=None, **{CACHE_NAME: cache})[CACHE_NAME] is cache


def test_a_models_own_name_is_that_of_generate():
    sizes = {"hidden_size": 8, "num_heads": 4, "head_dim": 4, "n_groups": 1, "vocab_size": 16}
    recurrent = Mamba2ForCausalLM(Mamba2Config(**sizes, num_hidden_layers=1, state_size=4))
    for model in (shared_model("llama"), recurrent):
        prepared = {}
        GenerationMixin._prepare_cache_for_generation(
            model, model.generation_config, prepared, None, 1, 8
        )
        assert list(prepared) == [cache_name(model)]
