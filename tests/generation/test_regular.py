"""Calls that are left to regular generation, with one line in the log."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import (
    LogitsProcessorList,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TopKLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from speclm import SpecModel
from speclm.acceptance import ExactRule
from speclm.errors import PromptError
from speclm.generation import regular
from speclm.generation.regular import (
    NeedsRegularGeneration,
    left_padding,
    meets_switch,
    prompt_length,
    require_left_padding,
    require_supported,
)
from speclm.methods.ngram.proposer import NgramProposer
from speclm.target import TargetView
from tests.models import build_model, generate, prompts, shared_model

SAMPLED = {"do_sample": True, "max_new_tokens": 8}
NOTHING_PADDED = torch.tensor([0])
GREEDY = {"do_sample": False, "max_new_tokens": 8}


# Cells that may decode plainly, each with what it is that the loop does not do itself.
PLAIN_CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "num_beams=3": ("keeps several hypotheses", {**GREEDY, "num_beams": 3}),
    "num_beams=2": ("keeps several hypotheses", {**SAMPLED, "num_beams": 2}),
    "use_cache=False": ("wants no cache", {**GREEDY, "use_cache": False}),
    "cache_implementation": ("another cache", {**GREEDY, "cache_implementation": "static"}),
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
    expected, state = generate(spec.base, inputs, **settings)
    found, state_found = generate(spec, inputs, **settings)
    assert torch.equal(state_found, state)
    assert torch.equal(found, expected)
    fallbacks = spec.last_speculation.fallbacks
    assert len(fallbacks) == 1
    assert name in fallbacks[0] or name == "guidance"
    generate(spec, inputs, **settings)
    assert len(lines()) == 1
    assert fallbacks[0] in lines()[0]
    assert "LlamaForCausalLM.generate" in lines()[0]


def test_beams_return_their_own_fields_and_the_counters(spec):
    settings = {**GREEDY, "num_beams": 2, "return_dict_in_generate": True, "output_scores": True}
    expected, _ = generate(spec.base, prompts(6), **settings)
    found, _ = generate(spec, prompts(6), **settings)
    assert type(found) is type(expected)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.sequences_scores, expected.sequences_scores)
    assert found.speculation.fallbacks == ["num_beams=2"]


def test_settings_of_the_generation_config_are_delegated_alike(spec, lines):
    config = GenerationConfig(num_beams=2, pad_token_id=0, **GREEDY)
    expected, _ = generate(spec.base, prompts(6), generation_config=config)
    found, _ = generate(spec, prompts(6), generation_config=config)
    assert torch.equal(found, expected)
    assert "num_beams=2" in lines()[0]


def test_stop_strings_without_a_tokenizer_get_transformers_own_complaint():
    model = build_model("llama")
    model.generation_config.stop_strings = ["x"]
    spec = SpecModel(model, NgramProposer())
    with pytest.raises(ValueError, match="tokenizer"):
        spec.generate(**prompts(6), **GREEDY)


@pytest.mark.parametrize(
    "processor", [RepetitionPenaltyLogitsProcessor(1.3), MinLengthLogitsProcessor(9, 5)]
)
def test_rules_that_compare_distributions_leave_processors_of_the_text_to_the_base(
    processor, spec, lines
):
    settings = {**SAMPLED, "logits_processor": LogitsProcessorList([processor])}
    expected, _ = generate(spec.base, prompts(6), **settings)
    found, _ = generate(spec, prompts(6), **settings, acceptance="typical")
    assert torch.equal(found, expected)
    assert "typical" in lines()[0]


def test_mask_with_holes_is_delegated(spec, lines):
    inputs = prompts(6)
    inputs["attention_mask"][0, 2] = 0
    expected, state = generate(spec.base, inputs, **SAMPLED)
    found, state_found = generate(spec, inputs, **SAMPLED)
    assert torch.equal(found, expected)
    assert torch.equal(state_found, state)
    assert "holes" in lines()[0]


def test_speculation_logs_nothing(spec, lines):
    spec.generate(**prompts(6), **SAMPLED)
    assert spec.last_speculation.fallbacks == []
    assert lines() == []


def check(config=None, processors=(), device="cpu"):
    config = config or GenerationConfig()
    processors = LogitsProcessorList(processors)
    require_supported(config, processors, ExactRule(), device=torch.device(device))


def test_plain_settings_are_supported():
    check(processors=[TopKLogitsWarper(5), MinLengthLogitsProcessor(3, 0)])


def test_sampling_is_delegated_where_a_generator_cannot_be_put_back():
    check(device="meta")  # nothing is drawn
    with pytest.raises(NeedsRegularGeneration, match="generator of device 'meta' cannot be saved"):
        check(GenerationConfig(do_sample=True), device="meta")


def test_a_generator_that_cannot_be_put_back_is_said_once(spec, lines, monkeypatch):
    reason = "the generator is of no use"
    monkeypatch.setattr(regular, "generator_obstacle", lambda device: reason)
    expected, state = generate(spec.base, prompts(6), **SAMPLED)
    for _ in range(2):
        found, state_found = generate(spec, prompts(6), **SAMPLED)
        assert torch.equal(found, expected)
        assert torch.equal(state_found, state)
        assert spec.last_speculation.fallbacks == [reason]
    assert [reason in line for line in lines()] == [True]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"config": GenerationConfig(num_beams=2)}, "num_beams=2"),
        ({"config": GenerationConfig(use_cache=False)}, "use_cache=False"),
        ({"config": GenerationConfig(prefill_chunk_size=4)}, "prefill_chunk_size=4"),
        (
            {"processors": [UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, None)]},
            "UnbatchedClassifierFreeGuidance",
        ),
    ],
)
def test_unsupported_setting_is_named(settings, reason):
    with pytest.raises(NeedsRegularGeneration, match=reason):
        check(**settings)


@pytest.mark.parametrize("mode", [GREEDY, SAMPLED])
@pytest.mark.parametrize("length", [2, 9, 40])
def test_length_of_a_criterion_passed_in_replaces_that_of_the_config(mode, length, spec):
    inputs = prompts(4, 6)
    arguments = {**mode, "stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(length)])}
    expected, state = generate(spec.base, inputs, **arguments)
    found, found_state = generate(spec, inputs, **arguments)
    assert found.tolist() == expected.tolist()
    assert torch.equal(found_state, state)
    assert spec.last_speculation.fallbacks == []


@pytest.mark.parametrize(
    ("num_tokens", "mask", "cached", "expected"),
    [(5, 5, 0, 5), (5, None, 0, 5), (5, 5, 3, 5), (2, 5, 3, 5)],
)
def test_prompt_length_counts_what_only_the_cache_knows(num_tokens, mask, cached, expected):
    mask = None if mask is None else torch.ones(1, mask)
    given = SimpleNamespace(get_seq_length=lambda: cached)
    tokens = torch.ones(1, num_tokens, dtype=torch.long)
    assert prompt_length(tokens, mask, GenerationConfig(), given) == expected


def test_mask_that_fits_neither_prompt_nor_cache_needs_plain_decoding():
    tokens = torch.ones(1, 2, dtype=torch.long)
    with pytest.raises(
        NeedsRegularGeneration, match="0 cached and 2 given tokens under a mask for 5"
    ):
        prompt_length(tokens, torch.ones(1, 5), GenerationConfig(), None)


def test_left_padding_is_counted():
    inputs = prompts(5, 2, 4)
    assert left_padding(inputs["input_ids"], inputs["attention_mask"], length=5).tolist() == [
        0,
        3,
        1,
    ]
    assert left_padding(inputs["input_ids"], None, length=5).tolist() == [0, 0, 0]


def test_mask_with_holes_needs_plain_decoding():
    with pytest.raises(NeedsRegularGeneration, match="holes"):
        left_padding(torch.ones(1, 4, dtype=torch.long), torch.tensor([[0, 1, 0, 1]]), length=4)


def test_right_padding_is_an_error_and_not_delegated():
    with pytest.raises(PromptError, match="left padding"):
        require_left_padding(torch.tensor([[1, 1], [1, 0]]))
    with pytest.raises(PromptError, match="padded on the right"):
        left_padding(torch.ones(1, 2, dtype=torch.long), torch.tensor([[1, 0]]), length=2)


def test_switch_is_met_by_positions_and_read_again_by_slots():
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = build_model("llama", rope_parameters=dynamic, max_position_embeddings=20)
    view = TargetView(model)
    assert not meets_switch(view, NOTHING_PADDED, start=5, end=12)
    assert meets_switch(view, NOTHING_PADDED, start=5, end=25)
    assert not meets_switch(view, torch.tensor([9, 9]), start=14, end=25)
    assert not meets_switch(TargetView(shared_model("llama")), NOTHING_PADDED, start=5, end=900)
