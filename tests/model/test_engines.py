"""The option `engine`: what it may be, where it runs, and what happens when it cannot."""

import copy

import pytest
import torch
from transformers import DynamicCache

from speclm import SpecModel
from speclm.attention import attached, attention_configs
from speclm.cache import CACHE_NAME
from speclm.devices import device_path
from speclm.engines import CompileEngine, Engine
from speclm.errors import OptionError
from speclm.methods.draft_model.proposer import DraftModelProposer
from speclm.model.engines import Engines, normalize_engine
from speclm.target import TargetView
from speclm.target.static_keep import accept_and_keep
from tests.models import build_model, generate, prompts, shared_model
from tests.stand_ins import replaying

ROUNDING = 1e-4  # of states of random models, up to 10
GREEDY = {"do_sample": False, "max_new_tokens": 12}


def spec_model(model=None, **options) -> SpecModel:
    base = shared_model("llama") if model is None else model
    draft = DraftModelProposer(shared_model("llama", 3), target=base, depth=3, min_probability=0.0)
    return SpecModel(base, draft, adaptive=False, **options)


@pytest.mark.parametrize("name", ["auto", "eager", "compile", "graph"])
def test_names_of_engines_are_kept(name):
    assert normalize_engine(name) == name
    assert spec_model(engine=name).engine == name


@pytest.mark.parametrize("engine", ["inductor", "Graph", None, 3, CompileEngine])
def test_an_unknown_engine_is_an_error_that_lists_those_there_are(engine):
    with pytest.raises(OptionError, match=r"expected one of \['auto', 'compile', 'eager', 'graph'"):
        normalize_engine(engine)
    if engine is not None:
        with pytest.raises(OptionError, match="engine is"):
            spec_model().generate(**prompts(3), engine=engine, **GREEDY)
    with pytest.raises(OptionError, match="engine is"):
        SpecModel.from_pretrained(shared_model("llama"), None, engine=engine)


def test_graphs_on_a_cpu_are_an_error_and_the_model_stays_usable():
    spec = spec_model(engine="graph")
    with pytest.raises(OptionError, match=r"'graph' cannot be used: graphs need a CUDA device"):
        spec.generate(**prompts(3), **GREEDY)
    assert spec.generate(**prompts(3), engine="eager", **GREEDY).shape == (1, 15)
    assert spec.last_speculation.engine == "eager"


