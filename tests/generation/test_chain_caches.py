"""Caches of targets that take only chains, and errors in the middle of a call."""

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from speclm import SpecModel
from speclm.cache import CACHE_NAME, cache_name
from speclm.testing import ScriptedProposer
from tests.families import shared_family
from tests.grids import turns
from tests.models import VOCAB_SIZE, generate, prompts, shared_model
from tests.proposers import DEPTH, WRONG_AT

HYBRID = "qwen3_next"
FAMILIES = ("bloom", HYBRID)
NEW_TOKENS = 14
GREEDY = {"do_sample": False}
ENDING = {"do_sample": True, "top_k": 0, "eos_token_id": list(range(1, 24)), "pad_token_id": 159}
TOLERANCE = 2e-4  # next to the size of a state: sums are taken in another order


def target(name: str) -> PreTrainedModel:
    return shared_model(name) if name in FAMILIES else shared_family(name)


@cache
def spec_of(name: str) -> SpecModel:
    """Return a wrapped model; give it a proposer before every call."""
    return SpecModel(target(name), None)


def require_close(found: DynamicCache, expected: DynamicCache) -> None:
    for one, other in zip(states_of(found), states_of(expected), strict=True):
        size = max(1.0, float(other.abs().max()))
        assert torch.allclose(one, other, rtol=0.0, atol=TOLERANCE * size)


def states_of(cache_: DynamicCache) -> list[Tensor]:
    found: list[Tensor] = []
    for layer in cache_.layers:
        for value in vars(layer).values():
            parts = value.values() if isinstance(value, dict) else [value]
            found += [part for part in parts if isinstance(part, Tensor) and part.dim() > 0]
    return found


def go_on(model: Any, given: Any, text: Tensor, mask: Tensor) -> list[list[int]]:
    output = model.generate(
        text, attention_mask=mask, **{CACHE_NAME: given}, **GREEDY, max_new_tokens=6
    )
    return output[:, text.shape[1] :].tolist()


@pytest.mark.parametrize(
    ("name", "lengths", "setting"),
    turns([*FAMILIES, "falcon_h1"], [(9,), (7, 1, 10)], [GREEDY, ENDING]),
)
def test_caches_that_come_back_are_regular_generations_and_go_on_in_both(name, lengths, setting):
    base, spec, inputs = target(name), spec_of(name), prompts(*lengths)
    settings = {**setting, "return_dict_in_generate": True}
    plain, _ = generate(base, inputs, max_new_tokens=NEW_TOKENS, **settings)
    width = inputs["input_ids"].shape[1]
    spec.proposer = ScriptedProposer(
        plain.sequences[:, width:].tolist(), depth=DEPTH, wrong_at=WRONG_AT
    )
    ours, _ = generate(spec, inputs, max_new_tokens=NEW_TOKENS, **settings)
    assert ours.sequences.tolist() == plain.sequences.tolist()
    require_close(ours[CACHE_NAME], plain[CACHE_NAME])
    new = torch.randint(1, VOCAB_SIZE, (len(lengths), 3))
    text = torch.cat([plain.sequences, new], dim=1)
    mask = torch.ones_like(text)
    mask[:, :width] = inputs["attention_mask"]
    expected = go_on(base, copy.deepcopy(plain[CACHE_NAME]), text, mask)
    spec.proposer = ScriptedProposer(expected, depth=DEPTH, wrong_at=WRONG_AT)
    assert go_on(base, copy.deepcopy(ours[CACHE_NAME]), text, mask) == expected
    assert go_on(spec, plain[CACHE_NAME], text, mask) == expected
    assert go_on(spec, ours[CACHE_NAME], text, mask) == expected
    assert spec.last_speculation.fallbacks == []
    assert spec.last_speculation.rounds < 5
    assert ours[CACHE_NAME].get_seq_length() == text.shape[1] + 5


