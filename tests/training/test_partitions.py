"""Weights that are divided among processes, with a stand-in for DeepSpeed's marks on them."""

import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, set_hf_deepspeed_config

from speclm.errors import OptionError, UnsupportedModelError
from speclm.training.partitions import (
    loading_whole,
    num_elements,
    require_no_fsdp,
    require_whole,
    whole_parameters,
)
from tests.models import build_model


def divide(parameter):
    """Mark a parameter as ZeRO-3 does, and leave nothing of it in this process."""
    parameter.ds_id, parameter.ds_numel = 1, parameter.numel()
    parameter.data = torch.empty(0)


def test_base_whose_weights_are_divided_is_refused():
    base = build_model("llama")
    require_whole(base)
    divide(base.model.layers[1].mlp.up_proj.weight)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\..*is divided among processes, ex"):
        require_whole(base)


def test_fsdp_is_refused_with_what_to_use_instead():
    require_no_fsdp(is_on=False)
    with pytest.raises(OptionError, match=r"FSDP is on, expected .* ZeRO.*start with torchrun"):
        require_no_fsdp(is_on=True)


def test_parameters_are_whole_inside_the_context_and_counted_as_a_whole(monkeypatch):
    heads = nn.Linear(3, 2)
    with whole_parameters(heads):  # without DeepSpeed
        pass
    divide(heads.weight)
    gathered = []

    @contextmanager
    def gather(parameters):
        gathered.append(parameters)
        yield

    zero = SimpleNamespace(GatheredParameters=gather)
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=zero))
    with whole_parameters(heads):
        assert gathered == [[heads.weight]]
    assert num_elements(heads.weight) == 6
    assert num_elements(heads.bias) == 2


def test_models_are_loaded_whole_whatever_the_arguments_say(monkeypatch):
    with loading_whole():
        assert not is_deepspeed_zero3_enabled()

    class Config:
        def is_zero3(self):
            return True

    config = Config()
    monkeypatch.setattr("transformers.integrations.deepspeed._hf_deepspeed_config_weak_ref", None)
    set_hf_deepspeed_config(config)
    with loading_whole():
        assert not is_deepspeed_zero3_enabled()
    assert is_deepspeed_zero3_enabled()
