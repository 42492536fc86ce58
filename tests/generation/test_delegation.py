"""Settings that are decoded plainly: equal to `base.generate` by definition, and said once."""

import logging
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    StoppingCriteria,
    TextStreamer,
)
from transformers.generation import (
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    StoppingCriteriaList,
    TopKLogitsWarper,
)

from speclm import SpecModel
from speclm.errors import PromptError
from speclm.generation.delegation import (
    NeedsPlainDecoding,
    eos_token_ids,
    left_padding,
    require_left_padding,
    require_supported,
)
from speclm.proposers.ngram import NgramProposer
from tests.models import build_model, generate, prompts, shared_model

SAMPLED = {"do_sample": True, "max_new_tokens": 8}
GREEDY = {"do_sample": False, "max_new_tokens": 8}


class Collector(TextStreamer):
    """Collects the tokens that are streamed."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


class AddOne(LogitsProcessor):
    """Depends on the text, as any unknown class may."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.roll(1, -1) if int(input_ids[0, -1]) % 2 else scores


class TopKOfOurOwn(TopKLogitsWarper):
    """A subclass may look at anything."""


class AfterFive(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 11)


# Cells that may decode plainly, each with what it is that the loop does not do itself.
PLAIN_CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "RepetitionPenaltyLogitsProcessor": ("reads the row", {**SAMPLED, "repetition_penalty": 1.3}),
    "NoRepeatNGramLogitsProcessor": ("reads the row", {**GREEDY, "no_repeat_ngram_size": 2}),
    "MinLengthLogitsProcessor": (
        "reads the length",
        {**SAMPLED, "min_new_tokens": 4, "eos_token_id": 5},
    ),
    "ForcedEOSTokenLogitsProcessor": ("reads the length", {**GREEDY, "forced_eos_token_id": 5}),
    "ExponentialDecayLengthPenalty": (
        "reads the length",
        {**SAMPLED, "exponential_decay_length_penalty": (2, 1.5), "eos_token_id": 5},
    ),
    "NoBadWordsLogitsProcessor": ("reads the row", {**SAMPLED, "bad_words_ids": [[3, 4]]}),
    "SequenceBiasLogitsProcessor": ("reads the row", {**GREEDY, "sequence_bias": [[[3, 4], 2.0]]}),
    "AddOne": ("unknown", {**SAMPLED, "logits_processor": LogitsProcessorList([AddOne()])}),
    "TopKOfOurOwn": (
        "unknown",
        {**SAMPLED, "logits_processor": LogitsProcessorList([TopKOfOurOwn(3)])},
    ),
    "prefix_allowed_tokens_fn": (
        "reads the row",
        {**GREEDY, "prefix_allowed_tokens_fn": lambda _, row: [int(row[-1]) // 2, 7]},
    ),
    "stopping_criteria": (
        "unknown",
        {**GREEDY, "stopping_criteria": StoppingCriteriaList([AfterFive()])},
    ),
    "MaxTimeCriteria": ("reads the clock", {**GREEDY, "max_time": 1000.0}),
    "num_beams=3": ("keeps several hypotheses", {**GREEDY, "num_beams": 3}),
    "num_beams=2": ("keeps several hypotheses", {**SAMPLED, "num_beams": 2}),
    "use_cache=False": ("wants no cache", {**GREEDY, "use_cache": False}),
    "cache_implementation": ("another cache", {**GREEDY, "cache_implementation": "static"}),
    "past_key_values": ("another cache", {**GREEDY, "past_key_values": DynamicCache()}),
    "output_scores": (
        "more outputs",
        {**SAMPLED, "output_scores": True, "return_dict_in_generate": True},
    ),
    "output_logits": (
        "more outputs",
        {**GREEDY, "output_logits": True, "return_dict_in_generate": True},
    ),
    "position_ids": ("numbered by hand", {**GREEDY, "position_ids": torch.arange(6)[None] + 2}),
    "guidance": ("runs forwards of its own", {**SAMPLED, "guidance_scale": 1.5}),
}


@pytest.fixture(scope="module")
def spec() -> SpecModel:
    return SpecModel(shared_model("llama"), NgramProposer())


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, spec: SpecModel) -> Any:
    spec._logged.clear()
    caplog.set_level(logging.INFO, logger="speclm")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "speclm"]


@pytest.mark.parametrize("name", PLAIN_CELLS)
def test_delegated_setting_equals_the_base_and_is_logged_once(name, spec, lines):
    inputs = prompts(6)
    settings = PLAIN_CELLS[name][1]
    if name == "past_key_values":
        settings = {**settings, "past_key_values": DynamicCache()}
    expected, state = generate(spec.base, inputs, **settings)
    if name == "past_key_values":
        settings = {**settings, "past_key_values": DynamicCache()}
    found, state_found = generate(spec, inputs, **settings)
    assert torch.equal(state_found, state)
    fallbacks = spec.last_speculation.fallbacks
    assert len(fallbacks) == 1
    assert name in fallbacks[0] or name == "guidance"
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    else:
        assert torch.equal(found.sequences, expected.sequences)
        assert found.speculation.fallbacks == fallbacks
    if name not in {"past_key_values", "stopping_criteria"}:  # these are used up by a call
        generate(spec, inputs, **settings)
    assert len(lines()) == 1
    assert fallbacks[0] in lines()[0]
    assert "LlamaForCausalLM.generate" in lines()[0]


