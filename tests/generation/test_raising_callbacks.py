"""Users' own code that fails: its error comes out, and all is left as regular generation does."""

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteria
from transformers.generation import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from speclm import SpecModel
from speclm.errors import OptionError
from tests.callbacks import DrawsAtEachCall
from tests.grids import grid
from tests.models import prompts
from tests.outcomes import Outcome, observe, require_same
from tests.proposers import build_proposer
from tests.settings import GREEDY, SAMPLED, Arguments, tiny_draft, tiny_model

LENGTHS = (7, 3, 5)
NEW_TOKENS = 10
MODES = {"greedy": GREEDY, "sampled": {**SAMPLED, "temperature": 0.9}}


class OwnError(Exception):
    """Derives from nothing that anybody catches."""


class Fault:
    """Raises at one call."""

    def __init__(self, error: BaseException, *, at: int) -> None:
        self._error, self._at, self._num_calls = error, at, 0

    def __call__(self) -> None:
        self._num_calls += 1
        if self._num_calls == self._at + 1:
            raise self._error


class FaultyProcessor(LogitsProcessor):
    def __init__(self, fault: Fault) -> None:
        self._fault = fault

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._fault()
        return scores


class FaultyCriterion(StoppingCriteria):
    def __init__(self, fault: Fault) -> None:
        self._fault = fault

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self._fault()
        return torch.zeros(len(input_ids), dtype=torch.bool)


class FaultyStreamer(BaseStreamer):
    def __init__(self, fault: Fault, *, at_end: bool = False) -> None:
        self._fault, self._at_end = fault, at_end

    def put(self, value: Tensor) -> None:
        if not self._at_end:
            self._fault()

    def end(self) -> None:
        if self._at_end:
            self._fault()


def _allowed(fault: Fault) -> Callable[[int, Tensor], list[int]]:
    def allowed(row: int, so_far: Tensor) -> list[int]:
        fault()
        return list(range(60))

    return allowed


PLACES: dict[str, Callable[[Fault], Arguments]] = {
    "processor": lambda fault: {"logits_processor": LogitsProcessorList([FaultyProcessor(fault)])},
    "processor after one that draws": lambda fault: {
        "logits_processor": LogitsProcessorList([DrawsAtEachCall(), FaultyProcessor(fault)])
    },
    "criterion": lambda fault: {
        "stopping_criteria": StoppingCriteriaList([FaultyCriterion(fault)])
    },
    "streamer": lambda fault: {"streamer": FaultyStreamer(fault)},
    "allowed tokens": lambda fault: {"prefix_allowed_tokens_fn": _allowed(fault)},
}
FAILURES: dict[str, tuple[BaseException, str]] = {
    "own error": (OwnError("no"), "scripted"),
    "interrupt": (KeyboardInterrupt(), "Medusa that hits"),
}


@cache
def plain(mode: str) -> Outcome:
    base = tiny_model("endless")
    arguments = {"max_new_tokens": NEW_TOKENS, **MODES[mode]}
    return observe(base, prompts(*LENGTHS, vocab_size=60), arguments, base=base)


@cache
def tiny_spec(kind: str, mode: str) -> SpecModel:
    base = tiny_model("endless")
    reference = plain(mode).new_tokens(prompts(*LENGTHS, vocab_size=60))
    draft = tiny_draft(base.config.vocab_size)
    return SpecModel(base, build_proposer(kind, reference, target=base, draft=draft))


def hooks(base: PreTrainedModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules())


def fail(model: Any, mode: str, own: Arguments) -> tuple[BaseException, Tensor]:
    """Return what a call raises, and the generator's state after it."""
    torch.manual_seed(5)
    arguments = {"max_new_tokens": NEW_TOKENS, **MODES[mode], **own}
    with pytest.raises(BaseException) as caught:
        model.generate(**prompts(*LENGTHS, vocab_size=60), **arguments)
    return caught.value, torch.get_rng_state()


def require_usable(spec: SpecModel, mode: str, *, num_hooks: int, attention: str) -> None:
    assert spec.config._attn_implementation == attention
    assert hooks(spec.base) == num_hooks
    assert not spec.base.training
    assert all(parameter.grad is None for parameter in spec.base.parameters())
    inputs = prompts(*LENGTHS, vocab_size=60)
    arguments = {"max_new_tokens": NEW_TOKENS, **MODES[mode]}
    require_same(observe(spec.base, inputs, arguments, base=spec.base), plain(mode))
    found = observe(spec, inputs, arguments, base=spec.base)
    require_same(found, plain(mode))
    assert spec.last_speculation.fallbacks == []
    assert found.num_forwards < plain(mode).num_forwards


