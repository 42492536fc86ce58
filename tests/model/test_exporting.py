"""Heads in every format: the bundled ones come back and draft as before."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError

from speclm import SpecModel
from speclm.demo.bundle import assets, load_prompts
from speclm.errors import CheckpointError, OptionError, SaveError, UnknownNameError
from speclm.methods.eagle.checkpoint import read_eagle
from speclm.methods.finding import find_heads
from speclm.methods.medusa.checkpoint import read_medusa
from speclm.methods.medusa.checkpoint_writing import write_medusa
from speclm.methods.registry import registered_methods
from speclm.model.checking import check_heads
from speclm.model.exporting import convert_heads, detect_formats, find_format, format_names
from tests.model.hub import running_hub

KINDS = ("block", "eagle", "eagle3", "medusa")
# What a format cannot hold of the bundled heads, by the words of its error.
REFUSED = {
    ("eagle", "specforge"): "holds heads of EAGLE-3 only",
    ("eagle", "speculators"): "holds heads of EAGLE-3 only",
    ("eagle", "modelopt"): "holds heads of EAGLE-3 only",
    ("eagle", "rtp-llm"): "holds heads of EAGLE-3 only",
    ("eagle3", "vllm-legacy"): "holds heads of EAGLE-1 only",
    ("eagle3", "rtp-llm"): "is for heads with qk_norm",
    ("medusa", "rtp-llm"): "layers",
    ("block", "dflash"): "of DSpark",
    ("block", "vllm"): "read the last layer",
    ("block", "sglang"): "read the last layer",
    ("block", "specforge"): "causal",
    ("block", "speculators"): "causal",
}
CASES = [
    (kind, name) for kind in KINDS for name in format_names()["eagle" if kind == "eagle3" else kind]
]


@pytest.fixture(scope="module")
def decoded():
    """Return a function that loads heads and decodes some prompts: tokens and tau."""
    base = SpecModel.from_pretrained(assets()["base"], None, dtype=torch.float32).base
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets()["base"])
    texts = [chat[-1]["content"] for chat in load_prompts("sql_tune", limit=2)]
    prompts = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
    known = {}

    def decode(heads):
        if heads not in known:
            spec = SpecModel.from_pretrained(base, heads, adaptive=False)
            known[heads] = [
                (spec.generate(ids, max_new_tokens=12).tolist(), spec.last_speculation.tau)
                for ids in prompts
            ]
        return known[heads]

    return decode


@pytest.mark.untraced
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_every_format_of_the_bundled_heads_drafts_as_they_do(tmp_path, decoded, kind, name):
    source, out = assets()[kind], tmp_path / "out"
    base = assets()["base"]
    words = REFUSED.get((kind, name))
    if words is not None:
        with pytest.raises(CheckpointError, match=words):
            convert_heads(source, out, to=name, base=base)
        assert not out.exists()
        return
    assert convert_heads(source, out, to=name, base=base).format == name
    assert decoded(out) == decoded(source)
    found = check_heads(out, base=base, source=source)
    assert found.is_equal
    assert name in found.formats


def test_card_and_provenance_say_what_loads_the_files(tmp_path):
    done = convert_heads(assets()["eagle3"], tmp_path / "out", to="vllm")
    card = (tmp_path / "out/README.md").read_text()
    assert "vllm serve path/to/base --speculative-config" in card
    assert '"num_speculative_tokens": 3' in card
    assert f"Versions: {done.engines[0].versions}" in card
    made = json.loads((tmp_path / "out/speclm_export.json").read_text())
    assert (made["format"], made["method"]) == ("vllm", "eagle")
    assert str(tmp_path) not in json.dumps(made)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("README.md", "config.json", "model.safetensors", "speclm_export.json")
    }


def test_provenance_finds_a_source_in_a_subfolder_on_the_hub(tmp_path, monkeypatch):
    shutil.copytree(assets()["eagle3"], tmp_path / "org/heads/deep/down")
    with running_hub(tmp_path, monkeypatch):
        options = {"subfolder": "deep/down", "cache_dir": tmp_path / "mine"}
        convert_heads("org/heads", tmp_path / "out", to="vllm", heads_kwargs=options)
        assert (tmp_path / "mine/models--org--heads").is_dir()
        source = json.loads((tmp_path / "out/speclm_export.json").read_text())["source"]
        assert (source["name"], source["subfolder"]) == ("org/heads", "deep/down")
        assert check_heads(tmp_path / "out").difference == 0


def test_models_save_their_heads_in_a_format(tmp_path):
    spec = SpecModel.from_pretrained(assets()["base"], assets()["eagle3"], dtype="float32")
    spec.save_pretrained(tmp_path / "out", format="sglang")
    formats = detect_formats(tmp_path / "out", registered_methods()["eagle"])
    assert find_format(registered_methods()["eagle"], "sglang") in formats
    assert check_heads(tmp_path / "out", source=assets()["eagle3"]).is_equal
    spec.save_pretrained(tmp_path / "out", format="sglang")  # again, over the same format
    with pytest.raises(CheckpointError, match="one with heads in the format 'vllm'"):
        spec.save_pretrained(tmp_path / "out", format="vllm")
    with pytest.raises(UnknownNameError, match=r"no format 'tgi'.*'vllm'"):
        spec.save_pretrained(tmp_path / "other", format="tgi")
    with pytest.raises(OptionError, match="no heads to save"):
        SpecModel(spec.base, None).save_pretrained(tmp_path / "other", format="vllm")


@pytest.mark.parametrize(
    ("heads", "options", "error", "words"),
    [
        ("draft", {"to": "vllm"}, OptionError, "a draft model needs no conversion"),
        ("eagle3", {"to": "vlm"}, UnknownNameError, r"no format 'vlm'.*did you mean 'vllm'"),
        ("eagle3", {"to": "vllm", "base": "no/such folder"}, UnknownNameError, "no hub id"),
        ("eagle3", {"to": "vllm", "base": "."}, CheckpointError, "found no config"),
        ("eagle3", {"to": "vllm", "base": ""}, UnknownNameError, "base '' is no folder"),
        ("eagle3", {"to": "vllm", "out": "file/x"}, CheckpointError, "found the file .*/file, exp"),
        ("eagle3", {"to": "VLLM"}, UnknownNameError, "did you mean 'vllm'"),
        ("medusa", {"to": "medusa", "base": assets()["draft"]}, CheckpointError, "found 112"),
        ("eagle3", {"to": "vllm", "out": "a\0b"}, CheckpointError, "found no path"),
        ("eagle3", {"to": "vllm", "out": "loop"}, CheckpointError, "found no path"),
    ],
)
def test_bad_arguments_are_explained(tmp_path, monkeypatch, heads, options, error, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("")
    with pytest.raises(error, match=words):
        convert_heads(assets()[heads], **{"out": tmp_path / "out", **options})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


def test_a_folder_with_something_else_is_never_written_into(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"\['notes.txt'\], expected a new or empty folder"):
        convert_heads(assets()["eagle3"], tmp_path, to="vllm")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("stop", "error"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (SafetensorError("No space left"), SaveError)],
)
def test_a_conversion_that_stops_leaves_nothing(tmp_path, monkeypatch, stop, error):
    from speclm.drafting import package

    def save(*args, **kwargs):
        raise stop

    monkeypatch.setattr(package, "save_file", save)
    with pytest.raises(error):
        convert_heads(assets()["eagle3"], tmp_path / "out", to="vllm")
    assert list(tmp_path.iterdir()) == []


def test_a_card_that_somebody_has_written_is_kept(tmp_path):
    for text in (None, "my own words"):
        if text is not None:
            (tmp_path / "README.md").write_text(text)
        convert_heads(assets()["eagle3"], tmp_path, to="vllm")
    assert (tmp_path / "README.md").read_text() == "my own words"


def test_heads_saved_over_converted_ones_are_not_said_to_be_converted(tmp_path):
    convert_heads(assets()["medusa"], tmp_path, to="tgi", base=assets()["base"])
    write_medusa(tmp_path, read_medusa(assets()["medusa"]))
    assert check_heads(tmp_path).provenance == {}


def test_copies_of_the_base_are_left_out_of_our_own_format(tmp_path):
    base = assets()["base"]
    convert_heads(assets()["eagle"], tmp_path / "legacy", to="vllm-legacy", base=base)
    convert_heads(tmp_path / "legacy", tmp_path / "back", to="speclm", base=base)
    config = read_eagle(tmp_path / "back").config
    assert (config.has_own_embeddings, config.has_own_lm_head) == (False, False)


def test_every_method_with_heads_has_our_own_format_first():
    for kind in KINDS:
        method = find_heads(assets()[kind]).method
        assert method.formats()[0].name == "speclm"


@pytest.mark.parametrize(("name", "is_kept"), [("speclm", True), ("vllm", False)])
def test_a_tree_that_is_lost_is_noted(tmp_path, name, is_kept):
    tree = ((0,), (1,), (0, 0))
    write_medusa(tmp_path / "heads", replace(read_medusa(assets()["medusa"]), choices=tree))
    done = convert_heads(tmp_path / "heads", tmp_path / "out", to=name, base=assets()["base"])
    assert any("static tree" in note for note in done.notes) is not is_kept
    assert (read_medusa(tmp_path / "out").choices is not None) is is_kept


def test_weights_that_would_stay_next_to_new_ones_are_refused(tmp_path):
    convert_heads(assets()["eagle3"], tmp_path, to="vllm")
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"of another base")
    with pytest.raises(CheckpointError, match="software may load too"):
        convert_heads(assets()["eagle3"], tmp_path, to="vllm")
