"""Files of heads: written together, from where the tensors are."""

import json

import pytest
import torch
from safetensors.torch import load_file

from speclm.drafting.package import Package, require_same_tensors, write_package
from speclm.errors import CheckpointError


def test_tensors_that_differ_in_a_bit_or_a_name_are_refused(tmp_path):
    one = {"a": torch.ones(2)}
    require_same_tensors(tmp_path, one, {"a": torch.ones(2)})
    for other in ({"a": torch.ones(3)}, {"a": torch.zeros(2)}, {}, one | {"b": torch.ones(1)}):
        with pytest.raises(CheckpointError, match="read back differ from what was written"):
            require_same_tensors(tmp_path, one, other)


def test_all_files_appear_and_tensors_may_share_memory(tmp_path):
    matrix = torch.arange(12.0).view(3, 4)
    weights = {"a": matrix, "b": matrix, "c": matrix.T, "d": matrix[1], "e": torch.empty(0)}
    (tmp_path / "large.bin").write_bytes(b"large")
    package = Package(
        {"size": 3},
        {"model.safetensors": weights, "part.pt": {"d": matrix[1]}},
        files={"text": "words", "bytes": b"more", "linked": tmp_path / "large.bin"},
    )
    seen = []
    write_package(tmp_path / "out", package, card="# Card", check=seen.append)
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ("README.md", "bytes", "config.json", "linked", "model.safetensors", "part.pt", "text")
    )
    assert all(torch.equal(load_file(out / "model.safetensors")[k], weights[k]) for k in weights)
    assert torch.equal(torch.load(out / "part.pt", weights_only=True)["d"], matrix[1])
    assert (out / "part.pt").stat().st_size < 3000  # without the rest of the matrix
    assert json.loads((out / "config.json").read_text()) == {"size": 3}
    assert ((out / "linked").read_bytes(), len(seen)) == (b"large", 1)


def test_files_that_fail_their_check_do_not_appear(tmp_path):
    def refuse(aside):
        raise CheckpointError("wrong")

    with pytest.raises(CheckpointError, match="wrong"):
        write_package(tmp_path / "out", Package({}, {}), card=None, check=refuse)
    assert list(tmp_path.iterdir()) == []
