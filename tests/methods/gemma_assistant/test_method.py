"""Assistants of Gemma 4 as folders and objects, for every kind of base."""

from shutil import copytree

import pytest
import torch
from transformers import (
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4UnifiedForCausalLM,
    Gemma4UnifiedTextConfig,
)

from speclm import SpecModel
from speclm.drafting.combined import CombinedProposer
from speclm.errors import OptionError
from speclm.methods.finding import find_heads
from speclm.methods.gemma_assistant.proposer import GemmaAssistantProposer
from speclm.model.publishing import prepare_publication
from tests.exactness import GREEDY
from tests.methods.gemma_assistant.assistants import NUM_TOKENS, TEXT, build_assistant, build_base
from tests.model.hub import SHA, running_hub
from tests.models import VOCAB_SIZE, prompts, randomise


@pytest.fixture(scope="module")
def base():
    return build_base()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("assistant")
    build_assistant(has_clusters=True).save_pretrained(made)
    return made


def test_folders_and_objects_are_recognised_and_take_options(base, folder):
    assert find_heads(folder).method.name == "gemma_assistant"
    by_folder = SpecModel.from_pretrained(
        base, folder, num_draft_tokens=6, heads_kwargs={"width": 2, "dtype": "float64"}
    ).proposer
    assert isinstance(by_folder, GemmaAssistantProposer)
    config = by_folder.config
    assert (config.num_draft_tokens, config.depth, config.width) == (6, 6, 2)
    assert by_folder.model.dtype == torch.float64
    by_object = SpecModel.from_pretrained(base, [build_assistant(), "ngram"])
    assert isinstance(by_object.proposer, CombinedProposer)
    assert by_object.proposer.parts[0].config.num_draft_tokens == NUM_TOKENS
    inputs = prompts(9, 4)
    expected = base.generate(**inputs, max_new_tokens=8, **GREEDY)
    assert by_object.generate(**inputs, max_new_tokens=8, **GREEDY).tolist() == expected.tolist()
    assert by_object.last_speculation.fallbacks == []
    with pytest.raises(OptionError, match=r"does not take \['widht'\].*did you mean 'width'"):
        SpecModel.from_pretrained(base, folder, heads_kwargs={"widht": 2})
    with pytest.raises(OptionError, match=r"\['dtype'\] would have no effect"):
        SpecModel.from_pretrained(base, build_assistant(), heads_kwargs={"dtype": "auto"})


def test_assistants_on_the_hub_are_found_by_their_config(base, folder, tmp_path, monkeypatch):
    copytree(folder, tmp_path / "me" / "assistant")
    with running_hub(tmp_path, monkeypatch) as hub:
        spec = SpecModel.from_pretrained(base, "me/assistant", heads_revision="main")
    assert isinstance(spec.proposer, GemmaAssistantProposer)
    assert spec.proposer.hub_commit == SHA
    assert "model.safetensors" in hub.sent


@pytest.mark.parametrize(
    "build",
    [
        lambda: Gemma4ForConditionalGeneration(
            Gemma4Config(
                text_config=TEXT,
                vision_config={"hidden_size": 16, "intermediate_size": 16, "head_dim": 8}
                | {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
                | {"position_embedding_size": 64},
                audio_config=None,
                **{f"{name}_token_id": VOCAB_SIZE - 1 for name in ("image", "boi", "eoi")},
            )
        ),
        lambda: Gemma4UnifiedForCausalLM(Gemma4UnifiedTextConfig(**TEXT)),
    ],
    ids=["with images", "unified"],
)
def test_bases_with_images_and_unified_ones_are_drafted_for(build):
    model, inputs = randomise(build(), embedding_scale=0.2), prompts(12, 5)
    expected = model.generate(**inputs, max_new_tokens=8, **GREEDY)
    whole = {"min_probability": 0.0, "min_confidence": 0.0}
    spec = SpecModel.from_pretrained(model, build_assistant(), adaptive=False, heads_kwargs=whole)
    assert spec.generate(**inputs, max_new_tokens=8, **GREEDY).tolist() == expected.tolist()
    assert spec.last_speculation.fallbacks == []
    assert spec.last_speculation.rows[0].offered


def test_they_are_saved_and_published_as_models_of_transformers(base, folder, tmp_path):
    spec = SpecModel.from_pretrained(base, folder)
    with pytest.raises(OptionError, match=r"save it with proposer\.model\.save_pretrained"):
        spec.save_pretrained(tmp_path)
    with pytest.raises(OptionError, match="publish its folder with: hf upload"):
        prepare_publication(folder, "me/assistant")
    spec.proposer.model.save_pretrained(tmp_path)
    assert find_heads(tmp_path).method.name == "gemma_assistant"
