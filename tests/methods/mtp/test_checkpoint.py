"""How MTP layers are found: their tensors only, and damage named."""

import pytest
import torch
from safetensors.torch import load_file

from speclm import SpecModel
from speclm.errors import CheckpointError
from speclm.files import weights
from speclm.files.hub import HubOptions
from speclm.methods.mtp import checkpoint
from speclm.methods.mtp.checkpoint import fetch_mtp

FC, NORM = "model.layers.2.eh_proj.weight", "model.layers.2.enorm.weight"


def test_only_tensors_of_the_layers_are_read(made, monkeypatch):
    read, load = [], weights._load

    def counted(file, keys):
        read.extend(keys)
        return load(file, keys)

    monkeypatch.setattr(weights, "_load", counted)
    others = made.folder / "model-00001-of-00002.safetensors"
    others.rename(made.folder / "elsewhere")
    options = {"heads_path": made.folder}
    proposer = SpecModel.from_pretrained(made.base, "mtp", heads_kwargs=options).proposer
    (made.folder / "elsewhere").rename(others)
    assert sorted(read) == sorted(load_file(made.folder / "model-00002-of-00002.safetensors"))
    assert sum(p.numel() for p in proposer.heads.parameters()) < 30_000  # no vocabulary


def test_on_the_hub_only_shards_with_the_layers_are_fetched(made, monkeypatch):
    asked = []
    monkeypatch.setattr(
        checkpoint, "download", lambda name, hub, patterns: (asked.append(patterns), made.folder)[1]
    )
    assert fetch_mtp("org/base", HubOptions(revision="main"), num_layers=2) == made.folder
    assert asked[0] == ("config.json", "*.index.json")
    assert asked[1][2:] == ("model-00002-of-00002.safetensors",)


def test_quantised_and_incomplete_layers_are_refused_by_name(copied):
    def scale(tensors):
        tensors["model.layers.2.eh_proj.weight_scale_inv"] = torch.ones(1)

    def narrow(tensors):
        tensors[FC] = tensors[FC].to(torch.float8_e4m3fn)

    def drop(tensors):
        del tensors[NORM]

    def add(tensors):
        tensors["model.layers.2.shared_head.head.extra"] = torch.ones(2)

    def empty(tensors):
        tensors.clear()
        tensors["lm_head.weight"] = torch.ones(2, 2)

    for change, words in (
        (scale, r"quantised, \['model.layers.2.eh_proj.weight_scale_inv'\]"),
        (narrow, r"quantised, \['model.layers.2.eh_proj.weight'\] are torch.float8"),
        (drop, "MTP layer 0 has no 'enorm.weight'"),
        (add, r"MTP layer 0 has \['model.layers.2.shared_head.head.extra'\]"),
        (empty, r"without MTP layers, found 1 tensors, \['lm_head.weight'\]"),
    ):
        with pytest.raises(CheckpointError, match=words):
            copied(change)


def test_number_of_layers_must_be_that_of_the_config(made, copied, monkeypatch):
    monkeypatch.setitem(vars(made.base.config), "num_nextn_predict_layers", 2)
    with pytest.raises(CheckpointError, match=r"found 1 MTP layers.*num_nextn_predict_layers is 2"):
        copied(lambda tensors: None)
