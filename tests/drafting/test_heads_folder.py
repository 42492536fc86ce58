"""What all folders of heads have in common; each method's own files are tested with it."""

from pathlib import Path

import pytest
import torch

from speclm.cards import GENERATED_MARK
from speclm.drafting.heads_folder import (
    Destination,
    hub_id,
    read_choices,
    require_folder,
    require_same_tensors,
)
from speclm.errors import CheckpointError
from tests.models import shared_model


def test_names_of_folders_are_not_published(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    assert hub_id("org/base") == "org/base"
    for name in (None, "", "/home/me/base", "here", "../base"):
        assert hub_id(name) is None


def test_cards_that_somebody_wrote_are_kept(tmp_path):
    destination = Destination(tmp_path, shared_model("llama"))
    card = tmp_path / "README.md"
    assert destination.card("new") == "new"
    card.write_text(f"old {GENERATED_MARK}")
    assert destination.card("new") == "new"
    card.write_text("my own words")
    assert destination.card("new") is None


def test_tensors_that_differ_in_a_bit_or_a_name_are_refused(tmp_path):
    one = {"a": torch.ones(2)}
    require_same_tensors(tmp_path, one, {"a": torch.ones(2)})
    for other in ({"a": torch.ones(3)}, {"a": torch.zeros(2)}, {}, one | {"b": torch.ones(1)}):
        with pytest.raises(CheckpointError, match="read back differ from what was written"):
            require_same_tensors(tmp_path, one, other)


def test_stored_trees_and_folders_are_checked(tmp_path):
    assert read_choices(tmp_path, {}) is None
    assert read_choices(tmp_path, {"speclm": {"choices": [[0], [0, 1]]}}) == ((0,), (0, 1))
    with pytest.raises(CheckpointError, match="choices is no tree"):
        read_choices(tmp_path, {"speclm": {"choices": [[0, 0]]}})
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="found a file, expected a folder"):
        require_folder(tmp_path / "file")
