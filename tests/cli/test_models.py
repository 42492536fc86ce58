import sys

import pytest
import torch

from speclm.cli._models import load, load_with_heads, physical_memory
from speclm.cli._options import DraftOptions, HeadsOptions, ModelOptions
from speclm.demo.bundle import assets
from speclm.errors import OptionError, UnknownNameError
from speclm.methods.lookup.proposer import LookupProposer
from speclm.tree.plan import TreePlan


def test_bundled_base_has_the_bundled_draft_model_and_others_have_lookup():
    assert load(ModelOptions()).spec.proposer is None
    assert "Draft" in type(load_with_heads(HeadsOptions()).spec.proposer).__name__
    other = load_with_heads(HeadsOptions(base=str(assets()["base"]), dtype="float32"))
    assert isinstance(other.spec.proposer, LookupProposer)


def test_depth_size_and_tree_bound_the_drafts():
    def tree(**options):
        return load_with_heads(DraftOptions(heads="ngram", **options)).spec.tree

    assert tree(depth=3) == TreePlan(depth=3, num_draft_tokens=16)
    assert tree(depth=3, num_draft_tokens=5) == TreePlan(depth=3, num_draft_tokens=5)
    assert tree(tree="auto") == "auto"
    loaded = load_with_heads(DraftOptions(heads="ngram", num_draft_tokens=5))
    assert (loaded.spec.tree, loaded.spec.proposer.config.num_draft_tokens) == (None, 5)


def test_base_is_spread_or_quantised_on_request():
    spread = load(ModelOptions(device_map="cpu", dtype="bfloat16"))
    assert spread.base.dtype == torch.bfloat16
    assert load(ModelOptions(device="cpu", threads=1)).base.device.type == "cpu"
    quantised = load(ModelOptions(quantization="quanto-int8", device="cpu"))
    assert type(quantised.base.model.layers[0].mlp.up_proj).__name__ == "QLinear"


def test_base_that_is_too_large_for_memory_is_named(monkeypatch):
    base = str(assets()["base"])
    with monkeypatch.context() as patch:
        patch.setattr("speclm.cli._models.physical_memory", lambda: 10_000_000)
        with pytest.raises(OptionError, match=r"0.0 GB of weights.*--quantization"):
            load(ModelOptions(base=base))
    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedModel.to", _fail_for_memory)
        with pytest.raises(OptionError, match=r"does not fit into memory \(OutOfMemoryError"):
            load(ModelOptions(base=base))
    assert physical_memory() is None or physical_memory() > 100_000_000


def _fail_for_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_modules_are_imported_from_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_things.py").write_text(
        "from speclm.methods.ngram.proposer import NgramProposer\n"
        "ready, number = NgramProposer(), 3\n"
        "def needs_more(base, size): ...\n"
        "def fails(base): raise KeyError('size')\n"
        "def forgets(base): ...\n"
    )
    loaded = load_with_heads(HeadsOptions(heads="own_things:ready", imports=["own_things"]))
    assert loaded.spec.proposer is sys.modules["own_things"].ready
    for options, message in [
        ({"heads": "own_things:nothing"}, "has no 'nothing'"),
        ({"heads": "own_things:number"}, "a int, expected a Proposer"),
        ({"heads": "own_things:needs_more"}, "cannot be called with the base alone"),
        ({"heads": "own_things:fails"}, r"base alone \(KeyError: 'size'\); name a function"),
        ({"heads": "own_things:forgets"}, "returns None, expected a proposer"),
        ({"heads": "builtins:dict"}, "cannot be called with the base alone"),  # no signature
        ({"heads": "no_such_module:x"}, "--heads names module 'no_such_module', which cannot"),
        ({"imports": ["no_such_module"]}, "--import names module 'no_such_module', which"),
    ]:
        with pytest.raises((OptionError, UnknownNameError), match=message):
            load_with_heads(HeadsOptions(**options))


def test_options_that_exclude_each_other_or_have_no_such_value_are_named(monkeypatch):
    for options, message in [
        ({"dtype": "int3"}, "--dtype is 'int3', expected one of .*float32"),
        ({"device": "cpu", "device_map": "auto"}, "--device is 'cpu' and --device-map 'auto'"),
        ({"device": "tpu9"}, "--device 'tpu9' cannot be used"),
        ({"quantization": "int3"}, "--quantization is 'int3', expected one of .*quanto-int8"),
        ({"quantization": "hqq-4bit"}, "--quantization.* needs a package that is not installed"),
        ({"tree": "auto", "depth": 2}, "--tree is 'auto' and --depth 2"),
    ]:
        with pytest.raises(OptionError, match=message):
            load_with_heads(DraftOptions(**options))


def test_files_of_look_ups_are_those_of_warm_and_index(run, tmp_path):
    lines, memory, corpus = tmp_path / "texts", tmp_path / "m.safetensors", tmp_path / "index"
    lines.write_text('{"prompt": "SELECT a FROM b", "text": "SELECT a FROM b WHERE c"}')
    short = ("--max-new-tokens", "4")
    assert run("warm", "--prompts", str(lines), "--out", str(memory), *short).exit_code == 0
    assert run("index", "--data", str(lines), "--out", str(corpus)).exit_code == 0
    loaded = load_with_heads(DraftOptions(heads="lookup", memory=memory, corpus=corpus))
    assert loaded.spec.proposer.memory.num_pairs > 0
    for heads, message in [("medusa", "memory"), ("lookup,medusa", "no clear owner")]:
        with pytest.raises(OptionError, match=message):
            load_with_heads(DraftOptions(heads=heads, memory=memory))
