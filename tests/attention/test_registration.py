"""A model's configs name tree attention during a forward, and are restored after it."""

import copy
import pickle

import pytest
import torch

from speclm.attention import attached, attention_configs
from tests.attention.tree_models import build
from tests.models import prompts, shared_model


def test_implementation_is_ours_inside_and_restored_after():
    model = shared_model("llama")
    configs = attention_configs(model)
    assert model.config in configs
    with attached(configs):
        assert model.config._attn_implementation == "speclm_sdpa"
        with attached(configs):  # a draft model that is the target
            assert model.config._attn_implementation == "speclm_sdpa"
        assert model.config._attn_implementation == "speclm_sdpa"
    assert model.config._attn_implementation == "sdpa"


def test_implementation_is_ours_until_the_last_of_two_threads_has_left():
    configs = attention_configs(shared_model("llama"))
    first, second = attached(configs), attached(configs)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert configs[0]._attn_implementation == "speclm_sdpa"
    second.__exit__(None, None, None)
    assert configs[0]._attn_implementation == "sdpa"


def test_implementation_is_restored_after_an_exception():
    configs = attention_configs(shared_model("llama"))
    with pytest.raises(KeyboardInterrupt), attached(configs):
        raise KeyboardInterrupt
    assert configs[0]._attn_implementation == "sdpa"


def test_name_is_found_by_its_text_and_equals_the_previous_one():
    config = shared_model("llama").config
    with attached([config]):
        name = config._attn_implementation
        assert name == "speclm_sdpa"
        assert name in ("eager", "sdpa")
        assert name not in ("eager", "flash_attention_2")
        assert name != "eager"
        assert not name != "sdpa"  # noqa: SIM202 - the operator that is tested
        assert name != None  # noqa: E711
        assert {"sdpa": 1, "speclm_sdpa": 2}[name] == 2
        for other in (copy.deepcopy(name), pickle.loads(pickle.dumps(name))):
            assert (other == "sdpa", str(other)) == (True, "speclm_sdpa")


@torch.no_grad()
def test_model_that_compares_the_name_computes_the_same_forwards_while_attached():
    model = build("by name")
    inputs = prompts(7)["input_ids"]
    expected = model(inputs).logits
    with attached(attention_configs(model)):
        assert torch.equal(model(inputs).logits, expected)
