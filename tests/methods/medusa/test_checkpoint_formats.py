"""Layouts of Medusa heads for other software: their tables, their traps, and round trips."""

import json
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from speclm import SpecModel
from speclm.drafting.base_parts import BaseParts
from speclm.errors import CheckpointError
from speclm.methods.medusa.checkpoint import MedusaCheckpoint, read_medusa
from speclm.methods.medusa.checkpoint_formats import MEDUSA_FORMATS
from speclm.methods.medusa.proposer import MedusaProposer
from speclm.methods.registry import registered_methods
from speclm.model.exporting import convert_heads, detect_formats, write_format
from tests.model.hub import SHA, running_hub
from tests.models import shared_model

HIDDEN, VOCAB = 4, 7
FORMATS = {each.name: each for each in MEDUSA_FORMATS}
METHOD = registered_methods()["medusa"]
FASTER = {  # of two heads of one layer
    "0.0.linear.weight": [4, 4],
    "0.0.linear.bias": [4],
    "0.1.weight": [7, 4],
    "1.0.linear.weight": [4, 4],
    "1.0.linear.bias": [4],
    "1.1.weight": [7, 4],
}
VLLM = {
    "blocks.0.layers.0.weight": [4, 4],
    "blocks.0.layers.0.bias": [4],
    "blocks.1.layers.0.weight": [4, 4],
    "blocks.1.layers.0.bias": [4],
    "lm_heads.0.weight": [7, 4],
    "lm_heads.1.weight": [7, 4],
}


def draw_heads(
    *, layers=1, heads=2, own=True, bias=True, dtype=torch.float32, choices=None, hidden=HIDDEN
):
    generator = torch.Generator().manual_seed(17 * layers + heads)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    return MedusaCheckpoint.of_stacked(
        draw(layers, heads, hidden, hidden),
        draw(layers, heads, hidden) if bias else None,
        draw(heads, VOCAB, hidden) if own else None,
        vocab_size=VOCAB,
        base_name_or_path="org/base",
        choices=choices,
    )


def write_base(folder, **tensors):
    """Write the files of a model whose weights nobody runs."""
    folder.mkdir(parents=True)
    config = {"model_type": "llama", "hidden_size": HIDDEN, "vocab_size": VOCAB}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    matrix = torch.arange(28.0).reshape(7, 4)
    state = {"lm_head.weight": matrix, "model.norm.weight": torch.ones(4), **tensors}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return BaseParts.find(write_base(tmp_path_factory.mktemp("base") / "base"))


def write(folder, heads, to, *, base=None):
    source = {"name": None, "format": "none"}
    return write_format(folder, heads, FORMATS[to], method=METHOD, base=base, source=source)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def shapes_of(path):
    return {key: list(tensor.shape) for key, tensor in load_file(path).items()}


def names_of(folder):
    return [each.name for each in detect_formats(folder, METHOD)]


def require_same(found, expected):
    assert found.keys() == expected.keys()
    for name, part in expected.items():
        assert found[name].dtype == part.dtype
        assert torch.equal(found[name], part)


# --- tables


def test_faster_decoding_gets_a_pickle_of_tensors_and_three_values(tmp_path):
    done = write(tmp_path / "out", draw_heads(heads=5), "medusa")
    state = torch.load(tmp_path / "out/medusa_lm_head.pt", weights_only=True)
    assert {key: list(t.shape) for key, t in state.items() if key[0] in "01"} == FASTER
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in state.values())
    assert config_of(tmp_path / "out") == {
        "medusa_num_heads": 5,
        "medusa_num_layers": 1,
        "base_model_name_or_path": "org/base",
    }
    assert names_of(tmp_path / "out") == ["speclm", "medusa"]
    assert done.engines[0].versions == "v0.1, and main"
    assert done.notes == ()


def test_one_folder_is_for_tgi_and_vllm(tmp_path):
    done = write(tmp_path / "out", draw_heads(choices=((0,), (1,))), "tgi")
    assert shapes_of(tmp_path / "out/medusa_lm_head.safetensors") == FASTER
    assert config_of(tmp_path / "out") == {
        "medusa_num_heads": 2,
        "medusa_num_layers": 1,
        "base_model_name_or_path": "org/base",
        "model_type": "medusa",
        "hidden_size": 4,
        "vocab_size": 7,
        "medusa_fc_bias": True,
        "version": "1",
    }
    assert names_of(tmp_path / "out") == ["speclm", "tgi"]
    assert [engine.name for engine in done.engines] == ["TGI", "vLLM"]
    assert done.engines[0].command.endswith("--speculate 2")
    assert done.engines[1].versions == "0.25 to 0.32"