def test_a_state_that_does_not_know_its_length_is_left_to_regular_generation():
    base, spec, inputs = target("mamba2"), spec_of("mamba2"), prompts(6)
    tokens = torch.randint(1, VOCAB_SIZE, (1, 4))
    outputs = []
    for model in (base, spec):
        given = DynamicCache(config=base.config)
        base(input_ids=inputs["input_ids"], **{cache_name(base): given}, use_cache=True)
        outputs.append(
            model.generate(tokens, **{cache_name(base): given}, **GREEDY, max_new_tokens=6).tolist()
        )
    assert outputs[0] == outputs[1]
    assert "recurrent" in spec.last_speculation.fallbacks[0]


@pytest.mark.parametrize("name", ["mamba2", HYBRID])
def test_an_empty_cache_that_is_passed_in_is_filled_as_regular_generation_fills_it(name):
    base, spec, inputs = target(name), spec_of(name), prompts(7, 4)
    key = cache_name(base)
    caches = [DynamicCache(config=base.config) for _ in range(2)]
    plain = base.generate(**inputs, **GREEDY, max_new_tokens=NEW_TOKENS, **{key: caches[0]})
    spec.proposer = ScriptedProposer(plain[:, 7:].tolist(), depth=DEPTH, wrong_at=WRONG_AT)
    ours = spec.generate(**inputs, **GREEDY, max_new_tokens=NEW_TOKENS, **{key: caches[1]})
    assert ours.tolist() == plain.tolist()
    assert spec.last_speculation.fallbacks == []
    require_close(caches[1], caches[0])


class FailingProcessor(LogitsProcessor):
    def __init__(self, error: BaseException, *, at: int) -> None:
        self._error, self._left = error, at

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._left == 0:
            raise self._error
        self._left -= 1
        return scores


class FailingStreamer(BaseStreamer):
    def __init__(self, error: BaseException, *, at: int) -> None:
        self._error, self._left = error, at

    def put(self, value: Tensor) -> None:
        if self._left == 0:
            raise self._error
        self._left -= 1

    def end(self) -> None:
        pass


def failing(place: str, error: BaseException, *, at: int) -> dict[str, Any]:
    if place == "streamer":
        return {"streamer": FailingStreamer(error, at=at)}
    return {"logits_processor": LogitsProcessorList([FailingProcessor(error, at=at)])}


PLACES, CALLS = ("processor", "streamer"), (0, 1, 5)
ERRORS = {"error": RuntimeError("no"), "interrupt": KeyboardInterrupt()}


@pytest.mark.parametrize(("name", "place", "at", "kind"), turns(FAMILIES, PLACES, CALLS, ERRORS))
def test_an_error_midway_leaves_model_and_cache_as_they_were(name, place, at, kind):
    error = ERRORS[kind]
    base, spec, inputs = target(name), spec_of(name), prompts(9)
    given = base.generate(**inputs, **GREEDY, max_new_tokens=4, return_dict_in_generate=True)[
        CACHE_NAME
    ]
    before = copy.deepcopy(given)
    text = prompts(16)["input_ids"]
    text[:, :9] = inputs["input_ids"]
    text[:, 9:12] = base.generate(**inputs, **GREEDY, max_new_tokens=3)[:, 9:]
    mask = torch.ones_like(text)
    expected = go_on(base, copy.deepcopy(before), text, mask)
    spec.proposer = ScriptedProposer(expected, depth=DEPTH, wrong_at=WRONG_AT)
    own = failing(place, error, at=at)
    with pytest.raises(type(error)) as caught:
        spec.generate(
            text, attention_mask=mask, **{CACHE_NAME: given}, **GREEDY, max_new_tokens=8, **own
        )
    assert caught.value is error
    for one, other in zip(states_of(given), states_of(before), strict=True):
        assert torch.equal(one, other)
    assert go_on(base, copy.deepcopy(given), text, mask) == expected
    assert go_on(spec, given, text, mask) == expected
