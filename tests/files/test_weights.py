"""Weight files of a folder; damaged ones are tested with the heads that are read from them."""

import pytest
import torch
from safetensors.torch import save_file

from speclm.errors import CheckpointError, OptionError
from speclm.files import weights
from speclm.files.weights import (
    floating_dtype,
    read_json,
    read_text,
    weight_files,
    weights_digest,
)


def test_named_files_come_first_then_the_models_own_and_pickles_only_alone(tmp_path):
    for name in ("a.safetensors", "medusa_x.safetensors", "model.safetensors"):
        save_file({name: torch.ones(1)}, tmp_path / name)
    torch.save({"p": torch.ones(1)}, tmp_path / "heads.pt")
    names = [source.path.name for source in weight_files(tmp_path, first="medusa")]
    assert names == ["medusa_x.safetensors", "model.safetensors", "a.safetensors"]
    assert next(weight_files(tmp_path)).path.name == "model.safetensors"
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    (source,) = weight_files(tmp_path)
    assert torch.equal(source.load(["p"])["p"], torch.ones(1))


def test_digest_is_that_of_all_safetensors_files(tmp_path):
    assert weights_digest(tmp_path) is None
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    first = weights_digest(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert weights_digest(tmp_path) == first
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert weights_digest(tmp_path) != first


def test_dtypes_are_named_or_given_and_floating():
    assert floating_dtype("bfloat16") is floating_dtype(torch.bfloat16) is torch.bfloat16
    for wrong in (torch.int8, "nothing", 3, None):
        with pytest.raises(OptionError, match="dtype of the heads is"):
            floating_dtype(wrong)


def test_text_of_any_file_is_read_and_json_has_to_be_an_object(tmp_path):
    file = tmp_path / "config.json"
    assert not read_text(file)
    file.write_bytes(b"[1, \xff]")
    assert "[1, " in read_text(file)
    with pytest.raises(CheckpointError, match="no JSON can be read"):
        read_json(file)
    file.write_text("[1]")
    with pytest.raises(CheckpointError, match="found a list, expected a JSON object"):
        read_json(file)


def test_a_file_of_very_many_tensors_is_refused_before_they_are_looked_through(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(weights, "MAX_KEYS", 2)
    save_file({name: torch.zeros(1) for name in "abc"}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="found 3 tensors, expected at most 2 in one file"):
        list(weights.weight_files(tmp_path))
