"""MTP layers in files: the base's own keys and numbers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from speclm.errors import CheckpointError, UnsupportedModelError
from speclm.methods.mtp.checkpoint_writing import (
    find_layers,
    read_layers,
    saved_layers,
    write_mtp,
)
from speclm.methods.mtp.training import load_mtp_heads
from speclm.target import TargetView
from tests.methods.mtp.mtp_bases import ROWS, make_base


@pytest.fixture
def layers(made):
    """Return the layers of a base."""
    base = AutoModelForCausalLM.from_pretrained(made.folder)
    return saved_layers(load_mtp_heads(base), TargetView(base))


@pytest.mark.parametrize("name", list(ROWS))
def test_layers_of_every_family_are_written_as_they_lie_in_the_files_of_the_base(name, tmp_path):
    made = make_base(tmp_path / "base", name, shards=True)
    base = AutoModelForCausalLM.from_pretrained(made.folder)
    write_mtp(tmp_path / "out", saved_layers(load_mtp_heads(base), TargetView(base)))
    expected = load_file(made.folder / "model-00002-of-00002.safetensors")
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert find_layers(tmp_path / "out") is not None
    assert find_layers(made.folder) is None
    assert read_layers(tmp_path / "out").num_steps == ROWS[name].num_steps


def test_damaged_folders_are_refused_by_what_is_wrong(layers, tmp_path):
    write_mtp(tmp_path, layers)
    config = json.loads((tmp_path / "config.json").read_text())
    tensors = load_file(tmp_path / "model.safetensors")

    def lose(part):
        kept = {key: tensor for key, tensor in tensors.items() if part not in key}
        save_file(kept, tmp_path / "model.safetensors")

    def say(name, value):
        (tmp_path / "config.json").write_text(json.dumps({**config, name: value}))

    for change, words in (
        (lambda: lose("eh_proj"), r"MTP layer 0 has no 'eh_proj.weight'"),
        (lambda: lose("layers"), "found no MTP layers after 2 layers"),
        (lambda: say("num_hidden_layers", "2"), r"are \['2', 40\], expected positive numbers"),
        (lambda: say("hidden_size", 10**12), "expected positive numbers"),
    ):
        change()
        with pytest.raises(CheckpointError, match=words):
            read_layers(tmp_path)


def test_layers_that_cannot_be_named_are_not_written(made):
    base = AutoModelForCausalLM.from_pretrained(made.folder)
    heads = load_mtp_heads(base)
    heads.keys = ({**heads.keys[0], "layer.extra": "model.layers.2.extra"},)
    with pytest.raises(UnsupportedModelError, match=r"layer 0 cannot be written.*'layer.extra'"):
        saved_layers(heads, TargetView(base))
