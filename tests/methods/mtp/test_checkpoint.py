"""How MTP layers are found: their tensors only, and damage named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from speclm import SpecModel
from speclm.errors import CheckpointError
from speclm.files import weights
from speclm.files.hub import HubOptions
from speclm.methods.mtp import checkpoint
from speclm.methods.mtp.checkpoint import fetch_mtp, find_mtp

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


def test_more_layers_than_any_model_has_are_refused_at_once(tmp_path):
    names = ("eh_proj", "enorm", "hnorm", "shared_head.norm", "x")
    keys = [f"model.layers.{step}.{name}.weight" for step in range(2, 70000) for name in names]
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(keys, "a")}))
    with pytest.raises(CheckpointError, match="found 69998 MTP layers, expected at most 64"):
        find_mtp(tmp_path, num_layers=2)


def test_safetensors_are_read_where_an_index_of_pickles_lies_next_to_them(made, tmp_path):
    shutil.copytree(made.folder, tmp_path, dirs_exist_ok=True)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "pytorch_model-00001-of-00001.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert SpecModel.from_pretrained(str(tmp_path), "mtp").proposer.heads is not None


def test_number_of_layers_must_be_that_of_the_config(made, copied, monkeypatch):
    monkeypatch.setitem(vars(made.base.config), "num_nextn_predict_layers", 2)
    with pytest.raises(CheckpointError, match=r"found 1 MTP layers.*num_nextn_predict_layers is 2"):
        copied(lambda tensors: None)
