"""Weights that are divided among processes, with a stand-in for DeepSpeed's marks on them.

`tests/training/test_processes.py` trains on a base that two processes divide.
"""

import logging
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from torch import nn
from transformers import TrainingArguments
from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
)

from speclm.errors import OptionError, UnsupportedModelError
from speclm.target import TargetView
from speclm.training.feature_writer import plan_features
from speclm.training.partitions import (
    divides_base,
    heads_whole,
    is_divided,
    loading_whole,
    num_elements,
    place_base,
    whole_parameters,
)
from tests.models import build_model
from tests.training.cached import deep_base, random_texts, training_model

EXAMPLES = Path(__file__).parents[2] / "examples"


def divide(parameter):
    """Mark a parameter as ZeRO-3 does, and leave nothing of it in this process."""
    parameter.ds_id, parameter.ds_numel = 1, parameter.numel()
    parameter.data = torch.empty(0)


class OneOfTwo(TrainingArguments):
    """Arguments of a training, as one of two processes has them."""

    world_size = 2


def arguments(**settings):
    """Return arguments of one of two processes, with settings that others derive."""
    args = OneOfTwo("out", use_cpu=True)
    vars(args).update(settings)
    return args


def test_base_whose_weights_are_divided_is_refused():
    base = build_model("llama")
    divide(base.model.layers[1].mlp.up_proj.weight)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\..*is divided among processes, ex"):
        place_base(TargetView(base), arguments())


@pytest.mark.parametrize(
    ("plugin", "change", "words"),
    [
        ({}, {"requires_grad": True}, "trained too, expected a frozen base"),
        ({}, {"hf_device_map": {"": "cpu"}}, "quantised or spread by a device map, expected"),
        ({"cpu_offload": True}, {}, "offloads weights.*expected.*fsdp_offload_params to false"),
    ],
)
def test_base_that_fsdp_cannot_divide_is_refused(plugin, change, words):
    base = build_model("llama").requires_grad_(requires_grad=change.pop("requires_grad", False))
    vars(base).update(change)
    with pytest.raises(OptionError, match=words):
        place_base(TargetView(base), arguments(fsdp_plugin_args=plugin))


def test_base_that_zero3_cannot_divide_stays_whole_with_a_warning(caplog):
    base, config = build_model("llama"), SimpleNamespace(is_zero3=lambda: True)
    with caplog.at_level(logging.WARNING, logger="speclm"):
        place_base(TargetView(base), arguments(hf_deepspeed_config=config))
    assert "is trained too: ZeRO-3 leaves it whole" in caplog.text
    assert not is_divided(base)


def test_fsdp_of_accelerate_divides_the_base_and_leaves_the_heads(monkeypatch):
    assert not divides_base(arguments())
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert divides_base(arguments())
    assert not divides_base(TrainingArguments("out", use_cpu=True))
    args = arguments(fsdp_plugin_args={})
    with heads_whole(args):
        assert "ACCELERATE_USE_FSDP" not in os.environ
        assert args.fsdp_plugin_args is None
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    assert args.fsdp_plugin_args == {}


def test_features_of_a_divided_base_are_not_cached(monkeypatch, tmp_path):
    model = training_model("medusa", deep_base())
    monkeypatch.setattr("speclm.training.feature_writer.is_divided", lambda _: True)
    with pytest.raises(OptionError, match="divided by FSDP or ZeRO-3, expected a whole base"):
        plan_features(model, [random_texts()], tmp_path)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("accelerate-*.yaml")), ids=lambda p: p.stem)
def test_example_is_a_configuration_that_accelerate_starts_several_processes_for(path):
    config = load_config_from_file(str(path))  # refuses unknown names
    assert config.num_processes > 1
    assert config.distributed_type in ("FSDP", "MULTI_GPU")
    assert all(name.startswith("fsdp_") for name in config.fsdp_config)


def test_example_of_deepspeed_lets_trainer_fill_in_what_it_knows():
    config = HfDeepSpeedConfig(str(EXAMPLES / "deepspeed-zero3.json"))
    assert config.is_zero3()
    for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert config.get_value(name) == "auto"


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
