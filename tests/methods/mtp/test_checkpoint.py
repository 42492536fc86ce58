"""How MTP layers are found: their tensors only, and damage named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from speclm import SpecModel
from speclm.errors import CheckpointError, OptionError
from speclm.files import weights
from speclm.files.hub import HubOptions
from speclm.methods.mtp import checkpoint
from speclm.methods.mtp.checkpoint import fetch_mtp, find_mtp
from tests.methods.mtp.mtp_bases import ONE, make_base
from tests.models import build_model

FC, NORM = "model.layers.2.eh_proj.weight", "model.layers.2.enorm.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a base of one MTP layer in a shard of its own."""
    return make_base(tmp_path_factory.mktemp("base"), ONE, shards=True)


@pytest.fixture
def copied(made, tmp_path):
    """Return a function that writes changed MTP tensors into a new folder, and loads them."""

    def load(change, *, config=None, **options):
        (tmp_path / "config.json").write_text(json.dumps(config or made.base.config.to_dict()))
        tensors = load_file(made.folder / "model-00002-of-00002.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        options = {"heads_path": tmp_path, **options}
        return SpecModel.from_pretrained(made.base, "mtp", heads_kwargs=options).proposer

    return load


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


def test_matrices_that_are_copies_are_the_targets_and_others_are_kept(made, copied):
    head, embeddings = made.base.lm_head.weight, made.base.get_input_embeddings().weight

    def change(tensors):
        tensors["model.layers.2.shared_head.head.weight"] = head.detach() + 1
        tensors["model.layers.2.embed_tokens.weight"] = embeddings.detach().clone()

    layer = copied(change).heads.layer(0)
    torch.testing.assert_close(layer.lm_head.weight, head.detach() + 1)
    assert layer.embed_tokens is None


def test_damaged_layers_are_refused_by_name(copied):
    def scale(tensors):
        tensors["model.layers.2.eh_proj.weight_scale_inv"] = torch.ones(1)

    def narrow(tensors):
        tensors[FC] = tensors[FC].to(torch.float8_e4m3fn)

    def drop(tensors):
        del tensors[NORM]

    def drop_inner(tensors):
        del tensors["model.layers.2.self_attn.q_proj.weight"]

    def widen(tensors):
        tensors[FC] = torch.ones(48, 96)

    def widen_inner(tensors):
        tensors["model.layers.2.self_attn.o_proj.weight"] = torch.ones(40, 96)

    def add(tensors):
        tensors["model.layers.2.self_attn.extra.weight"] = torch.ones(2)

    def empty(tensors):
        tensors.clear()
        tensors["lm_head.weight"] = torch.ones(2, 2)

    for change, words in (
        (scale, r"quantised, \['model.layers.2.eh_proj.weight_scale_inv'\]"),
        (narrow, r"quantised, \['model.layers.2.eh_proj.weight'\] are torch.float8"),
        (drop, "MTP layer 0 has no 'enorm.weight'"),
        (drop_inner, r"MTP layer 0 lacks \['layers.0.self_attn.q_proj.weight'\]"),
        (widen, r"eh_proj.weight' has the shape \(48, 96\), expected \(40, 80\)"),
        (widen_inner, r"layers.2.self_attn.o_proj.weight' has the shape \(40, 96\)"),
        (add, r"MTP layer 0 has \['layers.0.self_attn.extra.weight'\]"),
        (empty, r"without MTP layers, found 1 tensors, \['lm_head.weight'\]"),
    ):
        with pytest.raises(CheckpointError, match=words):
            copied(change)


def test_number_of_layers_must_be_that_of_the_config(made, copied, monkeypatch):
    monkeypatch.setitem(vars(made.base.config), "num_nextn_predict_layers", 2)
    with pytest.raises(CheckpointError, match=r"found 1 MTP layers.*num_nextn_predict_layers is 2"):
        copied(lambda tensors: None)


def test_base_without_files_asks_for_a_path_and_options_are_checked(made):
    base = build_model("llama")
    with pytest.raises(OptionError, match=r"names no files.*heads_path"):
        SpecModel.from_pretrained(base, "mtp")
    for options, words in (
        ({"heads_path": "nothing here"}, "no folder that exists nor a hub id"),
        ({"heads_path": made.folder, "widht": 2}, "unknown option 'widht'"),
    ):
        with pytest.raises(OptionError, match=words):
            SpecModel.from_pretrained(base, "mtp", heads_kwargs=options)
    assert find_mtp(made.folder, num_layers=3) is None
