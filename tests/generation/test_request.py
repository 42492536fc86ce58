"""What becomes of the arguments of a call before anything is computed."""

import pytest
import torch
from transformers import (
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    StaticCache,
    StoppingCriteria,
)
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StopStringCriteria,
)

from speclm import SpecModel
from speclm.cache import CACHE_NAME
from speclm.demo.bundle import assets
from speclm.errors import CacheError, OptionError, PromptError
from speclm.generation.regular import first_delegated
from speclm.generation.request import (
    arguments_for_loop,
    eos_token_ids,
    max_length,
    require_acceptable,
)
from speclm.generation.settings import resolve_setting
from speclm.methods.ngram.proposer import NgramProposer
from tests.models import prompts, shared_model

DEFAULT = GenerationConfig(top_k=11)
NO_DEFAULTS = GenerationConfig()


def test_setting_is_the_argument_then_the_given_config_then_the_models():
    given = GenerationConfig(top_k=7)
    assert resolve_setting("top_k", {"top_k": 3, "generation_config": given}, DEFAULT) == 3
    assert resolve_setting("top_k", {"generation_config": given}, DEFAULT) == 7
    assert resolve_setting("top_k", {"generation_config": GenerationConfig()}, DEFAULT) == 11
    assert resolve_setting("top_k", {"top_k": None}, DEFAULT) is None  # as Transformers has it
    assert resolve_setting("use_cache", {}, DEFAULT) is True
    assert resolve_setting("no_such_setting", {}, DEFAULT) is None


@pytest.mark.parametrize("name", ["labels", "position_ids", "prefill_chunk_size", "constraints"])
def test_argument_that_only_the_base_honours_is_named(name):
    assert first_delegated({name: torch.zeros(1, 2)}, DEFAULT) == name
    assert first_delegated({name: None}, DEFAULT) is None


@pytest.mark.parametrize("name", ["streamer", "inputs_embeds", CACHE_NAME, "stop_strings"])
def test_argument_that_the_loop_honours_is_not_named(name):
    assert first_delegated({name: DynamicCache()}, DEFAULT) is None


def test_delegation_is_found_in_the_configs_too():
    given = GenerationConfig(prefill_chunk_size=4)
    assert first_delegated({"generation_config": given}, DEFAULT) == "prefill_chunk_size=4"
    assert first_delegated({}, given) == "prefill_chunk_size=4"
    assert first_delegated({"prefill_chunk_size": None}, given) is None
    assert first_delegated({"synced_gpus": False}, DEFAULT) is None
    assert first_delegated({"num_beams": 2}, DEFAULT) == "num_beams=2"


def test_cache_is_used_unless_the_keyword_says_otherwise():
    without = GenerationConfig(use_cache=False)
    assert first_delegated({"use_cache": None}, DEFAULT) == "use_cache=None"
    assert first_delegated({}, without) == "use_cache=False"
    assert first_delegated({"use_cache": True}, without) is None


@pytest.mark.parametrize("name", ["prompt_lookup_num_tokens", "use_mtp", "speculation_type"])
def test_other_speculation_is_refused_wherever_it_is_asked_for(name):
    with pytest.raises(OptionError, match=f"{name}=3 asks for Transformers' own speculation"):
        require_acceptable({name: 3}, DEFAULT)
    given = GenerationConfig()
    setattr(given, name, 3)
    with pytest.raises(OptionError, match=name):
        require_acceptable({"generation_config": given}, DEFAULT)
    with pytest.raises(OptionError, match=name):
        require_acceptable({}, given)
    require_acceptable({name: None}, given)  # the keyword switches it off


@pytest.mark.parametrize("name", ["assistant_model", "custom_generate", "streamer"])
def test_what_is_no_field_has_no_effect_in_a_config(name):
    given = GenerationConfig()
    setattr(given, name, 3)
    require_acceptable({"generation_config": given}, given)
    assert first_delegated({"generation_config": given}, given) is None


def test_output_of_every_forward_is_refused_where_it_would_be_returned():
    wanted = {"output_attentions": True}
    require_acceptable(wanted, DEFAULT)
    with pytest.raises(OptionError, match=r"output_attentions=True asks .*\.base\.generate"):
        require_acceptable({**wanted, "return_dict_in_generate": True}, DEFAULT)


def test_cache_has_to_be_one_that_can_be_rolled_back():
    static = StaticCache(config=shared_model("mistral").config, max_cache_len=32)  # past its window
    with pytest.raises(CacheError, match="rolled back"):
        require_acceptable({CACHE_NAME: static}, DEFAULT)
    require_acceptable({CACHE_NAME: DynamicCache()}, DEFAULT)
    recurrent = DynamicCache(config=shared_model("qwen3_next").config)  # states are put back
    require_acceptable({CACHE_NAME: recurrent}, DEFAULT)


