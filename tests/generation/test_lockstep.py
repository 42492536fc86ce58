"""What users' own code sees: the calls, texts and scores of regular generation, in its order."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from speclm import SpecModel
from speclm.drafting.interface import Proposer
from speclm.testing import ScriptedProposer
from tests.grids import turns
from tests.models import prompts
from tests.outcomes import SCORE_TOLERANCE, lengths, live_steps, observe, require_same
from tests.proposers import DEPTH, RandomTreeProposer, build_proposer
from tests.settings import EOS, GREEDY, NEW_TOKENS, SAMPLED, tiny_draft, tiny_model

LENGTHS = (7, 3, 5)
MODES = {
    "greedy": GREEDY,
    "sampled": {**SAMPLED, "temperature": 0.9},
    "sampled with a penalty": {**SAMPLED, "repetition_penalty": 1.2},
}
KINDS = ("uneven", "random tree", "ngram", "Medusa that hits", "none")


@dataclass
class Log:
    """What a processor, a criterion and a streamer were given, in order."""

    events: list[tuple[Any, ...]] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)

    def arguments(self) -> dict[str, Any]:
        """Return recorders that write here."""
        return {
            "logits_processor": LogitsProcessorList([_Processor(self)]),
            "stopping_criteria": StoppingCriteriaList([_Criterion(self)]),
            "streamer": _Streamer(self),
        }


class _Processor(LogitsProcessor):
    def __init__(self, log: Log) -> None:
        self._log, self._num_calls = log, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        seen = ("processor", self._num_calls, input_ids.dtype, input_ids.tolist(), scores.dtype)
        self._log.events.append((*seen, tuple(scores.shape)))
        self._log.scores.append(scores.clone())
        self._num_calls += 1
        return scores


class _Criterion(StoppingCriteria):
    def __init__(self, log: Log) -> None:
        self._log, self._num_calls = log, 0

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        num_scores = None if scores is None else len(scores)
        seen = ("criterion", self._num_calls, input_ids.dtype, input_ids.tolist(), num_scores)
        self._log.events.append((*seen, options))
        self._num_calls += 1
        return torch.zeros(len(input_ids), dtype=torch.bool)


class _Streamer(BaseStreamer):
    def __init__(self, log: Log) -> None:
        self._log = log

    def put(self, value: Tensor) -> None:
        self._log.events.append(("put", value.dtype, value.device.type, value.tolist()))

    def end(self) -> None:
        self._log.events.append(("end",))


@dataclass(frozen=True)
class Recorded:
    """A call with its log."""

    log: Log
    new_tokens: list[list[int]]
    outcome: Any


def record(model: Any, seed: int, mode: str, *, name: str = "ends", **more: Any) -> Recorded:
    log = Log()
    inputs = prompts(*LENGTHS, vocab_size=60, seed=seed)
    arguments = {"max_new_tokens": NEW_TOKENS, **MODES[mode], **log.arguments(), **more}
    outcome = observe(model, inputs, arguments, base=tiny_model(name))
    return Recorded(log, outcome.new_tokens(inputs), outcome)


@cache
def uneven_seed(mode: str) -> int:
    """Return the first prompts whose rows all end at different steps, none at the first."""
    for seed in range(200):
        inputs = prompts(*LENGTHS, vocab_size=60, seed=seed)
        arguments = {"max_new_tokens": NEW_TOKENS, **MODES[mode]}
        outcome = observe(tiny_model("ends"), inputs, arguments, base=tiny_model("ends"))
        ends = lengths(outcome.new_tokens(inputs), EOS)
        if len(set(ends)) == len(LENGTHS) and min(ends) > 3:
            return seed
    raise AssertionError("no prompts whose rows end apart")


@cache
def plain(mode: str) -> Recorded:
    return record(tiny_model("ends"), uneven_seed(mode), mode)


def uneven(reference: Sequence[Sequence[int]]) -> Proposer:
    """Return a script in which the rows are wrong in different places."""
    wrong = [
        [token ^ 1 if step % (2 + row) == 1 else token for step, token in enumerate(tokens)]
        for row, tokens in enumerate(reference)
    ]
    return ScriptedProposer(wrong, depth=DEPTH)


def speculative(
    mode: str, kind: str, *, name: str = "ends", expected: Recorded | None = None, **more: Any
) -> Recorded:
    base = tiny_model(name)
    reference = (expected or plain(mode)).new_tokens
    proposer = (
        uneven(reference)
        if kind == "uneven"
        else build_proposer(
            kind, reference, target=base, draft=tiny_draft(base.config.vocab_size), seed=3
        )
    )
    return record(SpecModel(base, proposer), uneven_seed(mode), mode, name=name, **more)


@cache
def shared(mode: str, kind: str) -> Recorded:
    return speculative(mode, kind)


def require_same_scores(found: Recorded, expected: Recorded, *, finished: bool) -> None:
    live = live_steps(expected.new_tokens, EOS)
    assert len(found.log.scores) == len(expected.log.scores) == live.shape[1]
    for step, (one, other) in enumerate(zip(found.log.scores, expected.log.scores, strict=True)):
        rows = ~live[:, step] if finished else live[:, step]
        torch.testing.assert_close(
            one[rows], other[rows], atol=SCORE_TOLERANCE, rtol=SCORE_TOLERANCE
        )


@pytest.mark.parametrize(("kind", "mode"), turns(KINDS, MODES))
def test_calls_and_texts_are_those_of_plain_decoding(mode, kind):
    expected = plain(mode)
    assert len(set(lengths(expected.new_tokens, EOS))) == len(LENGTHS)
    found = shared(mode, kind)
    for index, (one, other) in enumerate(zip(found.log.events, expected.log.events, strict=False)):
        assert one == other, f"call {index}"
    assert len(found.log.events) == len(expected.log.events)
    require_same(found.outcome, expected.outcome)


@pytest.mark.parametrize(("kind", "mode"), turns(KINDS, MODES))
def test_running_rows_have_the_scores_of_plain_decoding(mode, kind):
    require_same_scores(shared(mode, kind), plain(mode), finished=False)


@pytest.mark.parametrize(("kind", "mode"), turns(KINDS, MODES))
def test_ended_rows_have_the_scores_of_plain_decoding(mode, kind):
    require_same_scores(shared(mode, kind), plain(mode), finished=True)


@pytest.mark.parametrize(("mode", "kind"), turns(MODES, ["uneven", "random tree"]))
def test_criterion_is_given_as_many_scores_as_there_are_steps(mode, kind):
    asked = {"output_scores": True, "return_dict_in_generate": True}
    expected = record(tiny_model("ends"), uneven_seed(mode), mode, **asked)
    found = speculative(mode, kind, **asked)
    assert found.log.events == expected.log.events
    counts = [event[4] for event in found.log.events if event[0] == "criterion"]
    assert counts == list(range(1, len(counts) + 1))


@pytest.mark.parametrize(("mode", "kind"), turns(MODES, ["uneven", "random tree", "none"]))
def test_rows_without_eos_go_on_as_in_plain_decoding(mode, kind):
    expected = record(tiny_model("endless"), uneven_seed(mode), mode, name="endless")
    found = speculative(mode, kind, name="endless", expected=expected)
    assert found.log.events == expected.log.events
    require_same_scores(found, expected, finished=False)
    require_same(found.outcome, expected.outcome)


@pytest.mark.parametrize(("mode", "seed"), turns(MODES, range(3)))
def test_log_is_that_of_plain_decoding_for_any_tree(mode, seed):
    base = tiny_model("ends")
    expected = record(base, 300 + seed, mode)
    proposer = RandomTreeProposer(
        expected.new_tokens, vocab_size=base.config.vocab_size, num_nodes=5 + 8 * seed, seed=seed
    )
    found = record(SpecModel(base, proposer), 300 + seed, mode)
    assert found.log.events == expected.log.events
    require_same_scores(found, expected, finished=False)
    require_same(found.outcome, expected.outcome)
