import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from speclm.drafting import package
from speclm.errors import CheckpointError
from speclm.files import atomic as files
from speclm.methods.medusa import checkpoint_writing as medusa_writer
from speclm.methods.medusa.checkpoint import MedusaCheckpoint, read_medusa
from speclm.methods.medusa.checkpoint_writing import write_medusa


def checkpoint(*, layers=1, heads=2, own=True, bias=True, dtype=torch.float32, choices=None):
    generator = torch.Generator().manual_seed(layers + heads)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    return MedusaCheckpoint.of_stacked(
        weight=draw(layers, heads, 4, 4),
        bias=draw(layers, heads, 4) if bias else None,
        lm_weight=draw(heads, 7, 4) if own else None,
        vocab_size=7,
        base_name_or_path="org/base",
        choices=choices,
    )


def test_files_have_the_keys_that_tgi_and_vllm_read(tmp_path):
    write_medusa(tmp_path / "new" / "folder", checkpoint(choices=((0,), (1,), (0, 2))))
    folder = tmp_path / "new" / "folder"
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "medusa_lm_head.safetensors"]
    with safe_open(folder / "medusa_lm_head.safetensors", framework="pt") as file:
        keys = file.keys()
        shapes = {key: file.get_slice(key).get_shape() for key in keys}
    assert shapes == {
        "0.0.linear.weight": [4, 4],
        "0.0.linear.bias": [4],
        "0.1.weight": [7, 4],
        "1.0.linear.weight": [4, 4],
        "1.0.linear.bias": [4],
        "1.1.weight": [7, 4],
    }
    config = json.loads((folder / "config.json").read_text())
    assert config == {
        "medusa_num_heads": 2,
        "medusa_num_layers": 1,
        "base_model_name_or_path": "org/base",
        "model_type": "medusa",
        "hidden_size": 4,
        "vocab_size": 7,
        "medusa_fc_bias": True,
        "version": "1",
        "speclm": {"choices": [[0], [1], [0, 2]]},
    }
    assert [key for key in config if "num" in key and "heads" in key] == ["medusa_num_heads"]


@given(
    layers=st.integers(1, 3),
    heads=st.integers(1, 4),
    own=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    choices=st.sampled_from([None, ((0,),), ((0,), (1,), (0, 0))]),
)
def test_what_is_written_is_read_bit_by_bit(tmp_path_factory, **numbers):
    folder = tmp_path_factory.mktemp("heads")
    written = checkpoint(**numbers)
    write_medusa(folder, written)
    found = read_medusa(folder)
    assert found.parts.keys() == written.parts.keys()
    assert all(torch.equal(found.parts[n], t) for n, t in written.parts.items())
    assert found.dtype == written.dtype
    assert (found.choices, found.vocab_size) == (written.choices, 7)
    assert found.base_name_or_path == "org/base"


def test_shared_and_transposed_and_odd_values_are_written(tmp_path):
    layer = torch.tensor([[float("nan"), -0.0], [float("inf"), 1.0]]).T
    written = MedusaCheckpoint.of_stacked(layer.expand(2, 3, 2, 2))
    write_medusa(tmp_path, written)
    found = read_medusa(tmp_path)
    for name, part in written.parts.items():
        bits = part.contiguous().view(torch.int32)
        assert torch.equal(found.parts[name].view(torch.int32), bits)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["version"] == "2"
    assert config["medusa_fc_bias"] is False
    assert "vocab_size" not in config


STEPS = [(package, "save_file"), (files, "_sync"), (medusa_writer, "read_medusa")]


@pytest.mark.parametrize(("module", "step"), STEPS)
def test_failure_leaves_the_old_files(tmp_path, monkeypatch, module, step):
    write_medusa(tmp_path, checkpoint())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(module, step, fail)
    with pytest.raises(OSError, match="disk full"):
        write_medusa(tmp_path, checkpoint(heads=3))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_bit_that_changed_on_disk_is_an_error(tmp_path, monkeypatch):
    save = package.save_file
    changed = {"1.0.linear.bias": torch.ones(4)}
    monkeypatch.setattr(
        package, "save_file", lambda tensors, *rest, **kw: save({**tensors, **changed}, *rest, **kw)
    )
    words = r"\['1.0.linear.bias'\] read back differ.*old files are kept"
    with pytest.raises(CheckpointError, match=words):
        write_medusa(tmp_path, checkpoint())
    assert list(tmp_path.iterdir()) == []


def test_config_of_another_model_is_never_overwritten(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=r"config of another model.*folder of their own"):
        write_medusa(tmp_path, checkpoint())
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert "llama" in (tmp_path / "config.json").read_text()


def test_a_file_is_no_place_for_heads(tmp_path):
    (tmp_path / "heads").write_text("")
    with pytest.raises(CheckpointError, match="found a file, expected a folder"):
        write_medusa(tmp_path / "heads", checkpoint())


def test_what_was_saved_is_what_is_read_whatever_else_lies_there(tmp_path):
    write_medusa(tmp_path, checkpoint(heads=3))
    (tmp_path / "medusa_lm_head.safetensors").rename(tmp_path / "best.safetensors")
    write_medusa(tmp_path, checkpoint())
    assert read_medusa(tmp_path).num_heads == 2
