"""Models whose weights accelerate keeps elsewhere, and several models on one base."""

import accelerate
import pytest
import torch

from speclm import SpecModel
from speclm.errors import UnsupportedModelError
from speclm.methods.draft_model.proposer import DraftModelProposer
from speclm.methods.eagle.proposer import EagleProposer
from speclm.methods.ngram.proposer import NgramProposer
from tests.models import build_model, generate, prompts, shared_model
from tests.proposers import random_eagle

IN_PARTS = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


# Transformers 5.17 looks at where weights lie, and not at where they are used.
@pytest.mark.filterwarnings("ignore:You are calling .generate.. with the `input_ids` being on")
@pytest.mark.parametrize("device_map", [{"": "cpu"}, {"": "disk"}, IN_PARTS])
def test_tokens_do_not_depend_on_where_weights_are(tmp_path, device_map):
    whole = build_model("llama")
    whole.save_pretrained(tmp_path / "model")
    spec = SpecModel.from_pretrained(
        tmp_path / "model", "ngram", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    hooks = [module._hf_hook for module in spec.base.modules() if hasattr(module, "_hf_hook")]
    for sampled in (False, True):
        settings = {"do_sample": sampled, "max_new_tokens": 12}
        expected, _ = generate(spec.base, prompts(9, 5), **settings)
        found, _ = generate(spec, prompts(9, 5), **settings)
        assert torch.equal(found, expected)
        assert torch.equal(found, generate(whole, prompts(9, 5), **settings)[0])
        assert spec.last_speculation.fallbacks == []
    after = [module._hf_hook for module in spec.base.modules() if hasattr(module, "_hf_hook")]
    assert after == hooks


@pytest.mark.parametrize("is_on_disk", [False, True])
def test_whole_models_are_offloaded_by_accelerate_itself(tmp_path, is_on_disk):
    whole, offloaded = shared_model("llama"), build_model("llama")
    if is_on_disk:
        offloaded = accelerate.disk_offload(offloaded, tmp_path)
    else:
        offloaded = accelerate.cpu_offload(offloaded)
    settings = {"do_sample": True, "max_new_tokens": 8}
    expected, state = generate(whole, prompts(9, 5), **settings)
    spec = SpecModel.from_pretrained(offloaded, "ngram")
    for model in (spec, SpecModel(whole, DraftModelProposer(offloaded, target=whole))):
        found, state_found = generate(model, prompts(9, 5), **settings)
        assert torch.equal(found, expected)
        assert torch.equal(state_found, state)
        assert model.last_speculation.fallbacks == []


def test_draft_model_of_an_offloaded_base_is_loaded_where_the_base_computes(tmp_path):
    build_model("llama", seed=7).save_pretrained(tmp_path)
    spec = SpecModel.from_pretrained(accelerate.cpu_offload(build_model("llama")), tmp_path)
    assert spec.proposer.view.device == torch.device("cpu")


def test_heads_that_read_offloaded_embeddings_are_refused():
    base = build_model("llama")
    heads = random_eagle(base)
    with pytest.raises(UnsupportedModelError, match=r"embeddings .* offloaded"):
        EagleProposer(heads, target=accelerate.cpu_offload(base))


def test_models_on_one_base_and_the_base_itself_take_turns():
    base = shared_model("llama")
    first = SpecModel(base, NgramProposer())
    second = SpecModel(base, DraftModelProposer(shared_model("llama", 7), target=base))
    before = base.config._attn_implementation
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in base.modules()]
    settings = {"do_sample": True, "max_new_tokens": 8}
    expected, _ = generate(base, prompts(8, 5), **settings)
    for model in (first, base, second, first, base):
        assert torch.equal(generate(model, prompts(8, 5), **settings)[0], expected)
    assert base.config._attn_implementation == before
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in base.modules()] == hooks
    assert "generate" not in vars(base)


def test_base_in_training_mode_says_so_once(caplog):
    base = build_model("llama", attention_dropout=0.2).train()
    spec = SpecModel(base, NgramProposer())
    for _ in range(2):
        expected, _ = generate(base, prompts(6), max_new_tokens=6, do_sample=False)
        found, _ = generate(spec, prompts(6), max_new_tokens=6, do_sample=False)
        assert torch.equal(found, expected)
    lines = [r.getMessage() for r in caplog.records if r.name == "speclm"]
    assert len(lines) == 1
    assert "training mode" in lines[0]
    assert base.training
    assert not spec.eval().base.training
    spec.generate(**prompts(6), max_new_tokens=6)
    assert spec.last_speculation.fallbacks == []
