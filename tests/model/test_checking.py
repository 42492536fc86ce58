"""Heads checked against a base and a source; every format is checked with test_exporting.py."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from speclm.demo.bundle import assets
from speclm.errors import CheckpointError, OptionError
from speclm.model.checking import check_heads
from tests.models import build_model


def test_facts_name_sizes_formats_and_what_loads_the_heads():
    found = check_heads(assets()["eagle3"], base=assets()["base"])
    assert found.method == "eagle"
    assert {"speclm", "vllm", "sglang"} <= set(found.formats)
    assert "as the base" in found.facts["vocabulary"]
    assert {"vLLM", "SGLang"} <= {engine.name for engine in found.engines}
    assert (found.difference, found.is_equal) == (None, True)


def test_a_difference_from_the_source_is_found(tmp_path):
    shutil.copytree(assets()["eagle3"], tmp_path / "changed")
    weights = tmp_path / "changed/model.safetensors"
    tensors = load_file(weights)
    tensors["fc.weight"][0] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    found = check_heads(tmp_path / "changed", source=assets()["eagle3"])
    assert not found.is_equal
    assert found.difference > 0
    with pytest.raises(OptionError, match="are heads of medusa, expected those of eagle"):
        check_heads(tmp_path / "changed", source=assets()["medusa"])


def test_heads_of_another_base_are_refused(tmp_path):
    build_model("llama").save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match="name the base that they were trained on"):
        check_heads(assets()["eagle3"], base=tmp_path / "base")