@pytest.mark.parametrize("name", ["output_scores", "output_logits"])
def test_delegated_outputs_are_those_of_the_base(name, spec):
    settings = PLAIN_CELLS[name][1]
    field = name.removeprefix("output_")
    expected, _ = generate(spec.base, prompts(6), **settings)
    found, _ = generate(spec, prompts(6), **settings)
    for one, other in zip(found[field], expected[field], strict=True):
        assert torch.equal(one, other)


def test_beams_return_their_own_fields_and_the_counters(spec):
    settings = {**GREEDY, "num_beams": 2, "return_dict_in_generate": True, "output_scores": True}
    expected, _ = generate(spec.base, prompts(6), **settings)
    found, _ = generate(spec, prompts(6), **settings)
    assert type(found) is type(expected)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.sequences_scores, expected.sequences_scores)
    assert found.speculation.fallbacks == ["num_beams=2"]


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED])
def test_streamer_is_given_the_base_models_stream(settings, spec, lines):
    streams = [Collector(), Collector()]
    expected, _ = generate(spec.base, prompts(6), streamer=streams[0], **settings)
    found, _ = generate(spec, prompts(6), streamer=streams[1], **settings)
    assert torch.equal(found, expected)
    assert streams[1].tokens == streams[0].tokens == [*found[0].tolist(), -1]
    assert spec.last_speculation.fallbacks == ["streamer"]
    assert len(lines()) == 1


def test_settings_of_the_generation_config_are_delegated_alike(spec, lines):
    config = GenerationConfig(repetition_penalty=1.4, pad_token_id=0, **SAMPLED)
    expected, state = generate(spec.base, prompts(6), generation_config=config)
    found, state_found = generate(spec, prompts(6), generation_config=config)
    assert torch.equal(found, expected)
    assert torch.equal(state_found, state)
    assert "RepetitionPenalty" in lines()[0]


def test_settings_of_the_models_own_config_are_delegated_alike():
    model = build_model("llama")
    model.generation_config.stop_strings = ["x"]
    spec = SpecModel(model, NgramProposer())
    with pytest.raises(ValueError, match="tokenizer"):  # Transformers' own complaint
        spec.generate(**prompts(6), **GREEDY)
    assert spec.last_speculation.fallbacks == ["stop_strings"]


def test_mask_with_holes_is_delegated(spec, lines):
    inputs = prompts(6)
    inputs["attention_mask"][0, 2] = 0
    expected, state = generate(spec.base, inputs, **SAMPLED)
    found, state_found = generate(spec, inputs, **SAMPLED)
    assert torch.equal(found, expected)
    assert torch.equal(state_found, state)
    assert "holes" in lines()[0]


def test_prompt_of_embeddings_is_delegated(spec, lines):
    embeddings = spec.base.get_input_embeddings()(prompts(6)["input_ids"])
    expected, _ = generate(spec.base, {"inputs_embeds": embeddings}, **GREEDY)
    found, _ = generate(spec, {"inputs_embeds": embeddings}, **GREEDY)
    assert torch.equal(found, expected)
    assert lines()[0].endswith("inputs_embeds")


def test_speculation_logs_nothing(spec, lines):
    spec.generate(**prompts(6), **SAMPLED)
    assert spec.last_speculation.fallbacks == []
    assert lines() == []


def check(config=None, processors=(), criteria=(), **inputs):
    require_supported(
        config or GenerationConfig(),
        LogitsProcessorList(processors),
        StoppingCriteriaList(criteria),
        inputs,
    )


def test_plain_settings_are_supported():
    check(
        processors=[TopKLogitsWarper(5)],
        criteria=[MaxLengthCriteria(9), EosTokenCriteria(3)],
        attention_mask=None,
        use_cache=True,
        logits_to_keep=1,
    )


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"config": GenerationConfig(num_beams=2)}, "num_beams=2"),
        ({"config": GenerationConfig(use_cache=False)}, "use_cache=False"),
        ({"config": GenerationConfig(prefill_chunk_size=4)}, "prefill_chunk_size=4"),
        ({"config": GenerationConfig(output_scores=True)}, "output_scores=True"),
        ({"processors": [MinLengthLogitsProcessor(3, 0)]}, "MinLengthLogitsProcessor"),
        ({"criteria": [AfterFive()]}, "AfterFive"),
        ({"pixel_values": 1}, "'pixel_values'"),
    ],
)
def test_unsupported_setting_is_named(settings, reason):
    with pytest.raises(NeedsPlainDecoding, match=reason):
        check(**settings)


def test_eos_token_ids_are_those_of_all_criteria():
    criteria = [EosTokenCriteria([3, 4]), MaxLengthCriteria(9), EosTokenCriteria(7)]
    assert eos_token_ids(criteria) == {3, 4, 7}
    assert eos_token_ids([MaxLengthCriteria(9)]) == frozenset()


def test_left_padding_is_counted():
    inputs = prompts(5, 2, 4)
    assert left_padding(inputs["input_ids"], inputs["attention_mask"]).tolist() == [0, 3, 1]
    assert left_padding(inputs["input_ids"], None).tolist() == [0, 0, 0]


def test_mask_with_holes_needs_plain_decoding():
    with pytest.raises(NeedsPlainDecoding, match="holes"):
        left_padding(torch.ones(1, 4, dtype=torch.long), torch.tensor([[0, 1, 0, 1]]))


def test_right_padding_is_an_error_and_not_delegated():
    with pytest.raises(PromptError, match="left padding"):
        require_left_padding(torch.tensor([[1, 1], [1, 0]]))
    with pytest.raises(PromptError, match="padded on the right"):
        left_padding(torch.ones(1, 2, dtype=torch.long), torch.tensor([[1, 0]]))
