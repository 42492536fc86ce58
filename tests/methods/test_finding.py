"""What `heads` stands for; downloads are tested with the hub, refusals with each method's files."""

import json

import pytest
from torch import nn

from speclm.demo.bundle import assets
from speclm.errors import CheckpointError, OptionError, UnknownNameError
from speclm.methods.finding import find_heads


def test_objects_that_no_method_takes_are_refused():
    with pytest.raises(OptionError, match=r"heads is a Linear, expected .*goes into its proposer"):
        find_heads(nn.Linear(2, 2))


def test_names_folders_and_misspelt_names_are_told_apart(tmp_path):
    assert find_heads("lookup").method.name == "lookup"
    assert find_heads(assets()["block"]).method.name == "block"
    with pytest.raises(UnknownNameError, match="did you mean 'lookup'"):
        find_heads("lokup")
    with pytest.raises(OptionError, match="is a folder and"):
        find_heads(tmp_path, {"revision": "v2"})
    (tmp_path / "file").write_text("")
    with pytest.raises(UnknownNameError, match="is a file, expected a folder"):
        find_heads(tmp_path / "file")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architectures": ["MLPSpeculatorPreTrainedModel"]}, "heads of an MLP speculator"),
        ({"speculators_model_type": "peagle"}, "heads of P-EAGLE"),
        ({"speculators_model_type": "mtp"}, r"multi-token prediction \(MTP\)"),
        ({"model_type": "muse_glimmer_assistant"}, "an assistant of another family than Gemma 4"),
    ],
)
def test_heads_of_methods_that_speclm_lacks_are_named(tmp_path, config, words):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words):
        find_heads(tmp_path)
