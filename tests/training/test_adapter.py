"""Adapters of bases: what they leave as it is, and what is written."""

import sys

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from speclm.errors import CheckpointError, OptionError, UnsupportedModelError
from speclm.methods.medusa.method import OUTPUTS
from speclm.training.adapter import FOLDERS, Adapter, require_output, require_part
from tests.models import build_model, prompts
from tests.training.alphabet import TAGGED, tiny_base, word_tokenizer

# peft asks a Transformers model for an attribute by the name that it had before.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

CLOSE = 1e-4  # float32, logits of about 30


@torch.no_grad()
def tuned(base, **options):
    """Return an adapter of a base that changes it."""
    adapter = Adapter(base, rank=4, alpha=8.0, **options)
    generator = torch.Generator().manual_seed(4)
    for parameter in adapter.parameters.values():
        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapter


@pytest.fixture
def inputs():
    return prompts(9, 9, vocab_size=30)


def test_new_adapter_changes_nothing_and_a_seed_decides_its_weights(inputs):
    base = tiny_base()
    before = base(**inputs).logits
    state = torch.get_rng_state()
    first = Adapter(base, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(base(**inputs).logits, before)
    assert not any("lm_head" in name for name in first.parameters)
    assert sum(p.requires_grad for p in base.parameters()) == len(first.parameters)
    seeds = [Adapter(tiny_base(), seed=seed).parameters for seed in (1, 2)]
    equal = [all(torch.equal(p, other[n]) for n, p in first.parameters.items()) for other in seeds]
    assert equal == [True, False]


def test_base_is_what_it_was_while_its_adapter_is_off(inputs):
    base = tiny_base()
    before = base(**inputs).logits
    adapter = tuned(base)
    after = base(**inputs).logits
    assert (after - before).abs().max() > 0.1
    with adapter.off():
        torch.testing.assert_close(base(**inputs).logits, before)
    assert torch.equal(base(**inputs).logits, after)


def test_what_is_written_loads_as_the_tuned_base(tmp_path, inputs):
    base = tiny_base()
    adapter = tuned(base)
    said = base(**inputs).logits
    for output in FOLDERS:
        adapter.write(tmp_path, output, tokenizer=word_tokenizer(TAGGED))
    assert torch.equal(base(**inputs).logits, said)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = PeftModel.from_pretrained(tiny_base(), tmp_path / "adapter")
    for loaded in (merged, adapted):
        torch.testing.assert_close(loaded(**inputs).logits, said, atol=CLOSE, rtol=0)
    for folder in FOLDERS.values():
        assert AutoTokenizer.from_pretrained(tmp_path / folder).chat_template == TAGGED
    adapter.write(tmp_path, "adapter")  # its own folder may be replaced


def test_folders_of_others_are_not_replaced(tmp_path):
    (tmp_path / "base").mkdir()
    assert require_part(tmp_path, "merged") == tmp_path / "base"
    (tmp_path / "base" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="base: found other files, expected none or those"):
        require_part(tmp_path, "merged")


def test_bases_that_cannot_be_tuned_are_named(monkeypatch):
    base = tiny_base()
    Adapter(base)
    with pytest.raises(UnsupportedModelError, match="has an adapter in its layers"):
        Adapter(base)
    base = tiny_base()
    base.hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(UnsupportedModelError, match=r"lies on the devices \['0', '1'\]"):
        Adapter(base)
    with pytest.raises(OptionError, match="rank is 0"):
        Adapter(tiny_base(), rank=0)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(OptionError, match="needs peft, which is not installed"):
        Adapter(tiny_base())


def test_outputs_that_cannot_be_written_are_named():
    assert set(OUTPUTS) == set(FOLDERS)
    base = build_model("llama")
    with pytest.raises(OptionError, match="output is 'whole', expected one of"):
        require_output(base, "whole")
    base.is_quantized = True
    require_output(base, "adapter")
    with pytest.raises(OptionError, match="is quantised, expected one in floating point"):
        require_output(base, "merged")
