"""A base with one MTP layer, and changed copies of its files."""

import json

import pytest
from safetensors.torch import load_file, save_file

from speclm import SpecModel
from tests.methods.mtp.mtp_bases import ONE, make_base


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
