"""The child of a fork generates, whatever another thread was doing with the model."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CohereConfig, CohereForCausalLM
from transformers.generation.streamers import BaseStreamer

from speclm import SpecModel
from speclm.methods.medusa.network import MedusaHeads, MedusaHeadsConfig
from speclm.methods.medusa.proposer import MedusaProposer
from speclm.methods.ngram.proposer import NgramProposer
from speclm.tree.plan import TreePlan
from tests.forks import in_child
from tests.models import SHAPE, VOCAB_SIZE, build_model, prompts, randomise
from tests.outcomes import reading

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

GREEDY = {"max_new_tokens": 6, "do_sample": False}


def medusa(base: Any) -> SpecModel:
    heads = MedusaHeads(MedusaHeadsConfig(base.config.hidden_size, VOCAB_SIZE, num_heads=2))
    heads.init_weights_(base.lm_head.weight)
    return SpecModel(base, MedusaProposer(heads, target=base))


@contextmanager
def stopped_at(module: nn.Module, call: Callable[[], Any], *, at: int = 0) -> Iterator[None]:
    """Have another thread make a call, and stop it after `at` forwards of a module."""
    main, num_calls = threading.get_ident(), []
    has_stopped, may_go_on = threading.Event(), threading.Event()

    def stop(*_: object) -> None:
        if threading.get_ident() != main:
            num_calls.append(None)
            if len(num_calls) == at + 1:
                has_stopped.set()
                may_go_on.wait(60)

    handle = module.register_forward_hook(reading(stop))
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    try:
        assert has_stopped.wait(60)
        handle.remove()
        yield
    finally:
        may_go_on.set()
        thread.join(60)
    assert not thread.is_alive()


def state(spec: SpecModel) -> tuple[Any, ...]:
    """Return what a generation changes for a while."""
    modules = list(spec.base.modules())
    num_hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)
    forwards = sum("forward" in vars(m) for m in modules)
    is_training = any(m.training for m in modules)
    plan = None if spec.proposer is None else spec.proposer.plan
    view = spec._target
    return (
        str(spec.config._attn_implementation),
        num_hooks,
        forwards,
        is_training,
        plan,
        view.features is None,
        view._running_thread,
    )


def generate(spec: SpecModel) -> list[list[int]]:
    """Return the tokens of a call in this thread, and see that one in a new thread has them too."""
    found: list[Tensor] = []

    def call() -> None:
        found.append(spec.generate(**prompts(5, 3), **GREEDY, busy="raise"))
        assert spec.last_speculation.fallbacks == []

    call()
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert torch.equal(found[0], found[1])
    return found[0].tolist()


@pytest.mark.parametrize("at", [0, 3])
def test_child_generates_while_another_thread_is_in_a_forward(at):
    spec = medusa(build_model("llama"))
    before, expected = state(spec), spec.base.generate(**prompts(5, 3), **GREEDY).tolist()
    plan = TreePlan(depth=2, num_draft_tokens=3)

    def call() -> None:
        spec.generate(**prompts(9), **GREEDY, tree=plan)

    with stopped_at(spec.base.model.layers[0], call, at=at):
        assert state(spec) != before
        assert in_child(lambda: (state(spec), generate(spec))) == (before, expected)
    assert state(spec) == before
    assert generate(spec) == expected


def test_child_generates_while_another_thread_has_the_decoder_stood_in_for():
    config = CohereConfig(**{**SHAPE, "pad_token_id": 0})  # logits are more than a product
    spec = medusa(randomise(CohereForCausalLM(config)))
    before, expected = state(spec), spec.base.generate(**prompts(5, 3), **GREEDY).tolist()
    head = spec.base.lm_head
    at = 1  # the first forward of the head is the prompt's own
    with stopped_at(head, lambda: spec.generate(**prompts(9), **GREEDY), at=at):
        assert "forward" in vars(spec.base.model)
        assert in_child(lambda: (state(spec), generate(spec))) == (before, expected)
    assert state(spec) == before


@pytest.mark.usefixtures("no_verdicts")
def test_child_checks_models_while_another_thread_checks_one():
    base = build_model("llama")
    base.model.layers[0].train()
    with stopped_at(base.model.layers[1], lambda: SpecModel(base, None)):
        assert not base.model.layers[0].training

        def check() -> tuple[bool, bool]:
            is_training = base.model.layers[0].training
            base.eval()
            return is_training, SpecModel(base, None).self_check.passes

        assert in_child(check) == (True, True)
    assert base.model.layers[0].training


def test_call_that_forks_itself_goes_on_in_the_child_and_has_the_model_to_itself():
    spec = SpecModel(build_model("llama"), NgramProposer())
    expected = spec.base.generate(**prompts(5, 3), **GREEDY).tolist()
    outer = spec.base.generate(**prompts(9), **GREEDY).tolist()
    main, child_pipe = os.getpid(), os.pipe()

    class Forks(BaseStreamer):
        child = num_puts = 0

        def put(self, value: Tensor) -> None:
            self.num_puts += 1
            if self.num_puts == 3:
                self.child = os.fork()

        def end(self) -> None:
            """The call is over."""

    streamer = Forks()
    try:
        found = spec.generate(**prompts(9), **GREEDY, streamer=streamer).tolist()
        is_right = found == outer and generate(spec) == expected
        if os.getpid() != main:
            os.write(child_pipe[1], b"right" if is_right else b"wrong")
    finally:
        if os.getpid() != main:
            os._exit(0)
    os.waitpid(streamer.child, 0)
    assert is_right
    assert os.read(child_pipe[0], 9) == b"right"