def test_automatic_choice_never_compiles(monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    spec = SpecModel.from_pretrained(shared_model("llama"), None)
    spec.generate(**prompts(3), **GREEDY)
    assert spec.last_speculation.engine == "eager"
    assert spec.last_speculation.engine_summary == ""


@pytest.mark.parametrize("lengths", [(7,), (6, 3)])
@pytest.mark.parametrize("is_sampled", [False, True])
def test_tokens_and_generator_are_the_same_by_replays(lengths, is_sampled):
    spec, inputs = spec_model(engine=replaying()), prompts(*lengths)
    options = {**GREEDY, "do_sample": is_sampled}
    for _ in range(3):
        found, expected = (generate(model, inputs, **options) for model in (spec, spec.base))
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
    stats = spec.last_speculation
    assert stats.engine == "graph"
    assert stats.engine_seconds == 0  # all was compared in the first call, recorded in the second
    assert "engine      graph" in str(stats)
    assert stats.to_dict()["engine"] == "graph"


@pytest.mark.parametrize(("lengths", "eos"), [((7,), None), ((6, 3, 5), [3, 9, 11])])
def test_tokens_are_the_same_where_acceptance_is_a_stage_too(lengths, eos):
    spec, inputs = spec_model(engine=replaying()), prompts(*lengths)
    options = {**GREEDY, "eos_token_id": eos}
    expected = spec.base.generate(**inputs, **options)
    with device_path():
        for _ in range(2):
            assert torch.equal(spec.generate(**inputs, **options), expected)
    assert spec.last_speculation.engine == "graph"
    assert any(key[0] is accept_and_keep for key in spec.engine._prepared)


def test_the_cache_is_right_after_moves_by_a_stage():
    spec, inputs = spec_model(engine=replaying()), prompts(6)
    options = {**GREEDY, "return_dict_in_generate": True}
    found, expected = DynamicCache(), DynamicCache()
    spec.base.generate(**inputs, **{CACHE_NAME: expected}, **options)
    with device_path():
        spec.generate(**inputs, **{CACHE_NAME: found}, **options)
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert one.keys.shape == other.keys.shape
        assert torch.allclose(one.keys, other.keys, atol=ROUNDING)
        assert torch.allclose(one.values, other.values, atol=ROUNDING)


def test_preparing_is_not_part_of_the_time_of_rounds():
    spec = spec_model(engine=replaying())
    spec.generate(**prompts(5), **GREEDY)
    stats = spec.last_speculation
    assert stats.engine_seconds > 0
    assert "s to prepare" in str(stats)
    assert all(seconds >= 0 for seconds in stats.seconds.values())


def test_an_engine_that_fails_in_mid_call_is_replaced_by_eager_rounds(caplog):
    class Failing(Engine):
        name = "failing"
        reuses_storage = False

        def obstacle(self, device):
            return None

        def prepare(self, stage, inputs, storage):
            if inputs[0].shape[1] > 1:
                raise RuntimeError("too many nodes")
            return lambda inputs, storage: stage(*inputs, *storage)

    spec, inputs = spec_model(engine=Failing()), prompts(6, 4)
    expected = generate(spec.base, inputs, **GREEDY)
    for _ in range(2):
        assert torch.equal(generate(spec, inputs, **GREEDY)[0], expected[0])
        assert "too many nodes" in spec.last_speculation.engine
    assert len([line for line in caplog.messages if "too many nodes" in line]) == 1


def test_storage_that_is_full_in_mid_call_grows_and_is_recorded_again(monkeypatch):
    monkeypatch.setattr("speclm.cache.tree_cache.BLOCK", 16)
    spec, inputs = spec_model(engine=replaying()), prompts(9, 5)
    options = {**GREEDY, "max_new_tokens": 60}
    for _ in range(2):
        found, expected = generate(spec, inputs, **options), generate(spec.base, inputs, **options)
        assert torch.equal(found[0], expected[0])
        assert spec.last_speculation.engine == "graph"
    (static,) = spec._engines._forwards.values()
    assert len(static._storage) >= 3  # of 16, 32, 64 and more


def test_a_changed_model_is_prepared_anew():
    engines, view = Engines(), TargetView(shared_model("llama"))
    first, other = object(), object()
    one = engines.forward("compile", view, state=first)
    assert engines.forward("compile", view, state=first) is one
    assert engines.forward("eager", view, state=first) is None
    assert engines.forward("auto", view, state=first) is None
    changed = engines.forward("compile", view, state=other)
    assert changed is not one
    assert changed.engine is not one.engine


def test_a_change_of_the_base_between_calls_keeps_the_tokens():
    model = build_model("llama")
    spec, inputs = spec_model(model, engine=replaying()), prompts(6)
    spec.generate(**inputs, **GREEDY)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    for _ in range(2):
        assert torch.equal(
            generate(spec, inputs, **GREEDY)[0], generate(model, inputs, **GREEDY)[0]
        )
        spec.to(torch.float64)


def negate_data(model):
    model.lm_head.weight.data = -model.lm_head.weight.data


def replace_parameter(model):
    down = model.model.layers[0].mlp.down_proj
    down.weight = torch.nn.Parameter(-down.weight.detach())


def assign_state(model):
    state = {name: -weight for name, weight in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def go_and_return(model):
    model.to(torch.float64).to(torch.float32)
    with torch.no_grad():
        model.lm_head.weight.neg_()


@pytest.mark.parametrize("change", [negate_data, replace_parameter, assign_state, go_and_return])
def test_weights_at_other_addresses_are_recorded_anew(change):
    model, inputs = build_model("llama"), prompts(6)
    spec = spec_model(model, engine=replaying())
    spec.generate(**inputs, **GREEDY)
    change(model)
    for _ in range(2):
        found, expected = spec.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY)
        assert torch.equal(found, expected)
        assert spec.last_speculation.engine == "graph"


@pytest.mark.parametrize("is_first", [True, False])
def test_autocast_is_left_to_eager_forwards(is_first):
    spec, inputs = spec_model(engine=replaying()), prompts(6)
    if not is_first:
        spec.generate(**inputs, **GREEDY)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = spec.generate(**inputs, **GREEDY)
        assert "autocast" in spec.last_speculation.engine
        assert torch.equal(found, spec.generate(**inputs, engine="eager", **GREEDY))
    for _ in range(2):
        found, expected = spec.generate(**inputs, **GREEDY), spec.base.generate(**inputs, **GREEDY)
        assert torch.equal(found, expected)
    assert spec.last_speculation.engine == "graph"


def test_calls_in_and_out_of_inference_mode_use_the_same_storage():
    spec, inputs = spec_model(engine=replaying()), prompts(6, 4)
    expected = spec.base.generate(**inputs, **GREEDY)
    for _ in range(2):
        with torch.inference_mode():
            assert torch.equal(spec.generate(**inputs, **GREEDY), expected)
        assert torch.equal(spec.generate(**inputs, **GREEDY), expected)
    assert spec.last_speculation.engine == "graph"


def test_a_name_that_another_thread_has_attached_is_no_obstacle():
    view, engines = TargetView(build_model("llama")), Engines()
    with attached(attention_configs(view.model)):
        assert engines.forward(replaying(), view, state=None).obstacle is None


def test_chains_name_a_reason():
    spec = SpecModel(shared_model("qwen3_next"), None, engine=replaying())
    spec.generate(**prompts(4), **GREEDY)
    assert "chains" in spec.last_speculation.engine


def test_only_the_last_engines_are_kept_and_storage_is_bounded():
    engines, view = Engines(), TargetView(shared_model("llama"))
    first = last = engines.forward(replaying(), view, state=None)
    for _ in range(4):
        last = engines.forward(replaying(), view, state=None)
    assert len(engines._forwards) == 4
    assert first not in engines._forwards.values()
    for size in range(1, 12):
        last.allocate(torch.ones(1), (size,))
    assert len(last._storage) <= 8


def test_copies_prepare_by_themselves():
    engine, inputs = replaying(), prompts(5)
    spec = spec_model(engine=engine)
    expected = spec.generate(**inputs, **GREEDY)
    assert engine._prepared
    copied = copy.deepcopy(spec)
    assert copied._engines._forwards == {}
    assert copied.engine._prepared == {}
    assert torch.equal(copied.generate(**inputs, **GREEDY), expected)
