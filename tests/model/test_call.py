"""What a call passes on to Transformers' entry."""

import pytest
from transformers import AutoTokenizer, GenerationConfig
from transformers.generation import MaxLengthCriteria, StopStringCriteria

from speclm.demo.bundle import assets
from speclm.model.call import for_own_loop

DEFAULT = GenerationConfig()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(assets()["base"])


def test_streamer_and_tokenizer_are_left_out():
    arguments = {"streamer": object(), "tokenizer": object(), "max_new_tokens": 3}
    assert for_own_loop(arguments, DEFAULT) == {"max_new_tokens": 3}
    assert len(arguments) == 3


def test_stop_strings_become_a_criterion_before_the_callers(tokenizer):
    own = MaxLengthCriteria(9)
    arguments = {"stop_strings": ["FROM"], "tokenizer": tokenizer, "stopping_criteria": [own]}
    found = for_own_loop(arguments, DEFAULT)
    stop, last = found["stopping_criteria"]
    assert type(stop) is StopStringCriteria
    assert last is own
    assert found["stop_strings"] is None
    assert arguments["stopping_criteria"] == [own]


def test_stop_strings_of_a_given_config_leave_it_as_it_is(tokenizer):
    config = GenerationConfig(stop_strings=["FROM"])
    found = for_own_loop({"generation_config": config, "tokenizer": tokenizer}, DEFAULT)
    assert [type(one) for one in found["stopping_criteria"]] == [StopStringCriteria]
    assert found["generation_config"].stop_strings is None
    assert config.stop_strings == ["FROM"]
    assert "stop_strings" not in found  # next to a config Transformers would warn


def test_stop_strings_of_the_models_own_config_are_outranked(tokenizer):
    default = GenerationConfig(stop_strings="FROM")
    found = for_own_loop({"tokenizer": tokenizer}, default)
    assert [type(one) for one in found["stopping_criteria"]] == [StopStringCriteria]
    assert found["stop_strings"] is None


def test_criterion_of_the_caller_takes_the_place_of_stop_strings(tokenizer):
    own = StopStringCriteria(tokenizer, ["WHERE"])
    arguments = {"stop_strings": "FROM", "tokenizer": tokenizer, "stopping_criteria": [own]}
    assert list(for_own_loop(arguments, DEFAULT)["stopping_criteria"]) == [own]


def test_stop_strings_without_a_tokenizer_are_left_to_transformers():
    assert for_own_loop({"stop_strings": "FROM"}, DEFAULT) == {"stop_strings": "FROM"}
