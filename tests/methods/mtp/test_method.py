"""How MTP layers are asked for."""

import shutil

import pytest
import torch

from speclm import SpecModel
from speclm.drafting.combined import CombinedProposer
from speclm.errors import CheckpointError, OptionError
from speclm.methods.finding import find_heads
from speclm.methods.mtp.checkpoint import find_mtp
from speclm.methods.mtp.proposer import MtpProposerConfig
from speclm.model.exporting import convert_heads
from tests.families.building import build_type
from tests.methods.mtp.mtp_bases import ONE
from tests.model.hub import running_hub
from tests.models import build_model, prompts


def test_base_without_files_asks_for_a_path_and_options_are_checked(made):
    base = build_model("llama")
    with pytest.raises(OptionError, match=r"names no files.*heads_path"):
        SpecModel.from_pretrained(base, "mtp")
    for options, words in (
        ({"heads_path": "nothing here"}, "no folder that exists nor a hub id"),
        ({"heads_path": 3}, "heads_path is 3, expected the folder or hub id"),
        ({"heads_path": made.folder, "revision": "v2"}, "revision 'v2' would have no effect"),
        ({"heads_path": made.folder, "widht": 2}, "unknown option 'widht'"),
    ):
        with pytest.raises(OptionError, match=words):
            SpecModel.from_pretrained(base, "mtp", heads_kwargs=options)
    config = MtpProposerConfig()
    object.__setattr__(config, "repeats_last", "no")  # past the type checks of the tests
    with pytest.raises(OptionError, match="repeats_last is 'no', expected True or False"):
        config.__post_init__()
    assert find_mtp(made.folder, num_layers=3) is None


def test_options_of_the_base_apply_to_its_layers(made, tmp_path):
    (tmp_path / "inner").symlink_to(made.folder)
    spec = SpecModel.from_pretrained(str(tmp_path), "mtp", subfolder="inner")
    assert len(spec.proposer.heads.layers) == 1
    both = SpecModel.from_pretrained(str(tmp_path), ["mtp", "lookup"], subfolder="inner")
    assert isinstance(both.proposer, CombinedProposer)
    with pytest.raises(OptionError, match="part of the base's own files, expected the folder"):
        convert_heads("mtp", tmp_path / "out", to="vllm")


def test_saved_layers_draft_as_before_with_the_tree_that_was_saved(made, tmp_path, monkeypatch):
    tree = [[0], [1], [0, 0]]
    spec = SpecModel.from_pretrained(str(made.folder), "mtp", heads_kwargs={"tree": tree})
    spec.save_pretrained(tmp_path / "saved")
    shutil.copytree(tmp_path / "saved", tmp_path / "org/layers")
    with running_hub(tmp_path, monkeypatch):
        again = SpecModel.from_pretrained(spec.base, "org/layers")
    assert again.proposer.config == spec.proposer.config
    inputs = prompts(7, 4)
    for name, tensor in spec.proposer.heads.state_dict().items():
        assert torch.equal(again.proposer.heads.state_dict()[name], tensor)
    said = [each.generate(**inputs, max_new_tokens=9, do_sample=False) for each in (spec, again)]
    assert torch.equal(*said)
    card = (tmp_path / "saved/README.md").read_text()
    assert "# MTP layers" in card
    assert "3 nodes" in card
    assert str(tmp_path) not in card


def test_saved_layers_are_refused_next_to_another_base_and_kept_apart_from_other_models(
    made, tmp_path
):
    spec = SpecModel.from_pretrained(str(made.folder), "mtp")
    spec.save_pretrained(tmp_path / "saved")
    deeper = build_type("glm4_moe", {**ONE.settings, "num_hidden_layers": 3})
    with pytest.raises(CheckpointError, match="of a base with 2 layers, expected 3"):
        SpecModel.from_pretrained(deeper, tmp_path / "saved")
    with pytest.raises(CheckpointError, match="weights that are read in place of"):
        spec.save_pretrained(made.folder)
    assert find_heads(made.folder).method.name == "draft_model"
    assert find_heads(tmp_path / "saved").method.name == "mtp"
    (tmp_path / "saved/config.json").unlink()  # known by the keys
    assert SpecModel.from_pretrained(spec.base, tmp_path / "saved").proposer.config.paths is None
    with pytest.raises(OptionError, match="unknown option 'heads_path'"):
        SpecModel.from_pretrained(
            spec.base, tmp_path / "saved", heads_kwargs={"heads_path": made.folder}
        )