@pytest.mark.parametrize("name", ["inputs", "input_ids"])
def test_prompt_is_checked_under_both_names(name):
    with pytest.raises(PromptError, match=r"shape \(0, 3\)"):
        require_acceptable({name: torch.zeros(0, 3)}, DEFAULT)
    mask = prompts(3, 2)["attention_mask"]
    require_acceptable({name: mask, "attention_mask": mask}, DEFAULT)
    with pytest.raises(PromptError, match="padded on the right"):
        require_acceptable({name: mask, "attention_mask": mask.flip(1)}, DEFAULT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_prompt_that_holds_no_token_ids_is_refused(dtype):
    with pytest.raises(PromptError, match="expected integer token ids"):
        require_acceptable({"input_ids": torch.ones(1, 3, dtype=dtype)}, DEFAULT)
    with pytest.raises(PromptError, match="is a str"):
        require_acceptable({"inputs": "text"}, DEFAULT)


def test_mask_has_the_shape_of_the_prompt():
    tokens = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(PromptError, match="attention mask has shape"):
        require_acceptable({"input_ids": tokens, "attention_mask": tokens[:1]}, DEFAULT)


def test_call_without_a_prompt_is_left_to_transformers():
    require_acceptable({}, DEFAULT)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(assets()["base"])


def test_streamer_and_tokenizer_are_left_out():
    arguments = {"streamer": object(), "tokenizer": object(), "max_new_tokens": 3}
    assert arguments_for_loop(arguments, NO_DEFAULTS) == {"max_new_tokens": 3}
    assert len(arguments) == 3


def test_stop_strings_become_a_criterion_before_the_callers(tokenizer):
    own = MaxLengthCriteria(9)
    arguments = {"stop_strings": ["FROM"], "tokenizer": tokenizer, "stopping_criteria": [own]}
    found = arguments_for_loop(arguments, NO_DEFAULTS)
    stop, last = found["stopping_criteria"]
    assert type(stop) is StopStringCriteria
    assert last is own
    assert found["stop_strings"] is None
    assert arguments["stopping_criteria"] == [own]


def test_stop_strings_of_a_given_config_leave_it_as_it_is(tokenizer):
    config = GenerationConfig(stop_strings=["FROM"])
    found = arguments_for_loop({"generation_config": config, "tokenizer": tokenizer}, NO_DEFAULTS)
    assert [type(one) for one in found["stopping_criteria"]] == [StopStringCriteria]
    assert found["generation_config"].stop_strings is None
    assert config.stop_strings == ["FROM"]
    assert "stop_strings" not in found  # next to a config Transformers would warn


def test_stop_strings_of_the_models_own_config_are_outranked(tokenizer):
    default = GenerationConfig(stop_strings="FROM")
    found = arguments_for_loop({"tokenizer": tokenizer}, default)
    assert [type(one) for one in found["stopping_criteria"]] == [StopStringCriteria]
    assert found["stop_strings"] is None


def test_criterion_of_the_caller_takes_the_place_of_stop_strings(tokenizer):
    own = StopStringCriteria(tokenizer, ["WHERE"])
    arguments = {"stop_strings": "FROM", "tokenizer": tokenizer, "stopping_criteria": [own]}
    assert list(arguments_for_loop(arguments, NO_DEFAULTS)["stopping_criteria"]) == [own]


def test_stop_strings_without_a_tokenizer_are_left_to_transformers():
    assert arguments_for_loop({"stop_strings": "FROM"}, NO_DEFAULTS) == {"stop_strings": "FROM"}


def test_rule_for_drawn_drafts_needs_a_proposer_that_draws():
    spec = SpecModel(shared_model("llama"), NgramProposer())
    with pytest.raises(OptionError, match="does not draw"):
        spec.generate(**prompts(4), do_sample=True, max_new_tokens=2, acceptance="rejection")


class AfterFive(StoppingCriteria):
    def __call__(self, input_ids, scores, **_):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 11)


@pytest.mark.parametrize(
    ("criteria", "expected"),
    [
        ([MaxLengthCriteria(30), EosTokenCriteria(3)], 30),
        ([MaxLengthCriteria(9), MaxLengthCriteria(12)], 9),
        ([AfterFive()], 20),
    ],
)
def test_rows_end_at_the_length_of_the_criteria_before_that_of_the_config(criteria, expected):
    assert max_length(criteria, GenerationConfig(max_length=20)) == expected


def test_eos_token_ids_are_those_of_all_criteria():
    criteria = [EosTokenCriteria([3, 4]), MaxLengthCriteria(9), EosTokenCriteria(7)]
    assert eos_token_ids(criteria) == {3, 4, 7}
    assert eos_token_ids([MaxLengthCriteria(9)]) == frozenset()
