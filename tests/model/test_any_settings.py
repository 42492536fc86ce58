"""Any settings together, any ragged batch, any trees: what `base.generate` leaves behind.

A failing case is printed as a call of `check`, which can be pasted. What was found once stays as
an example.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import hypothesis
import pytest
from hypothesis import event, given, note
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)

from speclm import SpecModel
from tests import callbacks
from tests.models import prompts
from tests.outcomes import Outcome, live_steps, observe, require_close, require_same
from tests.proposers import PROPOSERS, RandomTreeProposer, build_proposer
from tests.settings import (
    EOS,
    TEXT,
    TINY_VOCAB_SIZE,
    Arguments,
    Inputs,
    force_text,
    tiny_draft,
    tiny_model,
    tokenizer,
)

pytestmark = pytest.mark.untraced  # what it runs is traced elsewhere, at half the speed

PROFILE_EXAMPLES = hypothesis.settings.default.max_examples
MAX_EXAMPLES = min(PROFILE_EXAMPLES // 2, 2000)  # a case is two calls
PROCESSORS = {
    "counts calls": lambda _: callbacks.CountsCalls(),
    "treats rows apart": callbacks.TreatsRowsApart,
    "reads the whole batch": lambda _: callbacks.ReadsTheWholeBatch(),
    "draws at each call": lambda _: callbacks.DrawsAtEachCall(),
    "draws at some calls": lambda _: callbacks.DrawsAtSomeCalls(),
    "top-k by the text": lambda _: callbacks.TopKByTheText(),
}
CRITERIA = {
    "ends rows": lambda _: callbacks.EndsRows(),
    "ends rows by calls": lambda _: callbacks.EndsRowsByCalls(),
    "ends all": lambda length: callbacks.EndsAll(length=length + 8),
}
WATERMARKS = {
    "left hash": lambda: WatermarkingConfig(bias=2.5),
    "hash of itself": lambda: WatermarkingConfig(seeding_scheme="selfhash", context_width=2),
    "SynthID": lambda: SynthIDTextWatermarkingConfig(keys=[3, 14, 15], ngram_len=3),
}


@dataclass(frozen=True)
class Case:
    """One call, in values that can be printed.

    Args:
        settings: Arguments of the call.
        lengths: Tokens of each prompt.
        model: Name of the model, see `tiny_model`; the text models are made to say a text.
        processors: Names of users' processors, in order.
        criteria: Names of users' criteria, in order.
        watermark: Name of a watermark.
        kind: Proposer, one of `PROPOSERS`.
        num_nodes: Most nodes of a random tree.
        seed: Of the prompts, the draws and the planted errors.
    """

    settings: Arguments = field(default_factory=dict)
    lengths: tuple[int, ...] = (4,)
    model: str = "ends"
    processors: tuple[str, ...] = ()
    criteria: tuple[str, ...] = ()
    watermark: str | None = None
    kind: str = "random tree"
    num_nodes: int = 9
    seed: int = 0

    def inputs(self) -> Inputs:
        """Return the prompts."""
        return prompts(*self.lengths, vocab_size=60, seed=self.seed)

    def arguments(self, inputs: Inputs) -> Arguments:
        """Return the arguments of a call, with new processors and criteria."""
        batch, length = inputs["input_ids"].shape
        batch *= self.settings.get("num_return_sequences", 1)
        arguments: dict[str, Any] = dict(self.settings)
        if self.processors:
            arguments["logits_processor"] = LogitsProcessorList(
                [PROCESSORS[name](batch) for name in self.processors]
            )
        if self.criteria:
            arguments["stopping_criteria"] = StoppingCriteriaList(
                [CRITERIA[name](length) for name in self.criteria]
            )
        if self.watermark is not None:
            arguments["watermarking_config"] = WATERMARKS[self.watermark]()
        if self.model.startswith("text"):
            arguments["prefix_allowed_tokens_fn"] = force_text(TEXT, inputs)
        if "stop_strings" in arguments:
            arguments["tokenizer"] = tokenizer()
        return arguments


@cache
def spec_model(name: str) -> SpecModel:
    return SpecModel(tiny_model(name), None)


def check(case: Case) -> str:
    """Compare a case with regular generation: what it leaves behind, or that it fails.

    Returns:
        How it was decoded, for statistics.
    """
    spec = spec_model(case.model)
    inputs = case.inputs()
    try:
        expected = observe(
            spec.base, inputs, case.arguments(inputs), base=spec.base, seed=case.seed
        )
    except (RuntimeError, ValueError, IndexError) as error:  # no token is allowed, say
        spec.proposer = None
        with pytest.raises((type(error), ArithmeticError)):
            observe(spec, inputs, case.arguments(inputs), base=spec.base, seed=case.seed)
        return "regular generation fails"
    spec.proposer = _proposer(case, spec, expected.new_tokens(inputs))
    found = observe(spec, inputs, case.arguments(inputs), base=spec.base, seed=case.seed)
    require_same(found, expected)
    _require_same_scores(case, found, expected, inputs)
    if spec.last_speculation.fallbacks:
        return "decoded plainly"
    if case.kind == "scripted":
        assert found.num_forwards <= expected.num_forwards
    return "decoded speculatively"


def _proposer(case: Case, spec: SpecModel, reference: list[list[int]]) -> Any:
    if case.kind == "random tree":
        return RandomTreeProposer(
            reference,
            vocab_size=spec.config.vocab_size,
            num_nodes=case.num_nodes,
            seed=case.seed,
        )
    return build_proposer(
        case.kind,
        reference,
        target=spec.base,
        draft=tiny_draft(spec.config.vocab_size),
        seed=case.seed,
    )


def _require_same_scores(case: Case, found: Outcome, expected: Outcome, inputs: Inputs) -> None:
    eos = case.settings.get("eos_token_id", EOS)
    live = live_steps(expected.new_tokens(inputs), eos)
    require_close(found.scores, expected.scores, live=live)
    require_close(found.logits, expected.logits, live=live)


TOKENS = st.integers(1, TINY_VOCAB_SIZE - 1)
WORDS = st.lists(TOKENS, min_size=1, max_size=2)
BIASES = st.tuples(WORDS, st.sampled_from([-6.0, -1.5, 2.0, 8.0])).map(list)
FRAGMENTS: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.sampled_from([0.3, 0.7, 1.4]),
    "top_k": st.sampled_from([1, 2, 5, 30]),
    "top_p": st.sampled_from([0.05, 0.5, 0.9]),
    "min_p": st.sampled_from([0.01, 0.2]),
    "typical_p": st.sampled_from([0.3, 0.9]),
    "epsilon_cutoff": st.sampled_from([0.01, 0.1]),
    "eta_cutoff": st.sampled_from([0.01, 0.1]),
    "top_h": st.sampled_from([0.3, 0.8]),
    "repetition_penalty": st.sampled_from([0.8, 1.1, 1.8]),
    "no_repeat_ngram_size": st.integers(1, 3),
    "encoder_repetition_penalty": st.sampled_from([0.7, 1.5]),
    "encoder_no_repeat_ngram_size": st.integers(1, 2),
    "bad_words_ids": st.lists(WORDS, min_size=1, max_size=4),
    "sequence_bias": st.lists(BIASES, min_size=1, max_size=4, unique_by=lambda one: tuple(one[0])),
    "min_new_tokens": st.integers(1, 6),
    "min_length": st.integers(1, 8),
    "forced_bos_token_id": TOKENS,
    "forced_eos_token_id": TOKENS,
    "suppress_tokens": st.lists(TOKENS, min_size=1, max_size=30, unique=True),
    "begin_suppress_tokens": st.lists(TOKENS, min_size=1, max_size=30, unique=True),
    "exponential_decay_length_penalty": st.tuples(st.integers(1, 6), st.sampled_from([1.05, 1.5])),
    "renormalize_logits": st.just(True),
    "remove_invalid_values": st.just(True),
    "eos_token_id": st.lists(TOKENS, min_size=1, max_size=12, unique=True),
    "output_scores": st.just(True),
    "output_logits": st.just(True),
}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    model = draw(st.sampled_from(["ends"] * 6 + ["endless"] * 2 + ["text", "text without eos"]))
    settings: Arguments = {"do_sample": draw(st.booleans())}
    settings["max_new_tokens"] = draw(st.sampled_from([1, 2, 3, 8, 11, 16, 25]))
    names = draw(st.lists(st.sampled_from(sorted(FRAGMENTS)), max_size=5, unique=True))
    for name in names:
        value = draw(FRAGMENTS[name])
        if name in {"min_new_tokens", "min_length"}:
            value = min(value, settings["max_new_tokens"])
        if name != "eos_token_id" or model == "ends":
            settings[name] = value
    if not settings["do_sample"]:
        unused = ("temperature", "top_k", "top_p", "min_p", "typical_p", "top_h")
        settings = {key: value for key, value in settings.items() if key not in unused}
    if {"output_scores", "output_logits"} & set(settings):
        settings["return_dict_in_generate"] = True
    if model in {"endless", "text without eos"}:
        settings.pop("exponential_decay_length_penalty", None)  # needs an eos token
    if model.startswith("text") and draw(st.booleans()):
        start = draw(st.integers(0, len(TEXT) - 4))
        settings["stop_strings"] = [TEXT[start : start + draw(st.integers(1, 4))]]
    if settings["do_sample"] and draw(st.integers(0, 9)) == 0:
        settings["num_return_sequences"] = 2
    own = draw(st.booleans())
    return Case(
        settings=settings,
        lengths=tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))),
        model=model,
        processors=tuple(draw(st.lists(st.sampled_from(sorted(PROCESSORS)), max_size=2)))
        if own
        else (),
        criteria=tuple(draw(st.lists(st.sampled_from(sorted(CRITERIA)), max_size=2)))
        if own
        else (),
        watermark=draw(st.sampled_from([None] * 7 + sorted(WATERMARKS))),
        kind=draw(st.sampled_from(("random tree", *PROPOSERS))),
        num_nodes=draw(st.sampled_from([1, 4, 9, 25])),
        seed=draw(st.integers(0, 999)),
    )


@hypothesis.settings(max_examples=MAX_EXAMPLES)
@given(case=cases())
def test_any_case_leaves_behind_what_regular_generation_does(case):
    note(f"check({case!r})")
    event(check(case))
