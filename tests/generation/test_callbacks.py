"""A single row needs no lockstep for criteria and streamers: they hear of it after the round."""

import pytest
import torch
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from speclm import SpecModel
from speclm.generation.lockstep import Lockstep
from speclm.testing import ScriptedProposer
from tests.callbacks import EndsRows, Tokens
from tests.models import prompts
from tests.outcomes import observe, require_same
from tests.settings import GREEDY, SAMPLED, tiny_model, tokenizer


class DrawsAtSomeTokens(StoppingCriteria):
    """Draws from the default generator after every third token."""

    def __init__(self):
        self.num_calls = 0

    def __call__(self, input_ids, scores, **_):
        self.num_calls += 1
        if self.num_calls % 3 == 0:
            torch.rand(2)
        return torch.zeros(len(input_ids), dtype=torch.bool)


class DrawingStreamer(Tokens):
    """Draws from the default generator with every token."""

    def put(self, value):
        super().put(value)
        torch.rand(1)


@pytest.fixture
def no_lockstep(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a single row was decoded in lockstep")

    monkeypatch.setattr(Lockstep, "__init__", refuse)


def compare(arguments, *, depth=4):
    """Compare a call with the base's, and return the counters."""
    base, inputs = tiny_model("endless"), prompts(6, vocab_size=60, seed=4)
    common = {"max_new_tokens": 14}
    free = observe(base, inputs, {**common, **arguments()}, base=base)
    spec = SpecModel(base, ScriptedProposer(free.new_tokens(inputs), depth=depth))
    require_same(observe(spec, inputs, {**common, **arguments()}, base=base), free)
    return spec.last_speculation


@pytest.mark.parametrize("mode", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("listening", [DrawsAtSomeTokens, EndsRows])
@pytest.mark.usefixtures("no_lockstep")
def test_criteria_of_any_class_hear_of_every_position(listening, mode):
    compare(lambda: {**mode, "stopping_criteria": StoppingCriteriaList([listening()])})


@pytest.mark.parametrize("mode", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.usefixtures("no_lockstep")
def test_what_a_streamer_draws_decides_the_tokens_that_follow(mode):
    streamers = []

    def arguments():
        streamers.append(DrawingStreamer())
        return {**mode, "streamer": streamers[-1]}

    stats = compare(arguments)
    assert streamers[0].calls == streamers[1].calls
    if mode is SAMPLED:  # what was drafted after the first token of a round was decided in vain
        assert stats.tau == 1.0


@pytest.mark.usefixtures("no_lockstep")
def test_stop_string_in_tokens_that_are_dropped_ends_nothing():
    base, inputs = tiny_model("text"), prompts(6, vocab_size=60, seed=4)
    common = {"max_new_tokens": 14, **SAMPLED}
    free = observe(base, inputs, common, base=base).new_tokens(inputs)
    word = tokenizer().decode(free[0][4:6])
    common |= {"stop_strings": [word], "tokenizer": tokenizer()}

    def arguments():  # the third token's criterion draws, and the word does not come
        return {**common, "stopping_criteria": StoppingCriteriaList([DrawsAtSomeTokens()])}

    expected = observe(base, inputs, arguments(), base=base)
    assert len(expected.new_tokens(inputs)[0]) > 6
    spec = SpecModel(base, ScriptedProposer(free, depth=12))
    require_same(observe(spec, inputs, arguments(), base=base), expected)


def test_accepted_tokens_are_told_in_one_round(no_lockstep):
    assert compare(lambda: {**GREEDY, "streamer": Tokens()}).tau > 2
