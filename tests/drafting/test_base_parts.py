"""Matrices of a base, found without loading it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from speclm.drafting.base_parts import BaseParts
from speclm.errors import CheckpointError, UnknownNameError
from tests.models import shared_model

SIZES = {
    "llama": {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2},
    "gpt2": {"n_embd": 8, "n_head": 2},
    "gpt_neox": {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2},
    "opt": {"hidden_size": 8, "ffn_dim": 8, "num_attention_heads": 2, "word_embed_proj_dim": 8},
}


@pytest.mark.parametrize("family", SIZES)
def test_matrices_of_saved_models_are_those_of_the_loaded_ones(tmp_path, family):
    layers = "n_layer" if family == "gpt2" else "num_hidden_layers"
    config = AutoConfig.for_model(family, vocab_size=11, **{layers: 2}, **SIZES[family])
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    found, loaded = BaseParts.find(tmp_path), BaseParts.of_model(model)
    for parts in (found, loaded):
        assert torch.equal(parts.embeddings(), model.get_input_embeddings().weight)
        assert torch.equal(parts.output_matrix(), model.get_output_embeddings().weight)
        assert parts.num_layers == model.config.num_hidden_layers
    assert found.architectures == [type(model).__name__]


def test_only_the_shard_with_the_matrix_is_opened(tmp_path):
    model = shared_model("llama")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    head = {key: state[key] for key in state if "embed" in key or "lm_head" in key}
    save_file(head, tmp_path / "b.safetensors")
    # Mistral's repositories have such a copy next to the shards.
    save_file({"lm_head.weight": torch.zeros(2, 2)}, tmp_path / "consolidated.safetensors")
    weight_map = {key: "b.safetensors" if key in head else "missing.safetensors" for key in state}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(
        BaseParts.find(tmp_path).output_matrix(), model.get_output_embeddings().weight
    )


def test_what_is_no_base_is_explained(tmp_path):
    with pytest.raises(UnknownNameError, match="is no folder and no hub id"):
        BaseParts.find(tmp_path / "nothing here")
    with pytest.raises(CheckpointError, match="found no config"):
        BaseParts.find(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": 5}')
    with pytest.raises(CheckpointError, match="found no weights of the base"):
        BaseParts.find(tmp_path).output_matrix()
    save_file({"other.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="found no embeddings of the base among 1 keys"):
        BaseParts.find(tmp_path).embeddings()
    save_file({"lm_head.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"shape \[2, 2\], expected the output matrix with 5"):
        BaseParts.find(tmp_path).output_matrix()
