"""PEFT models as bases: adapters in the layers count, whatever state they are in."""

import peft
import pytest
import torch

import speclm
from speclm import SpecModel
from speclm.errors import UnsupportedModelError
from tests.models import build_model, generate, prompts

# peft asks a Transformers model for an attribute by the name that it had before.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
INPUTS = prompts(9, 5)


@pytest.fixture
def adapted():
    torch.manual_seed(0)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False
    )
    return peft.get_peft_model(build_model("llama"), config).eval()


def require_identical(spec, model):
    for sampled in (False, True):
        settings = {"do_sample": sampled, "max_new_tokens": 12}
        expected, state = generate(model, INPUTS, **settings)
        found, state_found = generate(spec, INPUTS, **settings)
        assert torch.equal(found, expected)
        assert torch.equal(state_found, state)
        assert spec.last_speculation.fallbacks == []
    return expected


def test_tokens_are_those_of_the_adapted_model(adapted):
    plain, _ = generate(build_model("llama"), INPUTS, do_sample=True, max_new_tokens=12)
    spec = SpecModel.from_pretrained(adapted, "ngram")
    assert not torch.equal(require_identical(spec, adapted), plain)
    with adapted.disable_adapter():
        assert torch.equal(require_identical(spec, adapted), plain)
    require_identical(spec, adapted)


def test_merged_adapters_are_honoured(adapted):
    spec = SpecModel(adapted, None)
    adapted.merge_adapter()
    require_identical(spec, adapted)
    adapted.unmerge_adapter()
    merged = adapted.merge_and_unload()
    assert merged is spec.base
    require_identical(spec, merged)


def test_patched_peft_model_goes_through_the_spec_model(adapted):
    expected = adapted.generate(**INPUTS, do_sample=False, max_new_tokens=8)
    with speclm.patch(adapted, "ngram") as spec:
        found = adapted.generate(**INPUTS, do_sample=False, max_new_tokens=8)
    assert torch.equal(found, expected)
    assert spec.last_speculation.rounds > 0


def test_learned_prompt_is_refused():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    adapted = peft.get_peft_model(build_model("llama"), config)
    with pytest.raises(UnsupportedModelError, match=r"learned prompt PromptTuningConfig.*LoRA"):
        SpecModel.from_pretrained(adapted, "ngram")


def test_adapted_models_draft(adapted):
    base = build_model("llama")
    spec = SpecModel.from_pretrained(base, ["ngram", adapted])
    assert spec.proposer.parts[1].view.model is adapted.get_base_model()
    require_identical(spec, base)
