"""Calls that meet on one base: from several threads they take turns, from inside they are plain."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria, TextIteratorStreamer
from transformers.generation import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import speclm
from speclm import SpecModel
from speclm.attention import active_step
from speclm.drafting.combined import CombinedProposer
from speclm.errors import BusyError, OptionError
from speclm.methods.ngram.proposer import NgramProposer
from speclm.target import claims
from tests.models import build_model, prompts
from tests.outcomes import reading
from tests.settings import tokenizer
from tests.target.test_claims import held_elsewhere, start, wait_for

GREEDY = {"max_new_tokens": 8, "do_sample": False}
SAMPLED = {"max_new_tokens": 8, "do_sample": True}


@pytest.fixture
def spec():
    return SpecModel(build_model("llama"), NgramProposer())


def plain(model: Any, *lengths: int, **settings: Any) -> Tensor:
    """Return what the base's own `generate` returns, patched or not."""
    return type(model.base).generate(model.base, **prompts(*lengths), **{**GREEDY, **settings})


class EndsBy(BaseStreamer):
    """Calls something at the end."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call

    def put(self, value: Tensor) -> None:
        """Nothing is done with it."""

    def end(self) -> None:
        self._call()


class Lingers(TextIteratorStreamer):
    """Does not return from its end until it may: the loop over it is over before."""

    def __init__(self) -> None:
        super().__init__(tokenizer(), timeout=60)
        self.may_return = threading.Event()

    def end(self) -> None:
        super().end()
        assert self.may_return.wait(60)


def test_loop_over_the_stream_of_a_thread_may_be_followed_by_another_call(spec):
    expected, streamer = plain(spec, 5), Lingers()
    arguments = {**prompts(9), **GREEDY, "streamer": streamer}
    thread = threading.Thread(target=spec.generate, kwargs=arguments)
    thread.start()
    list(streamer)
    of_the_thread = spec.last_speculation
    assert of_the_thread.rounds > 0
    assert torch.equal(spec.generate(**prompts(5), **GREEDY, busy="raise"), expected)
    own = spec.last_speculation
    streamer.may_return.set()
    thread.join(60)
    assert not thread.is_alive()
    assert spec.last_speculation is own is not of_the_thread
    assert own.fallbacks == []


@pytest.mark.parametrize("is_elsewhere", [True, False])
def test_model_is_free_and_its_counters_are_there_when_the_stream_ends(spec, is_elsewhere):
    seen = []

    def end() -> None:
        seen.append(spec.last_speculation)
        spec.generate(**prompts(5), **GREEDY, busy="raise")
        seen.append(spec.last_speculation)

    def run() -> None:
        if is_elsewhere:
            start(end).join(60)
        else:
            end()

    settings = {**GREEDY, "return_dict_in_generate": True, "streamer": EndsBy(run)}
    outer = spec.generate(**prompts(9, seed=2), **settings)
    own, inner = seen
    assert own is outer.speculation
    assert len(own.rows[0].accepted_lengths) == own.rounds > 0
    assert inner is not own
    assert inner.fallbacks == []
    # What another thread did last counts, what this call did inside does not.
    assert spec.last_speculation is (inner if is_elsewhere else own)


def test_threads_on_one_base_all_get_the_text_of_a_call_by_itself(spec):
    proposer = CombinedProposer([NgramProposer()])
    other = SpecModel(spec.base, proposer)
    sizes = [(3 + row % 4, 5) if row % 3 else (4 + row,) for row in range(16)]
    few = {**GREEDY, "max_new_tokens": 4}
    expected = [plain(spec, *lengths, **few) for lengths in sizes]
    shared = SpecModel(build_model("llama", seed=4), proposer)  # a proposer of two bases
    wanted = plain(shared, 6)
    with speclm.patch(spec.base) as patched, ThreadPoolExecutor(16) as pool:
        callers = [spec.generate, other.generate, spec.base.generate]
        calls = [
            pool.submit(callers[row % 3], **prompts(*lengths), **few)
            for row, lengths in enumerate(sizes)
        ]
        foreign = pool.submit(shared.generate, **prompts(6), **GREEDY)
        found = [call.result(timeout=60) for call in calls]
        assert torch.equal(foreign.result(timeout=60), wanted)
    assert all(map(torch.equal, found, expected))
    assert all(model.last_speculation.fallbacks == [] for model in (spec, other, patched, shared))
    assert claims._QUEUE == []


def test_sampled_calls_of_threads_in_sequence_get_the_tokens_of_calls_by_themselves(spec):
    callers = [spec, SpecModel(spec.base, NgramProposer())]
    torch.manual_seed(3)
    expected = [plain(spec, 5 + call, **SAMPLED) for call in range(4)]
    state = torch.get_rng_state()
    torch.manual_seed(3)
    found = []
    for call in range(4):
        model = callers[call % 2]

        def generate(model: SpecModel = model, call: int = call) -> None:
            found.append(model.generate(**prompts(5 + call), **SAMPLED))

        start(generate).join(60)
    assert all(map(torch.equal, found, expected))
    assert torch.equal(torch.get_rng_state(), state)


def test_call_that_waits_leaves_the_counters_of_the_last_one(spec):
    spec.generate(**prompts(4), **GREEDY)
    before = spec.last_speculation
    with held_elsewhere(spec.base):
        thread = start(lambda: spec.generate(**prompts(5), **GREEDY))
        wait_for(lambda: len(claims._QUEUE) == 2)
        with pytest.raises(BusyError, match="busy='wait'"):
            spec.generate(**prompts(5), **GREEDY, busy="raise")
        assert spec.last_speculation is before
    thread.join(60)
    assert spec.last_speculation is not before


def test_calls_that_the_base_answers_wait_for_nobody(spec):
    with held_elsewhere(spec.base):
        for busy in ("wait", "raise"):
            found = spec.generate(**prompts(5), **GREEDY, use_cache=False, busy=busy)
            assert torch.equal(found, plain(spec, 5))


@pytest.mark.parametrize("busy", ["queue", ""])
def test_other_values_of_busy_are_refused(spec, busy):
    with pytest.raises(OptionError, match=r"busy is .*expected 'wait'.*'raise'"):
        spec.generate(**prompts(4), **GREEDY, busy=busy)


class CallingProcessor(LogitsProcessor):
    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._call()
        return scores


class CallingCriterion(StoppingCriteria):
    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self._call()
        return torch.zeros(len(input_ids), dtype=torch.bool)


class CallingStreamer(EndsBy):
    def put(self, value: Tensor) -> None:
        self._call()

    def end(self) -> None:
        """The call is over."""


INSIDE: dict[str, Callable[[Callable[[], object]], dict[str, Any]]] = {
    "processor": lambda call: {"logits_processor": LogitsProcessorList([CallingProcessor(call)])},
    "criterion": lambda call: {"stopping_criteria": StoppingCriteriaList([CallingCriterion(call)])},
    "streamer": lambda call: {"streamer": CallingStreamer(call)},
}


@pytest.mark.parametrize("place", INSIDE)
def test_call_from_inside_another_one_is_left_to_the_base_and_says_so(spec, place, caplog):
    other = SpecModel(spec.base, NgramProposer())
    inner = {**SAMPLED, "max_new_tokens": 2}
    found: dict[str, list[Tensor]] = {"base": [], "spec": []}
    reasons = []

    def run(name: str, callers: list[Any]) -> Tensor:
        def call() -> None:
            model = callers[len(found[name]) % len(callers)]
            found[name].append(model.generate(**prompts(4), **inner))
            reasons.append(getattr(model, "last_speculation", None))

        torch.manual_seed(3)
        caller = callers[0]
        return caller.generate(**prompts(7), **SAMPLED, **INSIDE[place](call))

    expected = run("base", [spec.base])
    state = torch.get_rng_state()
    reasons.clear()
    with caplog.at_level(logging.WARNING, "speclm"):
        output = run("spec", [spec, other])
    assert torch.equal(output, expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(found["spec"]) == len(found["base"]) > 2
    assert all(map(torch.equal, found["spec"], found["base"]))
    assert all("called from inside" in stats.fallbacks[0] for stats in reasons)
    assert spec.last_speculation.fallbacks == []  # those of the outer call
    assert spec.last_speculation.rounds > 0
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2, "one for each model"
    assert all("called from inside" in line for line in lines)


def test_nested_call_is_decoded_by_the_base_also_where_waiting_is_refused(spec):
    found = []

    def call() -> None:
        found.append(spec.generate(**prompts(4), **GREEDY, busy="raise"))

    spec.generate(**prompts(7), **{**GREEDY, "max_new_tokens": 2}, streamer=CallingStreamer(call))
    assert all(torch.equal(output, plain(spec, 4)) for output in found)


def test_call_from_a_hook_inside_a_forward_is_refused(spec):
    errors = []

    def hook(*_: object) -> None:
        if active_step() is not None:
            with pytest.raises(BusyError, match=r"in a forward.*not in a hook") as caught:
                spec.generate(**prompts(4), **GREEDY)
            errors.append(caught.value)

    layer = spec.base.model.layers[0]
    expected = plain(spec, 9)
    handle = layer.register_forward_hook(reading(hook))  # of others the model would be checked
    try:
        assert torch.equal(spec.generate(**prompts(9), **GREEDY), expected)
    finally:
        handle.remove()
    assert errors


def test_two_threads_that_call_each_others_base_from_inside_do_not_wait_for_each_other():
    specs = [SpecModel(build_model("llama", seed=seed), NgramProposer()) for seed in (0, 4)]
    meet = threading.Barrier(2, timeout=60)
    expected = [plain(spec, 5) for spec in specs]
    found: list[tuple[int, Tensor, list[str]]] = []

    def run(own: int) -> None:
        has_called = []

        def call() -> None:
            if has_called:
                return
            has_called.append(True)
            meet.wait()
            output = specs[1 - own].generate(**prompts(5), **GREEDY)
            found.append((1 - own, output, specs[1 - own].last_speculation.fallbacks))
            meet.wait()

        specs[own].generate(**prompts(7), **GREEDY, streamer=CallingStreamer(call))

    threads = [start(lambda own=own: run(own)) for own in (0, 1)]
    for thread in threads:
        thread.join(60)
    assert len(found) == 2
    for model, output, fallbacks in found:
        assert torch.equal(output, expected[model])
        assert "does not wait" in fallbacks[0]


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), SystemExit(1)])
def test_call_that_fails_lets_the_next_one_begin(spec, error):
    found, expected = [], plain(spec, 5)

    def fail() -> None:
        if not found:
            found.append(start(lambda: found.append(spec.generate(**prompts(5), **GREEDY))))
            wait_for(lambda: len(claims._QUEUE) == 2)
        raise error

    with pytest.raises(type(error)):
        spec.generate(**prompts(7), **GREEDY, streamer=CallingStreamer(fail))
    found[0].join(60)
    assert torch.equal(found[1], expected)


@pytest.mark.usefixtures("no_verdicts")
def test_self_check_of_a_model_that_takes_chains_waits_for_the_base():
    base = build_model("bloom")
    expected = SpecModel(base, None).self_check
    built: list[SpecModel] = []
    with held_elsewhere(base):
        thread = start(lambda: built.append(SpecModel(base, None)))
        wait_for(lambda: len(claims._QUEUE) == 2)
    thread.join(60)
    assert built[0].self_check.verification is expected.verification
    assert built[0].self_check.reason == expected.reason
