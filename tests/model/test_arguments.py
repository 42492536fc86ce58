"""What is refused or delegated before anything is computed."""

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache

from speclm import SpecModel
from speclm.errors import CacheError, OptionError, PromptError
from speclm.model.arguments import first_delegated, require_acceptable, resolve_setting
from tests.models import prompts, shared_model

DEFAULT = GenerationConfig(top_k=11)


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


@pytest.mark.parametrize("name", ["streamer", "inputs_embeds", "past_key_values", "stop_strings"])
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
    static = StaticCache(config=shared_model("llama").config, max_cache_len=8)
    with pytest.raises(CacheError, match="rolled back"):
        require_acceptable({"past_key_values": static}, DEFAULT)
    require_acceptable({"past_key_values": DynamicCache()}, DEFAULT)
    recurrent = DynamicCache(config=shared_model("qwen3_next").config)  # states are put back
    require_acceptable({"past_key_values": recurrent}, DEFAULT)


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


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("num_draft_token", "did you mean 'num_draft_tokens'?"),
        ("num_draft_tokens", "pass it to SpecModel.from_pretrained"),
        ("max_new_token", "did you mean 'max_new_tokens'?"),
        ("wings", "drop 'wings'"),
    ],
)
def test_argument_that_nothing_takes_is_named_with_what_to_do(name, remedy):
    spec = SpecModel(shared_model("llama", 0), None)
    for others in ({}, {"num_beams": 2}):  # decoded here, and left to the base
        with pytest.raises(OptionError, match=rf"\['{name}'\] are not used") as caught:
            spec.generate(**prompts(1), **{name: 5}, **others)
        assert str(caught.value).endswith(remedy)


def test_other_errors_of_values_are_not_renamed():
    with pytest.raises(ValueError, match="top_k"):
        SpecModel(shared_model("llama", 0), None).generate(
            **prompts(1), do_sample=True, top_k=-2, max_new_tokens=2
        )
