"""How MTP layers are asked for."""

import pytest

from speclm import SpecModel
from speclm.errors import OptionError
from speclm.methods.mtp.checkpoint import find_mtp
from tests.models import build_model


def test_base_without_files_asks_for_a_path_and_options_are_checked(made):
    base = build_model("llama")
    with pytest.raises(OptionError, match=r"names no files.*heads_path"):
        SpecModel.from_pretrained(base, "mtp")
    for options, words in (
        ({"heads_path": "nothing here"}, "no folder that exists nor a hub id"),
        ({"heads_path": made.folder, "widht": 2}, "unknown option 'widht'"),
    ):
        with pytest.raises(OptionError, match=words):
            SpecModel.from_pretrained(base, "mtp", heads_kwargs=options)
    assert find_mtp(made.folder, num_layers=3) is None


def test_options_of_the_base_apply_to_its_layers_and_they_are_not_saved(made, tmp_path):
    (tmp_path / "inner").symlink_to(made.folder)
    spec = SpecModel.from_pretrained(str(tmp_path), "mtp", subfolder="inner")
    assert len(spec.proposer.heads.layers) == 1
    with pytest.raises(OptionError, match="part of the base's own checkpoint"):
        spec.save_pretrained(tmp_path / "heads")
