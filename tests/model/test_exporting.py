"""Heads in every format: the bundled ones come back and draft as before."""

import json

import pytest
import torch

from speclm import SpecModel
from speclm.demo.bundle import assets, load_prompts
from speclm.errors import CheckpointError, OptionError, UnknownNameError
from speclm.methods.finding import find_heads
from speclm.methods.registry import registered_methods
from speclm.model.checking import check_heads
from speclm.model.exporting import convert_heads, detect_formats, find_format, format_names

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
    ],
)
def test_bad_arguments_are_explained(tmp_path, monkeypatch, heads, options, error, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        convert_heads(assets()[heads], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_is_never_written_into(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"\['notes.txt'\], expected a new or empty folder"):
        convert_heads(assets()["eagle3"], tmp_path, to="vllm")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_conversion_that_stops_leaves_nothing(tmp_path, monkeypatch):
    from speclm.drafting import package

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(package, "save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        convert_heads(assets()["eagle3"], tmp_path / "out", to="vllm")
    assert list(tmp_path.iterdir()) == []


def test_every_method_with_heads_has_our_own_format_first():
    for kind in KINDS:
        method = find_heads(assets()[kind]).method
        assert method.formats()[0].name == "speclm"
