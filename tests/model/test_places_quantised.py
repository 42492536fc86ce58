"""Bases that a quantisation config of Transformers made: trees are verified as the base reads."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, QuantoConfig, TorchAoConfig

from speclm import SpecModel
from speclm.demo.bundle import assets
from speclm.methods.medusa.proposer import MedusaProposer
from speclm.methods.ngram.proposer import NgramProposer
from tests.models import build_model, prompts
from tests.outcomes import observe, require_same
from tests.proposers import random_heads
from tests.target.test_logits import Coded

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


def test_a_head_of_codes_decodes_speculatively():
    base = build_model("llama")
    base.lm_head = Coded(base.lm_head).eval()
    heads = random_heads(base)
    for proposer in (NgramProposer(), MedusaProposer(heads, target=base, min_probability=0.0)):
        spec = SpecModel(base, proposer)
        arguments = {"do_sample": True, "max_new_tokens": 8}
        expected = observe(base, prompts(6), arguments, base=base)
        require_same(observe(spec, prompts(6), arguments, base=base), expected)
        assert spec.last_speculation.fallbacks == []


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor:UserWarning")
def test_a_base_quantised_by_pytorch_itself_decodes_plainly_with_the_reason():
    kinds = {torch.nn.Linear}  # activations are quantised by the batch: trees change them
    base = torch.ao.quantization.quantize_dynamic(build_model("llama"), kinds, dtype=torch.qint8)
    spec = SpecModel.from_pretrained(base, "ngram")
    arguments = {"do_sample": True, "max_new_tokens": 8}
    expected = observe(base, prompts(6), arguments, base=base)
    require_same(observe(spec, prompts(6), arguments, base=base), expected)
    assert "logits differ" in spec.last_speculation.fallbacks[0]
