"""What is said of assistants that are damaged, or were made for another base."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma4TextConfig, Gemma4TextModel

from speclm import SpecModel
from speclm.errors import (
    CheckpointError,
    OptionError,
    UnsupportedModelError,
    VocabularyMismatchError,
)
from speclm.methods.gemma_assistant.checkpoint import shared_everywhere
from speclm.methods.gemma_assistant.proposer import GemmaAssistantProposer
from tests.methods.gemma_assistant.assistants import (
    FULL,
    SLIDING,
    TEXT,
    build_assistant,
    build_base,
)
from tests.models import VOCAB_SIZE, shared_model

ORDER = "masked_embedding.token_ordering"


@pytest.fixture(scope="module")
def base():
    return build_base()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("assistant")
    build_assistant(has_clusters=True).save_pretrained(made)
    return made


@pytest.fixture
def damaged(folder, tmp_path):
    """Return a function that writes the folder anew with another config or other tensors."""

    def write(changes=None, tensors=None, text=None):
        config = json.loads((folder / "config.json").read_text())
        config |= changes or {}
        config["text_config"] |= text or {}
        (tmp_path / "config.json").write_text(json.dumps(config))
        weights = load_file(folder / "model.safetensors") | (tensors or {})
        weights = {key: tensor for key, tensor in weights.items() if tensor is not None}
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return tmp_path

    return write


def test_assistants_for_other_bases_are_refused_before_their_weights_are_read(base, damaged):
    with pytest.raises(UnsupportedModelError, match="type 'llama', expected a Gemma 4"):
        SpecModel.from_pretrained(shared_model("llama"), damaged())
    for wrong, error, words in (
        (
            {"text": {"vocab_size": 320}},
            VocabularyMismatchError,
            "of 320, the base .* one of 160",
        ),
        ({"changes": {"backbone_hidden_size": 64}}, OptionError, "backbone_hidden_size 64.* 40; "),
        ({"text": {"num_key_value_heads": 1}}, OptionError, "num_key_value_heads 1 in a layer of"),
        ({"text": {"head_dim": 16}}, OptionError, "head_dim 16 in a layer of 'sliding_attention'"),
        ({"text": {"num_attention_heads": 3}}, CheckpointError, "3 attention heads for 2 of keys"),
    ):
        with pytest.raises(error, match=words):
            SpecModel.from_pretrained(base, damaged(**wrong))
    full = build_base(num_hidden_layers=2, layer_types=[FULL, FULL], num_kv_shared_layers=0)
    with pytest.raises(OptionError, match=f"layers of '{SLIDING}', the base .*keys of"):
        SpecModel.from_pretrained(full, build_assistant())


def test_damaged_assistants_are_refused_with_words_of_our_own(base, damaged, tmp_path):
    twice = torch.zeros(VOCAB_SIZE, dtype=torch.long)
    for wrong, words in (
        ({"tensors": {ORDER: twice}}, "does not hold each of 160 tokens once"),
        ({"tensors": {ORDER: twice[:80]}}, r"shape \(80,\), expected \(160,\) by the config"),
        ({"tensors": {ORDER: None}}, "'masked_embedding.token_ordering' is missing"),
        ({"tensors": {"pre_projection.weight": torch.zeros(24, 40)}}, r"expected \(24, 80\)"),
        ({"changes": {"num_centroids": 7}}, "num_centroids is 7 .*expected a divisor"),
        ({"changes": {"centroid_intermediate_top_k": 17}}, "centroid_intermediate_top_k 17"),
        ({"changes": {"text_config": {"model_type": "none"}}}, "no config of a Gemma 4 assistant"),
        ({"tensors": {"model.norm.weight": None}}, "lacks 1 weights such as 'model.norm.weight'"),
    ):
        with pytest.raises(CheckpointError, match=words):
            SpecModel.from_pretrained(base, damaged(**wrong))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="and no weights"):
        SpecModel.from_pretrained(base, tmp_path)
    assistant = build_assistant()
    assistant.generation_config.num_assistant_tokens = 0
    with pytest.raises(CheckpointError, match=r"num_assistant_tokens .* is 0, expected 1 to"):
        SpecModel.from_pretrained(base, assistant)
    with pytest.raises(UnsupportedModelError, match="expected a Gemma4AssistantForCausalLM"):
        GemmaAssistantProposer(base, target=base)


def test_configs_of_transformers_are_as_before_after_loading():
    before = vars(Gemma4TextConfig).get("kv_sharing_modes")
    with shared_everywhere():
        config = Gemma4TextConfig(
            **{**TEXT, "num_hidden_layers": 1, "num_kv_shared_layers": 1, "layer_types": [FULL]}
        )
        assert Gemma4TextModel(config).layers[0].self_attn.is_kv_shared_layer
    assert vars(Gemma4TextConfig).get("kv_sharing_modes") is before
