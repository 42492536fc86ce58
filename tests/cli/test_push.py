import importlib

import pytest

from speclm.errors import OptionError
from tests.model.hub import running_hub
from tests.model.test_saving import with_heads
from tests.models import shared_model

push_module = importlib.import_module("speclm.cli.push")


@pytest.fixture
def folder(tmp_path):
    with_heads(shared_model("llama")).save_pretrained(tmp_path / "heads")
    return tmp_path / "heads"


def test_dry_run_lists_files_and_prints_the_card_and_sends_nothing(run, folder, monkeypatch):
    monkeypatch.setattr(push_module, "publish", None)
    result = run("push", str(folder), "me/heads", "--dry-run", "--base", "org/base")
    assert result.exit_code == 0
    for text in ("README.md", "medusa_lm_head.safetensors", "# Medusa heads for org/base"):
        assert text in result.output


def test_heads_are_uploaded_as_the_options_say(run, folder, tmp_path, monkeypatch):
    (folder / "README.md").write_text("# My own")
    with running_hub(tmp_path / "hub", monkeypatch) as hub:
        flags = ("--private", "--create-pr", "--commit-message", "More heads")
        result = run("push", str(folder), "me/heads", *flags)
    assert f"uploaded to {hub.endpoint}/me/heads/discussions/1" in result.output
    assert "the card is your own" in result.output
    assert hub.commits["me/heads"]["README.md"] == b"# My own"


def test_folder_without_heads_is_named(run, tmp_path):
    with pytest.raises(OptionError, match="holds no heads"):
        run("push", str(tmp_path), "me/heads")
