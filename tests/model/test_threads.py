"""One base in several threads, in nested calls and after calls that were broken off."""

import copy
import gc
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CohereConfig, CohereForCausalLM
from transformers.generation.streamers import BaseStreamer
from typing_extensions import override

from speclm import SpecModel
from speclm.acceptance import AcceptanceRule, Accepted, Verified, resolve_acceptance_rule
from speclm.drafting.combined import CombinedProposer
from speclm.drafting.interface import Proposer
from speclm.errors import BusyError, SpeclmError
from speclm.methods.draft_model.proposer import DraftModelProposer
from speclm.methods.medusa.network import MedusaHeads, MedusaHeadsConfig
from speclm.methods.medusa.proposer import MedusaProposer
from speclm.methods.ngram.proposer import NgramProposer
from speclm.target import TargetFeatures, TargetView, exclusive
from tests.grids import grid
from tests.models import VOCAB_SIZE, build_model, prompts, randomise
from tests.outcomes import reading

GREEDY = {"max_new_tokens": 8, "do_sample": False}
REFUSED = {**GREEDY, "busy": "raise"}
SAMPLED = {"max_new_tokens": 8, "do_sample": True, "top_k": 1}
"""Sampling from one token: a rule is asked, and the seed does not change the output."""
REMEDY = r"busy='wait'.*give each thread a model object"


def medusa(base: Any) -> MedusaProposer:
    heads = MedusaHeads(MedusaHeadsConfig(base.config.hidden_size, VOCAB_SIZE, num_heads=2))
    heads.init_weights_(base.lm_head.weight)
    return MedusaProposer(heads, target=base)


PROPOSERS: dict[str, Callable[[Any], Proposer | None]] = {
    "none": lambda base: None,
    "ngram": lambda base: NgramProposer(),
    "medusa": medusa,
    "draft model": lambda base: DraftModelProposer(base, target=base),
    "joined": lambda base: CombinedProposer([NgramProposer(), medusa(base)]),
}
FEW = ("draft model", "joined")  # a draft model that is the target, and two proposers in one


@pytest.fixture
def base():
    return build_model("llama")


def elsewhere(call: Callable[[], Any]) -> Any:
    """Return what a call returns in another thread, or raise what it raises."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result(timeout=60)


def here(call: Callable[[], Any]) -> Any:
    return call()


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


class Calling(AcceptanceRule):
    """Exact, and calls something while a generation is between its forward and its commit."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call, self.results = call, []

    name = "calling"
    uses_noise = True

    @override
    def accept(self, verified: Verified) -> Accepted:
        self.results.append(self.call())
        return resolve_acceptance_rule("exact").accept(verified)


def generate_calling(spec: SpecModel, call: Callable[[], Any]) -> tuple[Tensor, list[Any]]:
    """Generate by sampling, since greedy decoding asks no rule."""
    rule = Calling(call)
    torch.manual_seed(3)  # drafts are ranked with the noise
    output = spec.generate(**prompts(9, 5), **SAMPLED, acceptance=rule)
    return output, rule.results


@pytest.mark.parametrize("kind", grid(PROPOSERS, runs=lambda kind: kind in FEW))
def test_second_thread_on_one_base_is_refused_on_request_and_the_first_goes_on(base, kind):
    expected = base.generate(**prompts(9, 5), **SAMPLED)
    spec, other = (SpecModel(base, PROPOSERS[kind](base)) for _ in range(2))

    def refused() -> str:
        found = []
        for model in (spec, other):
            with pytest.raises(BusyError, match=REMEDY) as caught:
                elsewhere(lambda model=model: model.generate(**prompts(4), **REFUSED))
            assert isinstance(caught.value, SpeclmError)
            assert isinstance(caught.value, RuntimeError)
            found.append(str(caught.value))
        assert "in thread 'MainThread'" in found[0]
        assert "LlamaForCausalLM is generating already" in found[1]
        assert other.last_speculation is None
        return found[0]

    output, calls = generate_calling(spec, refused)
    assert calls
    assert torch.equal(output, expected)
    stats = spec.last_speculation
    assert stats.rounds > 0 or stats.rows[0].prefill_tokens > 1  # a good draft may end it at once
    assert stats.fallbacks == []
    assert torch.equal(other.generate(**prompts(9, 5), **SAMPLED), expected)


