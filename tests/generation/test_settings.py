"""Every setting of `generate` has a row, and every row says what happens."""

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    CompileConfig,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LogitsProcessor,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    WatermarkingConfig,
)
from transformers.generation import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import tests.settings
from speclm import SpecModel
from speclm.cache import CACHE_NAME, CACHE_NAMES
from speclm.errors import OptionError
from speclm.generation.regular import first_delegated
from speclm.generation.request import require_acceptable
from speclm.generation.settings import (
    BY_NAME,
    LEFT_TO_THE_BASE,
    REFUSED_SETTINGS,
    SETTINGS,
    Fate,
    Kind,
    Setting,
    first_active,
    given_cache,
)
from speclm.methods.ngram.proposer import NgramProposer
from tests.models import VOCAB_SIZE, generate, prompts, shared_model

MODES = ({"do_sample": False, "max_new_tokens": 8}, {"do_sample": True, "max_new_tokens": 8})
GREEDY, SAMPLED = MODES
DROPPED = object()  # stands for an argument that is left out


class Collector(BaseStreamer):
    def put(self, value: torch.Tensor) -> None:
        """Keep nothing."""

    def end(self) -> None:
        """Keep nothing."""


class AddOne(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.roll(1, -1) if int(input_ids[0, -1]) % 2 else scores


class AfterFive(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 11)


@dataclass(frozen=True)
class Exercise:
    """A call that shows what a setting does.

    Args:
        value: Returns a value with an effect; made anew for each call.
        others: Arguments that it needs next to it.
        modes: What it is called with.
        changes_tokens: Whether it makes the output another one.
    """

    value: Callable[[], Any]
    others: Callable[[], dict[str, Any]] = dict
    modes: tuple[dict[str, Any], ...] = field(default=MODES)
    changes_tokens: bool = True


@cache
def greedy_tokens() -> list[int]:
    """Return what plain greedy decoding appends to the usual prompt."""
    output, _ = generate(shared_model("llama"), prompts(6), **GREEDY)
    return output[0, 6:].tolist()


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {f"w{token}": token for token in range(VOCAB_SIZE - 1)}
    vocab["abcdef"] = VOCAB_SIZE - 1  # Transformers looks at what follows this text
    words = Tokenizer(WordLevel(vocab, "w0"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1")


def filled_cache() -> DynamicCache:
    filled = DynamicCache()
    with torch.no_grad():
        shared_model("llama")(prompts(6)["input_ids"][:, :3], **{CACHE_NAME: filled})
    return filled


def a_token(place: int) -> Callable[[], int]:
    return lambda: greedy_tokens()[place]


def ending() -> dict[str, Any]:
    return {"eos_token_id": greedy_tokens()[1]}


def static() -> dict[str, Any]:
    return {"cache_implementation": "static"}


def beams() -> dict[str, Any]:
    return {"num_beams": 2}


def with_guidance() -> dict[str, Any]:
    return {"guidance_scale": 1.5}


def no_prompt() -> dict[str, Any]:
    return {"input_ids": DROPPED, "attention_mask": DROPPED}


def with_assistant() -> dict[str, Any]:
    return {"assistant_model": shared_model("llama", 7)}


def dictionary() -> dict[str, Any]:
    return {"return_dict_in_generate": True}


def quiet(
    value: Callable[[], Any], others: Callable[[], dict[str, Any]] = dict, **options: Any
) -> Exercise:
    """Return an exercise of what leaves the tokens as they are."""
    return Exercise(value, others, changes_tokens=False, **options)


EXERCISES: dict[str, Exercise] = {
    "inputs": quiet(lambda: prompts(6)["input_ids"], lambda: {"input_ids": DROPPED}),
    "input_ids": Exercise(lambda: prompts(6, seed=3)["input_ids"]),
    "attention_mask": Exercise(
        lambda: prompts(6, 3)["attention_mask"], lambda: {"input_ids": prompts(6, 3)["input_ids"]}
    ),
    "past_key_values": quiet(filled_cache),
    "cache": quiet(filled_cache),
    "logits_to_keep": quiet(lambda: 2),
    "position_ids": Exercise(lambda: 3 * torch.arange(6)[None]),
    "inputs_embeds": Exercise(  # the prompt is not returned
        lambda: shared_model("llama").get_input_embeddings()(prompts(6)["input_ids"]), no_prompt
    ),
    "labels": quiet(lambda: prompts(6)["input_ids"]),
    "generation_config": Exercise(lambda: GenerationConfig(suppress_tokens=greedy_tokens()[:1])),
    "logits_processor": Exercise(lambda: LogitsProcessorList([AddOne()])),
    "stopping_criteria": Exercise(lambda: StoppingCriteriaList([AfterFive()])),
    "prefix_allowed_tokens_fn": Exercise(lambda: lambda _, row: [int(row[-1]) // 2, 7]),
    "streamer": quiet(Collector),
    "tokenizer": quiet(tokenizer),
    "trust_remote_code": quiet(lambda: True),
    "synced_gpus": quiet(lambda: True),
    "custom_generate": quiet(lambda: "org/name"),
    "assistant_model": quiet(lambda: shared_model("llama", 7)),
    "assistant_tokenizer": quiet(tokenizer, with_assistant),
    "max_length": Exercise(lambda: 11, lambda: {"max_new_tokens": DROPPED}),
    "max_new_tokens": Exercise(lambda: 3),
    "min_length": Exercise(lambda: 11, ending),
    "min_new_tokens": Exercise(lambda: 5, ending),
    "max_time": Exercise(lambda: 0.0),
    "stop_strings": Exercise(
        lambda: [f"w{greedy_tokens()[3]}"], lambda: {"tokenizer": tokenizer()}
    ),
    "eos_token_id": Exercise(a_token(3)),
    "pad_token_id": Exercise(lambda: 9, lambda: {**prompts(6, 3), **ending()}),
    "bos_token_id": Exercise(lambda: 7, no_prompt),
    "decoder_start_token_id": quiet(lambda: 3),
    "do_sample": Exercise(lambda: True),
    "num_return_sequences": Exercise(lambda: 3, modes=(SAMPLED,)),
    "temperature": Exercise(lambda: 3.0),
    "top_k": Exercise(lambda: 1),
    "top_p": Exercise(lambda: 0.1),
    "min_p": Exercise(lambda: 0.9),
    "top_h": Exercise(lambda: 0.1),
    "typical_p": Exercise(lambda: 0.1),
    "epsilon_cutoff": Exercise(lambda: 0.3),
    "eta_cutoff": Exercise(lambda: 0.9),
    "repetition_penalty": Exercise(lambda: 9.0, lambda: {"max_new_tokens": 40}),
    "encoder_repetition_penalty": Exercise(lambda: 9.0),
    "no_repeat_ngram_size": Exercise(lambda: 1, lambda: {"max_new_tokens": 40}),
    "encoder_no_repeat_ngram_size": Exercise(lambda: 1, lambda: {"max_new_tokens": 40}),
    "bad_words_ids": Exercise(lambda: [greedy_tokens()[1:3]]),
    "sequence_bias": Exercise(lambda: [[greedy_tokens()[1:3], -50.0]]),
    "suppress_tokens": Exercise(lambda: greedy_tokens()[:1]),
    "begin_suppress_tokens": Exercise(lambda: greedy_tokens()[:1]),
    "forced_bos_token_id": Exercise(lambda: 5, lambda: prompts(1)),
    "forced_eos_token_id": Exercise(lambda: 5),
    "exponential_decay_length_penalty": Exercise(
        lambda: (1, 9.0), lambda: {"eos_token_id": 5, "max_new_tokens": 20}
    ),
    "remove_invalid_values": quiet(lambda: True),
    "renormalize_logits": quiet(lambda: True),
    "watermarking_config": Exercise(lambda: WatermarkingConfig(bias=20.0)),
    "return_dict_in_generate": quiet(lambda: True),
    "output_scores": quiet(lambda: True, dictionary),
    "output_logits": quiet(lambda: True, dictionary),
    "output_attentions": quiet(lambda: True, dictionary),
    "output_hidden_states": quiet(lambda: True, dictionary),
    "use_cache": quiet(lambda: False),
    "cache_implementation": quiet(lambda: "static"),
    "cache_config": quiet(lambda: {"nbits": 4}, static),
    "max_cache_len": quiet(lambda: 64, static),
    "compile_config": quiet(CompileConfig, static),
    "disable_compile": quiet(lambda: True, static),
    "continuous_batching_config": quiet(ContinuousBatchingConfig, static),
    "prefill_chunk_size": quiet(lambda: 4),
    "num_beams": Exercise(lambda: 3),
    "num_beam_groups": Exercise(lambda: 2, beams),
    "diversity_penalty": Exercise(lambda: 0.5, beams),
    "length_penalty": Exercise(lambda: 0.2, beams),
    "early_stopping": Exercise(lambda: True, beams),
    "low_memory": Exercise(lambda: True, beams),
    "constraints": quiet(lambda: [1]),
    "force_words_ids": quiet(lambda: [[5]]),
    "penalty_alpha": quiet(lambda: 0.5, modes=(GREEDY,)),
    "dola_layers": quiet(lambda: "low"),
    "guidance_scale": Exercise(lambda: 1.5),
    "negative_prompt_ids": Exercise(lambda: prompts(3)["input_ids"], with_guidance),
    "negative_prompt_attention_mask": Exercise(
        lambda: torch.tensor([[0, 1, 1]]),
        lambda: {**with_guidance(), "negative_prompt_ids": prompts(3)["input_ids"]},
    ),
    "token_healing": Exercise(lambda: True, lambda: {"tokenizer": tokenizer()}),
    "prompt_lookup_num_tokens": quiet(lambda: 3),
    "assistant_early_exit": quiet(lambda: 1),
    "use_mtp": quiet(lambda: True),
    "speculation_type": quiet(lambda: "dflash"),
    "is_assistant": quiet(lambda: True),
    "max_matching_ngram_size": quiet(lambda: 3, lambda: {"prompt_lookup_num_tokens": 3}),
    "num_assistant_tokens": quiet(lambda: 3, with_assistant),
    "num_assistant_tokens_schedule": quiet(lambda: "constant", with_assistant),
    "assistant_confidence_threshold": quiet(lambda: 0.5, with_assistant),
    "assistant_lookbehind": quiet(lambda: 3, with_assistant),
    "target_lookbehind": quiet(lambda: 3, with_assistant),
    "assistant_ensemble_weight": quiet(lambda: 0.5, with_assistant),
    "transformers_version": quiet(lambda: "5.0.0"),
}


UNKNOWN = {"past_key_values", "cache"} - set(CACHE_NAMES)  # to the installed Transformers


def rows(*fates: Fate) -> list[Any]:
    known = [row for row in SETTINGS if row.name not in UNKNOWN]
    return [pytest.param(row, id=row.name) for row in known if row.fate in fates]


IN_THE_MATRIX = {
    "stop_strings",  # and what it needs next to it, which takes a while to build
    *(
        name
        for setting in tests.settings.SETTINGS.values()
        if not setting.model.startswith("text")
        for name in setting.build(prompts(6))
    ),
}
"""Settings whose tokens `tests/model/test_matrix.py` compares with the base's, too."""


def honoured_rows() -> list[Any]:
    """Return rows of honoured settings, of which those of the matrix run only in `make deep`."""
    return [
        pytest.param(
            *row.values,
            id=row.id,
            marks=pytest.mark.slow if row.values[0].name in IN_THE_MATRIX else (),
        )
        for row in rows(Fate.HONOURED)
    ]


def arguments(row: Setting, mode: dict[str, Any], *, alone: bool = False) -> dict[str, Any]:
    """Return the arguments of a row's call; alone, without those that give it its effect."""
    exercise = EXERCISES[row.name]
    others = {} if alone else exercise.others()
    given = {**prompts(6), **mode, **others, row.name: exercise.value()}
    return {name: value for name, value in given.items() if value is not DROPPED}


def outcome(model: Any, row: Setting, mode: dict[str, Any], **options: Any) -> tuple[Any, ...]:
    """Return tokens, or the error, and the state of the generator."""
    try:
        given = arguments(row, mode, **options)
        torch.manual_seed(5)
        output = model.generate(**given)
    except (ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # The base's own complaints have to be the same.
        return type(error), str(error), b""
    tokens = output if isinstance(output, torch.Tensor) else output.sequences
    return tuple(tokens.shape), tokens.tolist(), torch.get_rng_state().numpy().tobytes()


@cache
def plain_tokens(is_sampled: bool) -> list[list[int]]:
    output, _ = generate(shared_model("llama"), prompts(6), **MODES[is_sampled])
    return output.tolist()


@pytest.fixture(scope="module")
def spec() -> SpecModel:
    return SpecModel(shared_model("llama"), NgramProposer())


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, spec: SpecModel) -> Callable[[], list[str]]:
    spec._logged.clear()
    caplog.set_level(logging.INFO, logger="speclm")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "speclm"]


def test_every_field_of_a_generation_config_has_a_row_and_no_row_names_another():
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert fields == {row.name for row in SETTINGS if row.kind is Kind.FIELD}


def test_every_parameter_of_generate_has_a_row_and_no_row_names_another():
    parameters = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"}
    found = {row.name for row in SETTINGS if row.kind is Kind.PARAMETER}
    assert parameters <= found
    source = inspect.getsource(GenerationMixin)  # keywords without a parameter of their own
    assert all(f'kwargs.pop("{name}"' in source for name in found - parameters)


def test_every_input_of_a_text_model_has_a_row_and_no_row_names_another():
    inputs = set(inspect.signature(LlamaForCausalLM.forward).parameters) - {"self", "kwargs"}
    found = {row.name for row in SETTINGS if row.kind is Kind.INPUT}
    assert inputs <= set(BY_NAME)
    others = set(inspect.signature(GPT2LMHeadModel.forward).parameters)
    assert found <= inputs | others | {"past_key_values", "cache"}


def test_names_are_distinct_and_every_row_has_an_exercise():
    assert len(BY_NAME) == len(SETTINGS)
    assert set(EXERCISES) == set(BY_NAME)


def test_notes_can_follow_a_name():
    for row in SETTINGS:
        assert row.note[0].islower(), row.name
        assert not row.note.endswith("."), row.name


def test_rows_that_need_another_stand_below_it():
    order = [row.name for row in SETTINGS]
    needing = [row for row in SETTINGS if row.needs and BY_NAME[row.needs].fate is row.fate]
    assert needing
    assert all(order.index(row.needs) < order.index(row.name) for row in needing)


def test_defaults_are_those_of_transformers_and_activate_nothing():
    defaults = GenerationConfig._get_default_generation_params()
    for row in SETTINGS:
        if row.default is not None:
            assert row.default == defaults[row.name]
    assert first_active((*LEFT_TO_THE_BASE, *REFUSED_SETTINGS), defaults.get) is None


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("row", honoured_rows())
def test_honoured_setting_gives_the_tokens_of_the_base(row, spec):
    exercise = EXERCISES[row.name]
    differs = False
    for mode in exercise.modes:
        expected = outcome(spec.base, row, mode)
        assert isinstance(expected[0], tuple), expected  # not an error
        assert outcome(spec, row, mode) == expected
        assert not spec.last_speculation.fallbacks
        differs |= expected[1] != plain_tokens(mode["do_sample"])
    assert differs is exercise.changes_tokens


@pytest.mark.parametrize("row", rows(Fate.DELEGATED))
def test_delegated_setting_gives_what_the_base_gives_and_logs_one_line(row, spec, lines):
    (mode, *_) = EXERCISES[row.name].modes
    expected = outcome(spec.base, row, mode)
    assert outcome(spec, row, mode) == expected
    assert outcome(spec, row, mode) == expected
    (line,) = lines()
    assert spec.last_speculation.fallbacks[0] in line
    assert (row.needs or row.name) in line


@pytest.mark.parametrize("row", rows(Fate.REFUSED))
def test_refused_setting_is_an_error_with_a_remedy(row, spec, lines):
    named = row.name
    if row.needs and BY_NAME[row.needs].fate is Fate.REFUSED:
        named = row.needs
    for mode in MODES:
        given = arguments(row, mode)
        state = torch.get_rng_state()
        with pytest.raises(OptionError, match=rf"^{named}.*drop it, or call \.base\.generate"):
            spec.generate(**given)
        assert torch.equal(torch.get_rng_state(), state)
    assert lines() == []


@pytest.mark.parametrize(
    "row", [param for param in rows(Fate.DELEGATED, Fate.REFUSED) if param.values[0].needs]
)
def test_setting_without_the_one_it_needs_is_ignored_as_the_base_ignores_it(row, spec, lines):
    expected = outcome(spec.base, row, GREEDY, alone=True)
    assert expected[1] == plain_tokens(False)
    assert outcome(spec, row, GREEDY, alone=True) == expected
    assert lines() == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (row.name, value)
        for row in SETTINGS
        if row.fate is not Fate.HONOURED and row.kind is Kind.FIELD and row.needs is None
        for value in row.inactive
        if value is not None
    ],
)
def test_value_without_an_effect_leaves_the_loop_alone(name, value, spec, lines):
    expected, _ = generate(spec.base, prompts(6), **{**GREEDY, name: value})
    found, _ = generate(spec, prompts(6), **{**GREEDY, name: value})
    assert expected.tolist() == plain_tokens(False)
    assert torch.equal(found, expected)
    assert lines() == []


def test_contrastive_search_has_no_effect_on_sampling(spec, lines):
    expected, _ = generate(spec.base, prompts(6), **SAMPLED, penalty_alpha=0.5)
    found, _ = generate(spec, prompts(6), **SAMPLED, penalty_alpha=0.5)
    assert torch.equal(found, expected)
    assert lines() == []


@pytest.mark.parametrize(
    "row",
    [p for p in rows(Fate.DELEGATED, Fate.REFUSED) if p.values[0].kind is Kind.FIELD],
)
def test_field_is_caught_in_both_configs(row):
    config = GenerationConfig()
    setattr(config, row.name, EXERCISES[row.name].value())
    others = {
        name: value for name, value in EXERCISES[row.name].others().items() if name in BY_NAME
    }
    for given, default in (({"generation_config": config}, GenerationConfig()), ({}, config)):
        if row.fate is Fate.REFUSED:
            with pytest.raises(OptionError, match=r"\.base\.generate"):
                require_acceptable({**others, **given}, default)
        else:
            assert first_delegated({**others, **given}, default) is not None


def test_paged_cache_reaches_the_base_untouched(spec, lines, monkeypatch):
    # Transformers batches such a call in threads of its own, and never enters a loop given to it.
    calls = []

    def record(_: Any, **given: Any) -> torch.Tensor:
        calls.append(given)
        return torch.zeros(1, 1, 14)

    monkeypatch.setattr(type(spec.base), "generate", record)
    found = spec.generate(**prompts(6), **GREEDY, cache_implementation="paged")
    assert found.dim() == 3  # as Transformers returns it
    (given,) = calls
    assert given["cache_implementation"] == "paged"
    assert "custom_generate" not in given
    assert "cache_implementation='paged'" in lines()[0]


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_cache_is_found_under_each_name(name):
    empty = DynamicCache()  # is false
    assert given_cache({"input_ids": None, name: empty}) is empty
    assert given_cache({name: None}) is None
    assert given_cache({}) is None