def test_vllm_gets_its_own_names(tmp_path):
    done = write(tmp_path / "out", draw_heads(), "vllm")
    assert shapes_of(tmp_path / "out/model.safetensors") == VLLM
    assert config_of(tmp_path / "out") == {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": 4,
        "vocab_size": 7,
        "num_heads": 2,
        "num_hidden_layers": 1,
        "medusa_fc_bias": True,
        "base_model_name_or_path": "org/base",
    }
    assert names_of(tmp_path / "out") == ["speclm", "vllm"]
    (engine,) = done.engines
    assert engine.versions == "0.12 to 0.32"
    assert '"num_speculative_tokens": 2' in engine.command_for(base="org/base", heads="out")


def test_rtp_llm_gets_the_base_with_a_shard_an_index_and_a_config(tmp_path, base):
    choices, original = ((0,), (1,), (0, 11)), base.folder / "model.safetensors"
    original.chmod(0o640)
    write(tmp_path / "out", draw_heads(choices=choices), "rtp-llm", base=base)
    folder = tmp_path / "out"
    assert shapes_of(folder / "medusa_head.safetensors") == {
        f"medusa_head.{key}": shape for key, shape in FASTER.items()
    }
    assert config_of(folder) == {
        **base.config,
        "medusa_config": {
            "medusa_num_heads": 2,
            "medusa_num_layers": 1,
            "top_k": 12,
            "posterior_threshold": 0.09,
            "posterior_alpha": 0.3,
            "medusa_choices": [[0], [1], [0, 11]],
        },
    }
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    stored = {}
    for name in {*index["weight_map"].values()}:
        stored |= {key: (name, tensor) for key, tensor in load_file(folder / name).items()}
    assert {key: name for key, (name, _) in stored.items()} == index["weight_map"]
    sizes = [tensor.numel() * tensor.element_size() for _, tensor in stored.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert original.samefile(folder / "model-00001-of-00001.safetensors")
    assert original.stat().st_mode & 0o777 == 0o640  # a link has the permissions of the original
    assert names_of(folder) == ["speclm", "rtp-llm"]
    assert read_medusa(folder).choices == choices


# --- traps


def test_medusa_fc_bias_says_whether_there_are_biases(tmp_path):
    for bias in (True, False):
        out = tmp_path / str(bias)
        write(out, draw_heads(bias=bias), "vllm")
        assert config_of(out)["medusa_fc_bias"] is bias
        has_bias = any(key.endswith("bias") for key in shapes_of(out / "model.safetensors"))
        assert has_bias is bias
        config = {**config_of(out), "medusa_fc_bias": not bias}
        (out / "config.json").write_text(json.dumps(config))
        assert names_of(out) == ["speclm"]


@pytest.mark.parametrize("to", ["tgi", "vllm"])
def test_one_key_of_the_config_is_the_number_of_heads_and_one_that_of_layers(tmp_path, to):
    write(tmp_path / "out", draw_heads(layers=2, heads=3), to)
    config = config_of(tmp_path / "out")
    numbers = {key: value for key, value in config.items() if "num" in key}
    assert [value for key, value in numbers.items() if "heads" in key] == [3]
    assert [value for key, value in numbers.items() if "layers" in key] == [2]
    if to == "vllm":  # a later key would be taken
        (tmp_path / "out/config.json").write_text(json.dumps({**config, "num_attention_heads": 8}))
        assert names_of(tmp_path / "out") == ["speclm"]


def test_a_class_in_the_config_is_no_folder_for_tgi(tmp_path):
    write(tmp_path / "out", draw_heads(), "tgi")
    config = config_of(tmp_path / "out")
    assert "architectures" not in config
    config["architectures"] = ["MedusaModel"]
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    assert names_of(tmp_path / "out") == ["speclm"]


def test_layers_without_bias_get_zeros_where_the_software_has_one(tmp_path):
    heads = draw_heads(bias=False)
    for to in ("medusa", "tgi"):
        done = write(tmp_path / to, heads, to)
        assert any("got zeros" in note for note in done.notes)
        found = read_medusa(tmp_path / to)
        assert found.has_bias
        assert not any(part.any() for name, part in found.parts.items() if "bias" in name)


def test_several_layers_are_named_where_the_software_has_one_block(tmp_path, base):
    heads = draw_heads(layers=3)
    done = write(tmp_path / "medusa", heads, "medusa")
    assert any("one residual block for all 3 layers" in note for note in done.notes)
    equal = dict(heads.parts)
    for head, layer, role in product((0, 1), (1, 2), ("weight", "bias")):
        equal[f"{head}.{layer}.linear.{role}"] = equal[f"{head}.0.linear.{role}"]
    done = write(tmp_path / "equal", replace(heads, parts=equal), "medusa")
    assert done.notes == ()
    assert "v0.1" in done.engines[0].versions
    assert "five heads" in done.engines[0].note
    with pytest.raises(CheckpointError, match=r"3 residual layers, expected 1.*'vllm' or 'tgi'"):
        write(tmp_path / "rtp", heads, "rtp-llm", base=base)
    assert not (tmp_path / "rtp").exists()


def test_heads_without_output_matrices_get_copies_of_the_bases(tmp_path, base):
    heads = draw_heads(own=False)
    matrix = base.output_matrix()
    for to, copies in (("tgi", 2), ("rtp-llm", 2), ("vllm", 1)):
        done = write(tmp_path / to, heads, to, base=base)
        assert any(f"holds {copies} cop" in n and f"{112 * copies} bytes" in n for n in done.notes)
        found = read_medusa(tmp_path / to)
        assert all(torch.equal(found.parts[f"{head}.1.weight"], matrix) for head in (0, 1))
        require_same(found.share(matrix).parts, heads.parts)
    assert config_of(tmp_path / "vllm")["original_lm_head"] is True
    done = write(tmp_path / "medusa", heads, "medusa", base=base)
    assert config_of(tmp_path / "medusa")["version"] == "2"
    assert "medusa_model_legacy.py" in done.engines[0].versions
    back = convert_heads(tmp_path / "tgi", tmp_path / "back", to="speclm", base=base)
    assert any("left out" in note for note in back.notes)
    require_same(read_medusa(tmp_path / "back").parts, heads.parts)


def test_copies_of_the_bases_matrix_have_the_dtype_of_the_heads(tmp_path, base):
    write(tmp_path / "out", draw_heads(own=False, dtype=torch.bfloat16), "tgi", base=base)
    assert read_medusa(tmp_path / "out").dtype == torch.bfloat16


def test_a_base_that_cannot_give_its_matrix_is_refused(tmp_path, base):
    heads = draw_heads(own=False)
    for to in ("tgi", "vllm", "rtp-llm"):
        with pytest.raises(CheckpointError, match=rf"{to}' needs the base.*--base"):
            write(tmp_path / "out", heads, to)
    nameless = replace(draw_heads(), base_name_or_path=None)
    for to in ("tgi", "medusa"):
        with pytest.raises(CheckpointError, match=rf"{to}' needs the base.*name.*--base"):
            write(tmp_path / "out", nameless, to)
    biased = BaseParts.find(write_base(tmp_path / "biased", **{"lm_head.bias": torch.ones(7)}))
    with pytest.raises(CheckpointError, match=r"has a bias.*'vllm' has no room.*own-lm-head"):
        write(tmp_path / "out", heads, "vllm", base=biased)
    with pytest.raises(CheckpointError, match=r"states 3 wide, found 4.*trained on"):
        write(tmp_path / "out", draw_heads(own=False, hidden=3), "vllm", base=base)
    assert not (tmp_path / "out").exists()


def test_a_base_without_a_hub_id_is_named_by_its_path(tmp_path, base):
    nameless = replace(draw_heads(), base_name_or_path=None)
    done = write(tmp_path / "out", nameless, "tgi", base=base)
    assert config_of(tmp_path / "out")["base_model_name_or_path"] == str(base.folder.resolve())
    assert any("before you publish" in note for note in done.notes)
    assert read_medusa(tmp_path / "out").base_name_or_path is None


def test_files_of_a_base_on_the_hub_are_downloaded_and_no_others(tmp_path, monkeypatch):
    folder = write_base(tmp_path / "me" / "base")
    for name in ("optimizer.pt", "other.safetensors", "README.md"):
        (folder / name).write_text("not needed")
    with running_hub(tmp_path, monkeypatch) as hub:
        write(tmp_path / "out", draw_heads(), "rtp-llm", base=BaseParts.find("me/base"))
        assert {*hub.sent} == {"config.json", "model.safetensors", "tokenizer.json"}
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"
    require_same(read_medusa(tmp_path / "out").parts, draw_heads().parts)


def test_a_base_whose_files_cannot_be_copied_is_refused(tmp_path):
    loaded = BaseParts.of_model(shared_model("llama"))
    with pytest.raises(CheckpointError, match=r"is loaded, expected its files.*--base"):
        write(tmp_path / "out", draw_heads(hidden=40), "rtp-llm", base=loaded)
    pickled = write_base(tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin.*pickled, expected safetensors"):
        write(tmp_path / "out", draw_heads(), "rtp-llm", base=BaseParts.find(pickled))


@pytest.mark.parametrize("to", [*FORMATS])
def test_heads_of_a_merged_model_are_converted(tmp_path, to):
    heads = draw_heads(heads=4)
    state = {f"medusa_head.{name}": part for name, part in heads.parts.items()}
    merged = write_base(tmp_path / "merged", **state)
    assert read_medusa(merged).is_merged
    done = convert_heads(merged, tmp_path / "out", to=to, base=merged)
    require_same(read_medusa(tmp_path / "out").parts, heads.parts)
    assert any("trained together" in note for note in done.notes) is (to != "rtp-llm")
    if to == "rtp-llm":  # the heads are in the base's own file
        assert not (tmp_path / "out/medusa_head.safetensors").exists()
        state["medusa_head.0.0.linear.bias"] = torch.ones(4)
        other = write_base(tmp_path / "other", **state)
        with pytest.raises(CheckpointError, match=r"other heads.*name the base without heads"):
            write(tmp_path / "second", read_medusa(merged), to, base=BaseParts.find(other))


@pytest.mark.parametrize("to", ["tgi", "medusa", "vllm", "speclm"])
def test_a_merged_model_is_the_base_of_its_heads_whatever_is_named(tmp_path, monkeypatch, to):
    heads = draw_heads(own=False)
    state = {f"medusa_head.{name}": part for name, part in heads.parts.items()}
    merged = write_base(tmp_path / "org/merged", **state)
    config = {"base_model_name_or_path": "org/original", "medusa_num_heads": 2}
    config |= config_of(merged)
    (merged / "config.json").write_text(json.dumps(config))
    original = write_base(tmp_path / "org/original")
    tensors = load_file(original / "model.safetensors")
    tensors = {name: 2 * tensor for name, tensor in tensors.items()}
    save_file(tensors, original / "model.safetensors")
    with running_hub(tmp_path, monkeypatch):
        convert_heads("org/merged", tmp_path / "out", to=to, base="org/original")
    made = json.loads((tmp_path / "out/speclm_export.json").read_text())
    assert made["base"] == {"name": "org/merged", "commit": SHA}
    named = config_of(tmp_path / "out").get("base_model_name_or_path")
    assert named == (None if to == "speclm" else "org/merged")
    found = read_medusa(tmp_path / "out")
    if found.has_own_lm_head:
        matrix = BaseParts.find(merged).output_matrix()
        assert torch.equal(found.parts["0.1.weight"], matrix)


def test_a_folder_for_rtp_llm_is_base_and_heads_for_us(tmp_path):
    model = shared_model("llama")
    model.save_pretrained(tmp_path / "base")
    sizes = {"hidden": model.config.hidden_size, "own": False}
    heads = replace(draw_heads(**sizes), vocab_size=model.config.vocab_size)
    write(tmp_path / "out", heads, "rtp-llm", base=BaseParts.find(tmp_path / "base"))
    found = SpecModel.from_pretrained(tmp_path / "out", tmp_path / "out", dtype=torch.float32)
    assert isinstance(found.proposer, MedusaProposer)
    assert found.proposer.heads.lm_weight is None  # copies of the base's matrix are left out
    prompt = torch.tensor([[3, 5, 7]])
    expected = model.generate(prompt, max_new_tokens=6, do_sample=False)
    assert torch.equal(found.generate(prompt, max_new_tokens=6, do_sample=False), expected)
    assert isinstance(SpecModel.from_pretrained(model, tmp_path / "out").proposer, MedusaProposer)


# --- round trips


@given(
    first=st.sampled_from([*FORMATS]),
    second=st.sampled_from([*FORMATS]),
    layers=st.integers(1, 3),
    heads=st.integers(1, 5),
    own=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    choices=st.sampled_from([None, ((0,),), ((0,), (1,))]),
)
def test_heads_are_the_same_after_a_round_trip(tmp_path_factory, base, first, second, **numbers):
    needs = {first, second}
    # What the formats cannot hold.
    numbers["own"] |= not needs <= {"speclm", "medusa"}
    numbers["bias"] |= not needs <= {"speclm", "vllm"}
    if not needs <= {"speclm", "rtp-llm"}:
        numbers["choices"] = None
    if "rtp-llm" in needs:
        numbers["layers"] = 1
        if numbers["choices"] is None:  # fewer heads than levels of its own tree get another tree
            numbers["heads"] = max(4, numbers["heads"])
    folder, heads = tmp_path_factory.mktemp("trip"), draw_heads(**numbers)
    used = base if "rtp-llm" in needs else None
    write(folder / "a", heads, first, base=used)
    convert_heads(folder / "a", folder / "b", to=second, base=used)
    convert_heads(folder / "b", folder / "c", to=first, base=used)
    require_same(read_medusa(folder / "c").parts, heads.parts)
    assert read_medusa(folder / "c").choices == numbers["choices"]
    before, after = config_of(folder / "a"), config_of(folder / "c")
    if used is not None:  # the base's own config does not say where it comes from
        before.pop("base_model_name_or_path", None)
        after.pop("base_model_name_or_path", None)
    assert after == before