@pytest.mark.parametrize(
    ("kind", "run"),
    grid(
        product(PROPOSERS, [elsewhere, here]),
        runs=lambda kind, run: kind in FEW and (kind == "joined") == (run is elsewhere),
    ),
)
def test_plain_generation_of_the_base_is_allowed_meanwhile(base, kind, run):
    expected = base.generate(**prompts(9, 5), **SAMPLED)
    spec = SpecModel(base, PROPOSERS[kind](base))
    reference = base.generate(**prompts(7, 3, seed=2), **GREEDY)
    undisturbed = SpecModel(base, PROPOSERS[kind](base))
    generate_calling(undisturbed, lambda: None)
    output, plain = generate_calling(
        spec, lambda: run(lambda: base.generate(**prompts(7, 3, seed=2), **GREEDY))
    )
    assert all(torch.equal(found, reference) for found in plain)
    assert torch.equal(output, expected)
    found, wanted = spec.last_speculation, undisturbed.last_speculation
    assert [row.accepted_lengths for row in found.rows] == [
        row.accepted_lengths for row in wanted.rows
    ]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_plain_forward_of_another_thread_inside_a_tree_forward_is_bit_equal(base, implementation):
    base.set_attn_implementation(implementation)
    inputs = prompts(7, 3, seed=2)
    expected = base(**inputs).logits
    spec = SpecModel(base, medusa(base))
    wanted = base.generate(**prompts(9, 5), **GREEDY)
    found, names, main = [], set(), threading.get_ident()

    def meanwhile(module: nn.Module, arguments: Any, output: Any) -> None:
        if threading.get_ident() == main:
            names.add(base.config._attn_implementation)
            found.append(elsewhere(lambda: base(**inputs).logits))

    handle = base.model.layers[0].register_forward_hook(reading(meanwhile))
    try:
        output = spec.generate(**prompts(9, 5), **GREEDY)
    finally:
        handle.remove()
    assert names == {f"speclm_{implementation}"}
    assert len(found) > 2
    assert all(torch.equal(logits, expected) for logits in found)
    assert torch.equal(output, wanted)
    assert base.config._attn_implementation == implementation


@torch.no_grad()
def test_plain_forward_is_right_while_heads_ask_the_model_for_logits():
    """Where logits are more than a product, the decoder is stood in for, in one thread alone."""
    config = CohereConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=40,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    base = randomise(CohereForCausalLM(config))
    inputs, view, main = prompts(7, 3, seed=2), TargetView(base), threading.get_ident()
    expected, hidden = base(**inputs).logits, torch.randn(3, 40)
    wanted, found = view.head_logits(hidden), []

    def meanwhile(module: nn.Module, arguments: Any, output: Any) -> None:
        if threading.get_ident() == main:
            found.append(elsewhere(lambda: base(**inputs).logits))

    handle = base.model.register_forward_hook(reading(meanwhile))
    assert torch.equal(view.head_logits(hidden), wanted)
    handle.remove()
    assert torch.equal(found[0], expected)


@pytest.mark.parametrize("kind", grid(FEW, runs=lambda kind: kind == "joined"))
def test_two_models_with_two_bases_generate_at_once(kind):
    bases = [build_model("llama", seed=seed) for seed in (0, 4)]
    specs = [SpecModel(base, PROPOSERS[kind](base)) for base in bases]
    expected = [base.generate(**prompts(9, 5), **GREEDY) for base in bases]
    barrier = threading.Barrier(2, timeout=60)

    def generate(spec: SpecModel) -> list[Tensor]:
        barrier.wait()
        return [spec.generate(**prompts(9, 5), **GREEDY) for _ in range(4)]

    with ThreadPoolExecutor(2) as pool:
        for outputs, reference in zip(pool.map(generate, specs), expected, strict=True):
            assert all(torch.equal(output, reference) for output in outputs)
    assert all(spec.last_speculation.fallbacks == [] for spec in specs)


def test_two_bases_with_one_config_object_generate_at_once(base):
    twin = copy.deepcopy(base)
    twin.config = base.config
    for module in twin.modules():
        if hasattr(module, "config"):
            module.config = base.config
    specs = [SpecModel(model, None) for model in (base, twin)]
    expected = base.generate(**prompts(9, 5), **SAMPLED)
    inner = []
    output, _ = generate_calling(
        specs[0],
        lambda: inner.append(elsewhere(lambda: specs[1].generate(**prompts(9, 5), **SAMPLED))),
    )
    assert all(torch.equal(found, expected) for found in [output, *inner])
    assert base.config._attn_implementation == "sdpa"


def test_one_proposer_for_two_bases_at_once_is_refused_on_request(base):
    shared = NgramProposer()
    first = SpecModel(base, CombinedProposer([shared]))
    second = SpecModel(build_model("llama", seed=4), shared)

    def refused() -> None:
        with pytest.raises(BusyError, match=rf"NgramProposer.*already.*{REMEDY}"):
            elsewhere(lambda: second.generate(**prompts(4), **REFUSED))

    assert generate_calling(first, refused)[1]
    second.generate(**prompts(4), **GREEDY)


