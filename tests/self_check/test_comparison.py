"""Trees and chains pass on good models, planted errors are found, and forced text is generated."""

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, BloomConfig, BloomForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from speclm.attention import TreeStep, active_step
from speclm.attention.registration import register
from speclm.cache import CACHE_NAME, TreeCache
from speclm.self_check.comparison import check_chains, check_trees, regular_logits
from speclm.self_check.verdict import Verification
from speclm.target import ChainReader, TargetView
from tests.families import FAMILIES as FAMILY_ROWS
from tests.families import build_family, build_type
from tests.models import FAMILIES, VOCAB_SIZE, build_model, prompts, randomise, shared_model
from tests.multimodal import shared_wrapper

INPUTS = prompts(5, 3)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_supported_families_pass(family):
    check = check_trees(TargetView(shared_model(family)))
    assert check.passes
    assert check.error < 1e-4
    assert "passed" in check.reason


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_pass(dtype):
    assert check_trees(TargetView(build_model("qwen2").to(dtype))).passes


def require_refused(family: str = "llama") -> None:
    check = check_trees(TargetView(shared_model(family)))
    assert not check.passes
    assert check.error > 1e-3
    assert "differ" in check.reason


def plant_mask(monkeypatch: pytest.MonkeyPatch, change: object) -> None:
    original = TreeStep._build

    def build(step: TreeStep, window: int | None) -> Tensor | None:
        return change(step, original, window)

    monkeypatch.setattr(TreeStep, "_build", build)


