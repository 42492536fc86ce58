"""Where a model computes, whatever accelerate has hung into it."""

import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module

from speclm.target.matrices import device_of
from tests.models import build_model


def test_device_of_an_offloaded_model_is_where_its_modules_run():
    model = cpu_offload(build_model("llama"))
    assert model._hf_hook.execution_device is None
    assert model.device == torch.device("meta")
    assert device_of(model) == torch.device("cpu")
    add_hook_to_module(model.model.embed_tokens, ModelHook(), append=True)  # now two in a row
    assert device_of(model) == torch.device("cpu")


def test_device_of_weights_that_are_nowhere_is_meta():
    with torch.device("meta"):
        model = build_model("llama")
    assert device_of(model) == torch.device("meta")
