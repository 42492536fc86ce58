import json
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM

from speclm.errors import CheckpointError
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
    wrong = {**record["settings"], "tree": {"width": 3}}
    for damaged in (
        {},
        {**record, "settings": {}},
        {**record, "settings": wrong},
        {**record, "base": None},
    ):
        (out / "speclm_export.json").write_text(json.dumps(damaged))
        model.name_or_path = str(out)
        with pytest.raises(CheckpointError, match="export the folder again"):
            load_served(model)


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
    served = load_served(model)
    assert served.tree == plan
    prompt = torch.arange(5, 12)[None]
    output = served.generate(prompt, max_new_tokens=8)
    assert torch.equal(output, model.generate(prompt, max_new_tokens=8))
    assert served.last_speculation.total.num_draft_tokens > 0