CALLS = (0, 1, 6)


def runs(place: str, at: int, mode: str, failure: str) -> bool:
    """Return whether `make test` has a cell: the prompt's call and a late one, in turns."""
    if at == 1 and place != "processor":
        return False
    turn = list(PLACES).index(place) + CALLS.index(at)
    return mode == list(MODES)[turn % 2] and failure == list(FAILURES)[turn // 2 % 2]


@pytest.mark.parametrize(
    ("place", "at", "mode", "failure"), grid(product(PLACES, CALLS, MODES, FAILURES), runs=runs)
)
def test_error_comes_out_as_it_was_raised_and_where_regular_generation_raises_it(
    place, at, mode, failure
):
    error, kind = FAILURES[failure]
    spec = tiny_spec(kind, mode)
    before = {"num_hooks": hooks(spec.base), "attention": spec.config._attn_implementation}
    raised, state = fail(spec.base, mode, PLACES[place](Fault(error, at=at)))
    assert raised is error
    found, state_found = fail(spec, mode, PLACES[place](Fault(error, at=at)))
    assert found is error
    assert torch.equal(state_found, state), "the generator was left in another state"
    require_usable(spec, mode, **before)


@pytest.mark.parametrize("mode", MODES)
def test_error_at_the_end_of_a_stream_comes_out(mode):
    spec = tiny_spec("scripted", mode)
    before = {"num_hooks": hooks(spec.base), "attention": spec.config._attn_implementation}
    error = OwnError("at the end")
    outcomes = [
        fail(model, mode, {"streamer": FaultyStreamer(Fault(error, at=0), at_end=True)})
        for model in (spec.base, spec)
    ]
    assert outcomes[0][0] is outcomes[1][0] is error
    assert torch.equal(outcomes[1][1], outcomes[0][1])
    require_usable(spec, mode, **before)


class Spoils(LogitsProcessor):
    """Returns something that is no scores, at one call."""

    def __init__(self, spoil: Callable[[Tensor], Any], *, at: int) -> None:
        self._spoil, self._at, self._num_calls = spoil, at, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:
        self._num_calls += 1
        return self._spoil(scores) if self._num_calls == self._at + 1 else scores


SPOILS: dict[str, Callable[[Tensor], Any]] = {
    "nothing": lambda _: None,
    "too many rows": lambda scores: scores.repeat(2, 1),
    "too few axes": lambda scores: scores[0, 0],
    "a list": lambda scores: scores.tolist(),
}


@pytest.mark.parametrize(
    ("spoil", "at", "mode"),
    grid(product(SPOILS, [0, 5], MODES), runs=lambda _, at, mode: (at > 0) == (mode == "sampled")),
)
def test_processor_that_returns_no_scores_fails_and_leaves_everything_usable(spoil, at, mode):
    spec = tiny_spec("scripted", mode)
    before = {"num_hooks": hooks(spec.base), "attention": spec.config._attn_implementation}

    def own() -> Arguments:
        return {"logits_processor": LogitsProcessorList([Spoils(SPOILS[spoil], at=at)])}

    raised, state = fail(spec.base, mode, own())
    found, state_found = fail(spec, mode, own())
    assert isinstance(raised, Exception)
    if spoil not in {"a list", "nothing"}:  # the next processor stumbles over them
        assert isinstance(found, OptionError)
        assert "check the processors" in str(found)
    if spoil != "too many rows":  # regular generation draws for them before it fails
        assert torch.equal(state_found, state), "the generator was left in another state"
    require_usable(spec, mode, **before)


@pytest.mark.parametrize("at", [0, 5])
def test_processor_that_returns_nan_fails_when_sampling(at):
    spec = tiny_spec("scripted", "sampled")
    before = {"num_hooks": hooks(spec.base), "attention": spec.config._attn_implementation}

    def own() -> Arguments:
        spoils = Spoils(lambda scores: scores * torch.nan, at=at)
        return {"logits_processor": LogitsProcessorList([spoils])}

    _, state = fail(spec.base, "sampled", own())
    found, state_found = fail(spec, "sampled", own())
    assert isinstance(found, RuntimeError | ArithmeticError)
    assert torch.equal(state_found, state), "the generator was left in another state"
    require_usable(spec, "sampled", **before)
