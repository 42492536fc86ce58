"""What all folders of heads have in common; each method's own files are tested with it."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from speclm.cards import GENERATED_MARK
from speclm.drafting.heads_folder import (
    Destination,
    HeadsCheckpoint,
    draft_lists,
    hub_id,
    read_choices,
    read_columns,
    require_folder,
    require_replaceable,
    require_shapes,
    require_whole,
    store_choices,
)
from speclm.errors import CheckpointError
from tests.models import shared_model


@dataclass(frozen=True)
class SharingConfig:
    has_own_embeddings: bool
    has_own_lm_head: bool


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


def test_stored_trees_and_folders_are_checked(tmp_path):
    assert read_choices(tmp_path, {}) is None
    assert read_choices(tmp_path, {"speclm": {"choices": [[0], [0, 1]]}}) == ((0,), (0, 1))
    with pytest.raises(CheckpointError, match="choices is no tree"):
        read_choices(tmp_path, {"speclm": {"choices": [[0, 0]]}})
    with pytest.raises(CheckpointError, match="speclm is a list, expected an object"):
        read_choices(tmp_path, {"speclm": [1]})
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="found a file, expected a folder"):
        require_folder(tmp_path / "file")


def test_other_models_are_not_replaced(tmp_path):
    require_replaceable(tmp_path / "new", is_mine=lambda _: False, owner="toys")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="of another model, expected none or those of toys"):
        require_replaceable(tmp_path, is_mine=lambda _: True, owner="toys")
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    require_replaceable(tmp_path, is_mine=lambda source: "a" in source.files, owner="toys")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"read in place of model\.safetensors"):
        require_replaceable(tmp_path, is_mine=lambda _: True, owner="toys")


def test_tensors_that_do_not_fit_their_config_are_named():
    path, keys = Path("m"), {"a": "model.a", "b": "model.b"}
    require_shapes(path, {"a": torch.ones(2)}, {"a": (2,)}, keys, owner="toys")
    for tensors, words in (
        ({}, "key 'a' is missing, found 0 other parts of toys"),
        ({"a": torch.ones(3)}, r"'model.a' is torch.float32 of shape \[3\], expected"),
        ({"a": torch.ones(2, dtype=torch.int8)}, "'model.a' is torch.int8"),
        ({"a": torch.ones(2), "b": torch.ones(2)}, "found key 'model.b', expected none such"),
    ):
        with pytest.raises(CheckpointError, match=words):
            require_shapes(path, tensors, {"a": (2,)}, keys, owner="toys")
    with pytest.raises(CheckpointError, match=r"tensor 'a' has shape \(3,\), expected \(2,\)"):
        require_whole(path, {"a": torch.ones(3)}, {"a": (2,)})


def test_copies_of_the_targets_matrices_are_found_in_any_dtype():
    matrix = torch.arange(6.0).view(3, 2)
    config = SharingConfig(has_own_embeddings=True, has_own_lm_head=True)
    tensors = {"embed_tokens.weight": matrix.bfloat16(), "lm_head.weight": matrix + 1}
    checkpoint = HeadsCheckpoint(config, tensors)
    shared = checkpoint.share(embeddings=matrix, lm_weight=matrix)
    assert set(shared.tensors) == {"lm_head.weight"}
    assert shared.config == SharingConfig(has_own_embeddings=False, has_own_lm_head=True)
    for other in (matrix[:2], matrix.to("meta"), None):
        assert checkpoint.share(embeddings=other).config == config


COLUMNS = torch.tensor([0, 3, 4, 11, 19])


def test_lists_read_back_as_the_tokens_they_stand_for():
    lists = draft_lists(COLUMNS, vocab_size=20)
    assert lists["d2t"].tolist() == [0, 2, 2, 8, 15]
    found = read_columns(Path("m"), lists["d2t"], lists["t2d"], vocab_size=20, num_columns=5)
    assert torch.equal(found, COLUMNS)
    whole = draft_lists(None, vocab_size=3)
    assert (whole["d2t"].tolist(), whole["t2d"].tolist()) == ([0, 0, 0], [True] * 3)


@pytest.mark.parametrize(
    ("offsets", "is_drafted", "words"),
    [
        ([0, 2, 2, 8], None, r"'d2t' is torch.int64 of shape \[4\], expected.*\[5\]"),
        ([0, 2, 2, 8, 16], None, "draft token 4 to 20, expected a token from 0 to 19"),
        ([0, 2, 1, 8, 15], None, "draft tokens 1 and 2 to 3 and 3, expected increasing tokens"),
        ([0, 2, 2, 8, 15], [True] * 20, "'t2d' holds True for token 1, expected False"),
        ([0, 2, 2, 8, 15], [True] * 19, r"'t2d' is torch.bool of shape \[19\]"),
    ],
)
def test_lists_that_contradict_are_refused(offsets, is_drafted, words):
    drafted = None if is_drafted is None else torch.tensor(is_drafted)
    with pytest.raises(CheckpointError, match=words):
        read_columns(Path("m"), torch.tensor(offsets), drafted, vocab_size=20, num_columns=5)


def test_stored_tree_replaces_the_old_one_and_keeps_the_rest(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"a": 1, "speclm": {"choices": [[0]], "b": 2}}')
    store_choices(tmp_path, ((0,), (1,)), notes={"tau": 2.5}, check=lambda _: None)
    own = {"choices": [[0], [1]], "b": 2, "tau": 2.5}
    assert json.loads(path.read_text()) == {"a": 1, "speclm": own}


def test_tree_that_cannot_be_read_back_leaves_the_config_as_it_was(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"a": 1}')

    def check(_):
        raise CheckpointError("no such heads")

    with pytest.raises(CheckpointError, match="no such heads"):
        store_choices(tmp_path, ((0,),), notes={}, check=check)
    assert path.read_text() == '{"a": 1}'
    path.unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: no JSON can be read"):
        store_choices(tmp_path, ((0,),), notes={}, check=check)
