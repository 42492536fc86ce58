"""Heads in a folder and on the hub, and back."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from speclm import SpecModel
from speclm.errors import CheckpointError, OptionError
from speclm.methods.eagle.config import EagleConfig
from speclm.methods.eagle.network import EagleHeads
from speclm.methods.eagle.proposer import EagleProposer
from speclm.methods.medusa.network import MedusaHeads, MedusaHeadsConfig
from speclm.methods.medusa.proposer import MedusaProposer
from tests.model.hub import running_hub
from tests.models import VOCAB_SIZE, build_model, generate, prompts, shared_model


def with_heads(base, *, tree=((0,), (1,), (0, 0))):
    heads = MedusaHeads(
        MedusaHeadsConfig(hidden_size=40, vocab_size=VOCAB_SIZE, num_heads=2, has_own_lm_head=True)
    )
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(2))
    return SpecModel(base, MedusaProposer(heads, target=base, tree=tree))


@pytest.mark.parametrize("tree", [((0,), (1,), (0, 0)), None])
def test_saved_heads_are_loaded_with_their_tree(tmp_path, tree):
    base = shared_model("llama")
    spec = with_heads(base, tree=tree)
    spec.save_pretrained(tmp_path)
    loaded = SpecModel.from_pretrained(base, tmp_path)
    assert isinstance(loaded.proposer, MedusaProposer)
    assert loaded.proposer.config.paths == spec.proposer.config.paths
    state = spec.proposer.heads.state_dict()
    found = loaded.proposer.heads.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    inputs = prompts(6, 9)
    expected = generate(base, inputs, do_sample=False, max_new_tokens=8)[0]
    assert torch.equal(generate(loaded, inputs, do_sample=False, max_new_tokens=8)[0], expected)


@pytest.mark.parametrize("name", ["org/base", "", "/home/me/base", "here"])
def test_saved_folder_appears_whole_for_everybody_without_local_paths(tmp_path, monkeypatch, name):
    base = build_model("llama")
    base.config._name_or_path = name
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    seen = []
    rename = Path.rename
    monkeypatch.setattr(
        Path,
        "rename",
        lambda path, to: (seen.append(sorted(p.name for p in path.iterdir())), rename(path, to)),
    )
    with_heads(base).save_pretrained("new")
    assert seen == [["README.md", "config.json", "medusa_lm_head.safetensors"]]
    assert {path.stat().st_mode & 0o777 for path in Path("new").iterdir()} == {0o644}
    config = json.loads(Path("new/config.json").read_text())
    assert config.get("base_model_name_or_path") == ("org/base" if "org" in name else None)


def with_eagle(base, kind):
    config = EagleConfig.from_model_config(
        base.config, kind=kind, draft_vocab_size=40 if kind == "eagle3" else None
    )
    heads = EagleHeads(config)
    heads.init_weights_(generator=torch.Generator().manual_seed(0))
    if heads.draft_columns is not None:
        heads.set_draft_columns_(torch.arange(3, 83, 2))
    return SpecModel(base, EagleProposer(heads.eval(), target=base, depth=3))


@pytest.fixture(scope="module")
def deep_base():
    return build_model("llama", num_hidden_layers=7, head_dim=10)


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_saved_eagle_heads_are_loaded(deep_base, tmp_path, kind):
    spec = with_eagle(deep_base, kind)
    spec.save_pretrained(tmp_path)
    loaded = SpecModel.from_pretrained(deep_base, tmp_path)
    assert loaded.proposer.heads.config == spec.proposer.heads.config
    state = spec.proposer.heads.state_dict()
    found = loaded.proposer.heads.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    card = (tmp_path / "README.md").read_text()
    assert ("| hidden states read | 2, 3, 4 (0 is the embeddings) |" in card) is (kind == "eagle3")


def test_static_tree_is_saved_with_eagle_heads(deep_base, tmp_path):
    heads = with_eagle(deep_base, "eagle3").proposer.heads
    spec = SpecModel(deep_base, EagleProposer(heads, target=deep_base, tree=[2, 1]))
    spec.save_pretrained(tmp_path)
    loaded = SpecModel.from_pretrained(deep_base, tmp_path)
    assert loaded.proposer.config.paths == ((0,), (1,), (0, 0), (1, 0))
    assert "| tree | 4 nodes, not counting the root |" in (tmp_path / "README.md").read_text()
    other = SpecModel.from_pretrained(deep_base, tmp_path, heads_kwargs={"tree": [3]})
    assert other.proposer.config.paths == ((0,), (1,), (2,))


def test_eagle_heads_are_saved_without_what_the_base_has_too(deep_base, tmp_path):
    config = EagleConfig.from_model_config(deep_base.config, kind="eagle")
    heads = EagleHeads(replace(config, has_own_embeddings=True))
    heads.init_weights_(embeddings=deep_base.get_input_embeddings().weight)
    SpecModel(deep_base, EagleProposer(heads, target=deep_base)).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert "embed_tokens.weight" not in file.keys()  # noqa: SIM118  # no dict


@pytest.mark.parametrize(("heads", "name"), [("ngram", "NgramProposer"), (None, "None")])
def test_proposer_without_heads_cannot_be_saved(tmp_path, heads, name):
    spec = SpecModel.from_pretrained(shared_model("llama"), heads)
    words = rf"proposer is {name}, which has no heads to save.*draft model is saved"
    with pytest.raises(OptionError, match=words):
        spec.save_pretrained(tmp_path)
    with pytest.raises(OptionError, match=words):
        spec.push_to_hub("me/heads")
    assert list(tmp_path.iterdir()) == []


def test_pushed_eagle_heads_are_their_two_files_and_a_card(deep_base, tmp_path, monkeypatch):
    with running_hub(tmp_path, monkeypatch) as hub:
        with_eagle(deep_base, "eagle3").push_to_hub("me/heads")
    assert hub.commits["me/heads"].keys() == {"README.md", "config.json", "model.safetensors"}
    assert '"me/heads"' in hub.commits["me/heads"]["README.md"].decode()


@pytest.mark.parametrize("is_local", [True, False])
def test_pushed_files_are_the_heads_and_a_card_without_local_paths(tmp_path, monkeypatch, is_local):
    base = build_model("llama")
    base.config._name_or_path = str(tmp_path) if is_local else "org/base"
    spec = with_heads(base)
    with running_hub(tmp_path, monkeypatch) as hub:
        address = spec.push_to_hub("me/heads", private=True, token="hf_secret")
    assert address.startswith(f"{hub.endpoint}/me/heads/commit/")
    (created,) = hub.created
    assert (created["organization"], created["name"]) == ("me", "heads")
    assert created.get("visibility", created.get("private")) in {"private", True}
    assert hub.tokens == {"Bearer hf_secret"}
    files = hub.commits["me/heads"]
    assert files.keys() == {"README.md", "config.json", "medusa_lm_head.safetensors"}
    assert '"me/heads"' in files["README.md"].decode()
    assert str(tmp_path).encode() not in b"".join(files.values())
    name = json.loads(files["config.json"]).get("base_model_name_or_path")
    assert name == (None if is_local else "org/base")
    assert ("base_model:" in files["README.md"].decode()) is not is_local


def test_formats_that_name_their_base_are_not_pushed_with_its_path(tmp_path, monkeypatch):
    base = build_model("llama")
    base.config._name_or_path = str(tmp_path)
    with running_hub(tmp_path, monkeypatch) as hub:
        with pytest.raises(CheckpointError, match="whose name config"):
            with_heads(base).push_to_hub("me/heads", format="tgi")
        assert not hub.commits
        base.config._name_or_path = "org/base"
        with_heads(base).push_to_hub("me/heads", format="tgi")
    config = json.loads(hub.commits["me/heads"]["config.json"])
    assert config["base_model_name_or_path"] == "org/base"
