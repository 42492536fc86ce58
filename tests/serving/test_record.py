import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from speclm.errors import CheckpointError, OptionError
from speclm.methods.ngram.corpus import vocabulary_fingerprint
from speclm.methods.ngram.suffix_index import SuffixIndex
from speclm.serving import export_server
from speclm.serving.record import load_served
from speclm.tree.plan import TreePlan
from tests.byte_tokenizer import VOCAB_SIZE
from tests.model.hub import running_hub
from tests.models import build_model


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_base_that_was_not_exported_has_no_settings(base, tmp_path):
    model = load(base)
    with pytest.raises(CheckpointError, match="serve the folder that it wrote"):
        load_served(model)
    out = export_server(base, tmp_path / "served", heads="ngram", check=False).folder
    record = json.loads((out / "speclm_export.json").read_text())
    model.name_or_path = str(out)
    wrong = ({"format": 1}, {"settings": {}}, {"base": None}, {"base": {"weights": {"../a": ""}}})
    for damaged in wrong:
        (out / "speclm_export.json").write_text(json.dumps({**record, **damaged}))
        with pytest.raises(CheckpointError, match="export the folder again"):
            load_served(model)
    (out / "speclm_export.json").write_text("[" * 5000)
    with pytest.raises(CheckpointError, match="no JSON can be read"):
        load_served(model)


def test_settings_reach_nothing_outside_of_the_folder(base, tmp_path):
    model = load(base)
    out = export_server(base, tmp_path / "served", heads="ngram", check=False).folder
    model.name_or_path = str(out)
    record = json.loads((out / "speclm_export.json").read_text())
    for name, values in {
        "heads": ["org/name", "..", str(base), 5, ["ngram", "lookup"]],
        "heads_kwargs": [
            {"corpus": "/etc/hosts"},
            {"a": "../b"},
            {"memory": "x"},
            {"token": ""},
            {"heads_path": "org/a"},
        ],
        "files": [{"corpus": "../heads"}, {"corpus": "/a"}, {"corpus": 5}, {"a": "x" * 999}],
        "tree": [{"width": 3}, "mine.json", [[0]], 4],
        "num_draft_tokens": ["4", 1.5],
        "engine": [None, {}],
    }.items():
        for value in values:
            settings = {**record["settings"], name: value}
            (out / "speclm_export.json").write_text(json.dumps({**record, "settings": settings}))
            with pytest.raises(CheckpointError, match="export the folder again"):
                load_served(model)


def test_files_that_options_name_move_with_the_folder(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    corpus = Path("corpus.bin")
    config = AutoConfig.from_pretrained(base)
    index = SuffixIndex.build([[5, 6, 7, 8, 9] * 4])
    fingerprint = vocabulary_fingerprint(config)
    index.save(corpus, vocab_size=config.vocab_size, fingerprint=fingerprint)
    for given in (corpus, str(corpus)):
        out = export_server(base, "served", heads="lookup", heads_kwargs={"corpus": given}).folder
    corpus.unlink()
    served = load_served(load(out.rename("moved")))
    assert len(served.proposer.grower.sources) == 3
    for wrong in ({"corpus": corpus}, {"memory": "mine"}, {"token": "secret"}, {"heads_path": "a"}):
        with pytest.raises(OptionError, match="that an exported folder cannot hold"):
            export_server(base, "other", heads_kwargs=wrong, check=False)


def test_shards_that_no_index_names_are_served_with_heads_of_the_base(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    save_file({"mtp.fc.weight": torch.ones(2)}, tmp_path / "base" / "mtp.safetensors")
    for heads, is_copied in (("mtp", True), ("ngram", False)):
        done = export_server(tmp_path / "base", tmp_path / heads, heads=heads, check=False)
        assert (done.folder / "mtp.safetensors").exists() == is_copied


def test_weights_that_were_replaced_are_reported(base, draft, tmp_path, caplog):
    out = export_server(base, tmp_path / "served", heads="ngram", check=False).folder
    (out / "model.safetensors").unlink()
    build_model("llama", vocab_size=VOCAB_SIZE, seed=1).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(out / "model.safetensors")
    with caplog.at_level(logging.WARNING, "speclm"):
        load_served(load(out))
    assert "not those that the heads were exported with" in caplog.text


def test_heads_on_the_hub_are_those_of_the_bases_commit(
    base, draft, tmp_path, monkeypatch, modules
):
    for revision, heads in (("", "ngram"), ("@v2", draft)):
        export_server(base, tmp_path / f"org/served{revision}", heads=heads, check=False)
    with running_hub(tmp_path, monkeypatch):
        model = AutoModelForCausalLM.from_pretrained(
            "org/served", revision="v2", trust_remote_code=True
        )
        output = model.generate(
            torch.arange(5, 12)[None], max_new_tokens=4, return_dict_in_generate=True
        )
    assert output.speculation.total.num_draft_tokens > 0
    assert type(vars(model)["_speclm_served"].proposer).__name__ == "DraftModelProposer"


@pytest.mark.parametrize("heads", ["lookup", "ngram", "recycling"])
def test_methods_without_files_are_exported_with_their_options(base, tmp_path, heads):
    done = export_server(
        base, tmp_path / "served", heads=heads, num_draft_tokens=5, tree="auto", engine="eager"
    )
    assert done.verification == "tree attention"
    assert not (done.folder / "heads").exists()
    served = load_served(load(done.folder))
    assert served.proposer.config.num_draft_tokens == 5
    assert (served.tree, served.engine) == ("auto", "eager")


def test_draft_model_and_plan_are_those_that_were_exported(base, draft, tmp_path):
    plan = TreePlan(depth=3, num_draft_tokens=4)
    done = export_server(base, tmp_path / "served", heads=draft, tree=plan)
    model = load(done.folder)
    served = load_served(model, commit="0" * 40)  # as from a path into the hub's cache
    assert served.tree == plan
    prompt = torch.arange(5, 12)[None]
    output = served.generate(prompt, max_new_tokens=8)
    assert torch.equal(output, model.generate(prompt, max_new_tokens=8))
    assert served.last_speculation.total.num_draft_tokens > 0