@pytest.mark.parametrize("family", FAMILIES)
def test_ignored_mask_is_found(monkeypatch, family):
    plant_mask(monkeypatch, lambda step, build, window: torch.ones_like(build(step, window)))
    require_refused(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_ignored_ancestors_are_found(monkeypatch, family):
    def causal(step, build, window):
        mask = build(step, window)
        nodes = mask.shape[2]
        mask[..., -nodes:] = torch.ones(nodes, nodes, dtype=torch.bool).tril()
        return mask

    plant_mask(monkeypatch, causal)
    require_refused(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_ignored_padding_is_found(monkeypatch, family):
    def see_padding(step, build, window):
        mask = build(step, window)
        mask[1, ..., 0] = True
        return mask

    plant_mask(monkeypatch, see_padding)
    require_refused(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_ignored_raggedness_is_found(monkeypatch, family):
    def see_gap(step, build, window):
        mask = build(step, window)
        lengths = step._cache.host_lengths
        for row, length in enumerate(lengths):
            mask[row, ..., length : max(lengths)] = True
        return mask

    plant_mask(monkeypatch, see_gap)
    require_refused(family)


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_window_by_slot_index_is_found(monkeypatch, family):
    def by_slot(step, build, window):
        mask = build(step, None)
        if window is not None:
            nodes, slots = mask.shape[2:]
            node_slots = torch.arange(slots - nodes, slots)[:, None]
            mask = mask & (node_slots - torch.arange(slots) < window)
        return mask

    plant_mask(monkeypatch, by_slot)
    require_refused(family)


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_ignored_window_is_found(monkeypatch, family):
    plant_mask(monkeypatch, lambda step, build, window: build(step, None))
    require_refused(family)


@pytest.mark.parametrize("is_everywhere", [True, False])
@pytest.mark.parametrize("shift", [1, -1])
def test_shifted_positions_are_found(monkeypatch, shift, is_everywhere):
    # Rotary attention knows distances alone: nodes are shifted against what is before them.
    original = TargetView._forward

    def shifted(view, tokens, **inputs):
        if is_everywhere or inputs[CACHE_NAME].tree_start > 0:
            inputs["position_ids"][:, -4:] += shift
        return original(view, tokens, **inputs)

    monkeypatch.setattr(TargetView, "_forward", shifted)
    for family in FAMILIES:
        require_refused(family)


def plant_attention(monkeypatch, name, change):
    """Wrap what attention calls in trees."""
    registered = register(name)
    original = ALL_ATTENTION_FUNCTIONS[registered]

    def attend(module, *args, **kwargs):
        if active_step() is None:
            return original(module, *args, **kwargs)
        return change(original, module, *args, **kwargs)

    functions = ALL_ATTENTION_FUNCTIONS._global_mapping
    monkeypatch.setitem(functions, registered, attend)


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_scaling_is_found(monkeypatch, family):
    def wrong(original, *args, **kwargs):
        return original(*args, **{**kwargs, "scaling": 1.05 * kwargs["scaling"]})

    plant_attention(monkeypatch, "sdpa", wrong)
    require_refused(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_a_wrong_path_is_found(monkeypatch, family):
    original = TreeCache.keep

    def wrong(cache, paths):
        original(cache, [[*range(len(path))] for path in paths])  # the first slots

    monkeypatch.setattr(TreeCache, "keep", wrong)
    require_refused(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_without_moving_is_found(monkeypatch, family):
    monkeypatch.setattr(TreeCache, "_move", lambda *_: None)
    require_refused(family)


OWN_TERMS = {
    "gemma2": {"attn_logit_softcapping": 2.0, "head_dim": 16},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 16},
}


def drop_soft_cap(original, *args, **kwargs):
    return original(*args, **{**kwargs, "softcap": None})


def drop_sinks(original, module, *args, **kwargs):
    sinks = module.sinks.data
    module.sinks.data = torch.full_like(sinks, -1e4)
    try:
        return original(module, *args, **kwargs)
    finally:
        module.sinks.data = sinks


@pytest.mark.parametrize(
    ("model_type", "drop"), [("gemma2", drop_soft_cap), ("gpt_oss", drop_sinks)]
)
def test_dropped_soft_caps_and_sinks_are_found(monkeypatch, model_type, drop):
    torch.manual_seed(0)
    own = {"sliding_window": 8, "attn_implementation": "eager", **OWN_TERMS[model_type]}
    config = AutoConfig.for_model(model_type, **SIZES, **own)
    view = TargetView(randomise(AutoModelForCausalLM.from_config(config)))
    assert check_trees(view).passes
    plant_attention(monkeypatch, "eager", drop)
    check = check_trees(view)
    assert not check.passes
    assert "differ" in check.reason


def test_models_that_read_unpadded_prompts_otherwise_are_found():
    assert not check_trees(TargetView(shared_wrapper("paligemma"))).passes


def test_nan_only_in_the_tree_is_found(monkeypatch):
    original = TargetView.forward_tree

    def broken(view, tokens, topology, cache, **options):
        logits = original(view, tokens, topology, cache, **options)
        logits[0, 3, 5] = torch.nan
        return logits

    monkeypatch.setattr(TargetView, "forward_tree", broken)
    assert not check_trees(TargetView(shared_model("llama"))).passes


def test_failing_forward_is_a_refusal_with_its_reason(monkeypatch):
    def fail(*_: object, **__: object) -> Tensor:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(TargetView, "forward_tree", fail)
    check = check_trees(TargetView(shared_model("llama")))
    assert not check.passes
    assert "ZeroDivisionError: planted" in check.reason


LOCAL_BY_SLOT = {
    "attention_types": [[["global", "local"], 1]],
    "num_layers": 2,
    "num_heads": 4,
    "window_size": 64,  # longer than the prompts of the check
}


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("gpt_neo", LOCAL_BY_SLOT, "bias masks by slot"),
        ("llama", {"alibi": True}, "ALiBi"),
        ("llama", {"layer_types": ["linear_attention"] * 2}, "layers of type linear_attention"),
    ],
)
def test_what_a_short_check_cannot_see_is_refused_by_the_config(model_type, settings, reason):
    sizes = {**SIZES, **settings}
    config = AutoConfig.for_model(model_type, **sizes)
    check = check_trees(TargetView(AutoModelForCausalLM.from_config(config).eval()))
    assert not check.passes
    assert reason in check.reason


@pytest.mark.parametrize("family", FAMILIES)
def test_models_that_take_trees_take_chains_too(family):
    check = check_chains(TargetView(shared_model(family)))
    assert check.verification is Verification.CHAINS
    assert check.error < 1e-4


def alibi():
    config = BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0)
    return randomise(BloomForCausalLM(config))


def test_model_with_alibi_takes_chains():
    assert check_chains(TargetView(alibi())).verification is Verification.CHAINS


def test_rejected_tokens_that_stay_are_found(monkeypatch):
    keep = ChainReader.keep
    fed = []

    def remember(reader, tokens):
        fed.append(tokens.shape[1])
        return feed(reader, tokens)

    feed = ChainReader.feed
    monkeypatch.setattr(ChainReader, "feed", remember)
    monkeypatch.setattr(ChainReader, "keep", lambda reader, _: keep(reader, fed[-1]))
    check = check_chains(TargetView(alibi()))
    assert check.verification is Verification.REGULAR
    assert "differ" in check.reason


def test_logits_that_are_not_numbers_are_found(monkeypatch):
    feed = ChainReader.feed

    def broken(reader, tokens):
        logits = feed(reader, tokens)
        return logits if tokens.shape[1] == 1 else torch.full_like(logits, torch.nan)

    monkeypatch.setattr(ChainReader, "feed", broken)
    assert check_chains(TargetView(alibi())).verification is Verification.REGULAR


def nemotron_h():
    return build_family("nemotron_h").bfloat16()  # rounds by more than its bound changes


def bounded_mamba2():
    settings = FAMILY_ROWS["mamba2"].settings
    return randomise(build_type("mamba2", {**settings, "time_step_limit": (0.0, 1e4)}))


@pytest.mark.parametrize("build", [nemotron_h, bounded_mamba2])
def test_time_steps_that_are_bounded_only_in_chains_are_refused_where_the_check_sees_none(build):
    check = check_chains(TargetView(build()))
    assert check.verification is Verification.REGULAR
    assert check.error < 0.1
    assert "time steps are bounded" in check.reason


def logits_of(model, text):
    with torch.no_grad():
        return regular_logits(
            TargetView(model), INPUTS["input_ids"], INPUTS["attention_mask"], text
        )


def test_logits_are_those_of_generate():
    model = shared_model("llama")
    settings = {"do_sample": False, "max_new_tokens": 4}
    output = model.generate(**INPUTS, **settings, return_dict_in_generate=True, output_logits=True)
    found = logits_of(model, output.sequences[:, 5:8])
    assert torch.equal(found, torch.stack(output.logits, dim=1))


def test_generation_config_of_the_model_is_neither_read_nor_changed():
    model, text = build_model("llama"), torch.tensor([[7, 8], [9, 10]])
    expected = logits_of(model, text)
    model.generation_config.update(
        num_beams=3, do_sample=True, stop_strings=["x"], eos_token_id=7, repetition_penalty=2.0
    )
    before = model.generation_config.to_dict()
    state = torch.get_rng_state()
    assert torch.equal(logits_of(model, text), expected)
    assert model.generation_config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)
