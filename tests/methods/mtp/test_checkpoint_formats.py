"""MTP layers within a copy of their base, as other software reads them."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from speclm import SpecModel
from speclm.drafting.base_parts import BaseParts
from speclm.errors import CheckpointError
from speclm.files.weights import weight_files
from speclm.methods.mtp.checkpoint_formats import MTP_FORMATS, SHARD
from speclm.methods.mtp.checkpoint_writing import read_layers, saved_layers, write_mtp
from speclm.methods.mtp.training import load_mtp_heads
from speclm.model.checking import check_heads
from speclm.model.exporting import convert_heads
from speclm.target import TargetView
from tests.methods.mtp.mtp_bases import make_base
from tests.models import prompts


def tuned(folder, out):
    """Write changed layers of a base, with a tree, and return their tensors."""
    base = AutoModelForCausalLM.from_pretrained(folder)
    heads = load_mtp_heads(base)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.01)
    write_mtp(out, saved_layers(heads, TargetView(base), choices=((0,), (0, 0))))
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("shards", [True, False])
@pytest.mark.parametrize("name", ["glm4_moe", "qwen3_next"])
def test_copy_of_the_base_has_the_new_layers_once_and_all_else_as_before(name, shards, tmp_path):
    source, heads, out = tmp_path / "base", tmp_path / "heads", tmp_path / "out"
    made = make_base(source, name, shards=shards)
    layers = tuned(source, heads)
    done = convert_heads(heads, out, to="whole", base=source)
    found = list(weight_files(out))
    assert [each.path.name for each in found] == ["model.safetensors.index.json"]
    stored = [key for file in {*found[0].files.values()} for key in load_file(file)]
    assert sorted(stored) == sorted(found[0].files)
    before = {key: t for file in source.glob("*.safetensors") for key, t in load_file(file).items()}
    whole = found[0].load(list(found[0].files))
    assert whole.keys() == before.keys()
    assert all(torch.equal(whole[key], {**before, **layers}[key]) for key in before)
    if shards:
        first = "model-00001-of-00002.safetensors"
        assert (out / first).samefile(source / first)
    assert any("Written anew" in note for note in done.notes) is not shards
    spec = SpecModel.from_pretrained(str(out), "mtp")
    projection = next(key for key in layers if key.endswith((".fc.weight", ".eh_proj.weight")))
    assert torch.equal(spec.proposer.heads.layer(0).projection.weight, layers[projection])
    inputs = prompts(6)
    expected = made.base.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert torch.equal(spec.generate(**inputs, max_new_tokens=5, do_sample=False), expected)
    assert check_heads(out, base=source, source=heads).is_equal
    assert not check_heads(heads, source=convert_back(source, tmp_path)).is_equal
    assert read_layers(out).choices == ((0,), (0, 0))
    total = json.loads((out / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert total == sum(tensor.numel() * tensor.element_size() for tensor in whole.values())


def convert_back(source, folder):
    """Return a folder with the base's own layers."""
    spec = SpecModel.from_pretrained(str(source), "mtp")
    spec.save_pretrained(folder / "untuned")
    return folder / "untuned"


def test_layers_take_the_precision_of_those_that_they_replace(made, tmp_path):
    layers, out = tuned(made.folder, tmp_path / "heads"), tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.bfloat16).save_pretrained(out)
    save_file(
        {
            **load_file(out / "model.safetensors"),
            **{key: tensor.bfloat16() for key, tensor in layers.items()},
        },
        out / "model.safetensors",
        metadata={"format": "pt"},
    )
    convert_heads(tmp_path / "heads", tmp_path / "out", to="whole", base=out)
    assert {t.dtype for t in load_file(tmp_path / "out" / SHARD).values()} == {torch.bfloat16}


def test_base_without_the_replaced_tensors_or_with_quantised_ones_is_refused_by_name(
    made, tmp_path
):
    tuned(made.folder, tmp_path / "heads")
    layers, whole = read_layers(tmp_path / "heads"), MTP_FORMATS[1]
    base = BaseParts.find(made.folder)
    with pytest.raises(CheckpointError, match="format 'whole' needs the base"):
        whole.pack(layers, None)
    key = "model.layers.2.eh_proj.weight"
    wide = {**layers.tensors, key: torch.ones(3, 3)}
    with pytest.raises(CheckpointError, match=r"of shape \[40, 80\], expected floating numbers of"):
        whole.pack(replace(layers, tensors=wide), base)
    more = {**layers.tensors, "model.layers.3.eh_proj.weight": torch.ones(3, 3)}
    with pytest.raises(CheckpointError, match=r"has no 'model.layers.3.eh_proj.weight'"):
        whole.pack(replace(layers, tensors=more), base)
    shutil.copytree(made.folder, tmp_path / "quantised")
    shard = tmp_path / "quantised/model-00002-of-00002.safetensors"
    save_file({**load_file(shard), key: torch.ones(40, 80, dtype=torch.int8)}, shard)
    with pytest.raises(CheckpointError, match=r"is torch.int8 of shape .*in floating point"):
        whole.pack(layers, BaseParts.find(tmp_path / "quantised"))
