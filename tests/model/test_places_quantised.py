"""Bases that a quantisation config of Transformers made: trees are verified as the base reads."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, QuantoConfig, TorchAoConfig

from speclm import SpecModel
from speclm.demo import assets
from tests.outcomes import observe, require_same

TEXTS = ["SELECT name FROM table_1 WHERE name = ", "how many wins in table_2"]


def quanto_int8():
    return QuantoConfig(weights="int8")


def torchao_int8():
    # Transformers imports torchao wherever it finds it, which costs every process seconds and lines
    # on stderr. So `make deep` installs it where no other test sees it.
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


@pytest.mark.parametrize(
    "config", [quanto_int8, pytest.param(torchao_int8, marks=pytest.mark.slow)]
)
def test_tokens_are_those_of_the_quantised_base_in_fewer_forwards(config):
    folder = assets()["base"]
    settings = {"dtype": torch.float32, "quantization_config": config()}
    spec = SpecModel.from_pretrained(folder, assets()["medusa"], **settings)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = dict(tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="left"))
    assert not torch.equal(spec(**inputs).logits, whole(**inputs).logits)
    for sampled in (False, True):
        arguments = {"do_sample": sampled, "max_new_tokens": 24}
        expected = observe(spec.base, inputs, arguments, base=spec.base)
        found = observe(spec, inputs, arguments, base=spec.base)
        require_same(found, expected)
        assert spec.last_speculation.fallbacks == []
        assert found.num_forwards < expected.num_forwards