class CallingStreamer(BaseStreamer):
    def __init__(self, call: Callable[[], Any]) -> None:
        self.call, self.results = call, []

    def put(self, value: Tensor) -> None:
        self.results.append(self.call())

    def end(self) -> None:
        """Nothing is left."""


def test_streamer_of_a_plainly_decoded_call_may_generate(base):
    spec, other = SpecModel(base, medusa(base)), SpecModel(base, NgramProposer())
    few = {**GREEDY, "max_new_tokens": 3, "use_cache": False}  # which is decoded plainly
    expected = base.generate(**prompts(5), **few)
    reference = base.generate(**prompts(4), **GREEDY)
    for model in (spec, other):
        for run in (elsewhere, here):
            streamer = CallingStreamer(
                lambda model=model, run=run: run(lambda: model.generate(**prompts(4), **GREEDY))
            )
            output = spec.generate(**prompts(5), **few, streamer=streamer)
            assert torch.equal(output, expected)
            assert len(streamer.results) == 4
            assert all(torch.equal(found, reference) for found in streamer.results)


@pytest.mark.parametrize(
    "error",
    grid(
        [RuntimeError("no"), KeyboardInterrupt(), SystemExit(1)],
        runs=lambda error: isinstance(error, KeyboardInterrupt),
    ),
)
def test_a_call_that_is_broken_off_frees_the_base(base, error):
    spec = SpecModel(base, medusa(base))

    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        generate_calling(spec, fail)
    expected = base.generate(**prompts(4), **GREEDY)
    assert torch.equal(elsewhere(lambda: spec.generate(**prompts(4), **GREEDY)), expected)


def test_an_abandoned_generator_frees_the_base(base):
    view = TargetView(base)

    def steps() -> Any:
        with exclusive([(base, "base")]), view.decoding(TargetFeatures.LAST_HIDDEN):
            yield 1
            yield 2

    spec, running = SpecModel(base, None), steps()
    next(running)
    with pytest.raises(BusyError, match="is generating already, in thread"):
        elsewhere(lambda: spec.generate(**prompts(4), **REFUSED))
    del running
    gc.collect()
    elsewhere(lambda: spec.generate(**prompts(4), **REFUSED))
    assert not base.model._forward_hooks


@pytest.mark.parametrize(
    ("kind", "duplicate"),
    grid(
        product(PROPOSERS, [copy.deepcopy, pickled]),
        runs=lambda kind, duplicate: kind in FEW and (kind == "joined") == (duplicate is pickled),
    ),
)
def test_models_are_copied_and_pickled_also_during_a_call(base, kind, duplicate):
    spec = SpecModel(base, PROPOSERS[kind](base))
    expected = base.generate(**prompts(9, 5), **SAMPLED)
    copies = [duplicate(spec)]
    output, found = generate_calling(spec, lambda: duplicate(spec.base))
    copies += [SpecModel(model, PROPOSERS[kind](model)) for model in found[:2]]
    assert torch.equal(output, expected)
    for model in copies:
        assert model.base is not base
        assert torch.equal(model.generate(**prompts(9, 5), **SAMPLED), expected)
        assert model.last_speculation.fallbacks == []


def test_a_model_is_built_while_its_base_generates(base):
    expected = base.generate(**prompts(9, 5), **SAMPLED)
    output, built = generate_calling(
        SpecModel(base, medusa(base)), lambda: elsewhere(lambda: SpecModel(base, NgramProposer()))
    )
    assert torch.equal(output, expected)
    assert all(spec.self_check.passes for spec in built)
    assert base.config._attn_implementation == "sdpa"


def test_models_built_inside_a_forward_of_another_thread_pass_and_leave_the_config(base):
    main, built = threading.get_ident(), []

    def meanwhile(module: nn.Module, arguments: Any, output: Any) -> None:
        if threading.get_ident() == main and not built:
            built.append(elsewhere(lambda: SpecModel(base, None)))

    spec = SpecModel(base, medusa(base))
    handle = base.model.layers[0].register_forward_hook(reading(meanwhile))
    expected = build_model("llama").generate(**prompts(9, 5), **GREEDY)
    assert torch.equal(spec.generate(**prompts(9, 5), **GREEDY), expected)
    handle.remove()
    assert built[0].self_check.passes
    assert base.config._attn_implementation == "sdpa"
