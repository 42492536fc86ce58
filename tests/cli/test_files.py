import sys
from pathlib import Path

import pytest

from speclm.cli._outputs import prepare_file, require_folder_to_write
from speclm.errors import OptionError


def at_terminal(monkeypatch, answer):
    """Have somebody at a terminal answer questions."""
    asked = []
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    confirm = lambda text, **_: asked.append(text) or answer  # noqa: E731
    monkeypatch.setattr("speclm.cli._outputs.typer.confirm", confirm)
    return asked


def test_last_part_of_a_folder_is_made_without_asking(tmp_path, monkeypatch):
    asked = at_terminal(monkeypatch, answer=False)
    prepare_file("--out", tmp_path / "new" / "out.jsonl")
    assert list(tmp_path.rglob("*")) == [tmp_path / "new"]
    assert asked == []


def test_more_folders_are_made_only_if_somebody_wants_them(tmp_path, monkeypatch):
    path = tmp_path / "a" / "b" / "out.jsonl"
    words = r"'.*/a', which does not exist; .* make '.*/a/b' first"
    with pytest.raises(OptionError, match=words + ", or pass --make-folders"):
        prepare_file("--out", path, flag="--make-folders")  # there is no terminal
    asked = at_terminal(monkeypatch, answer=False)
    with pytest.raises(OptionError, match=words + "$"):
        prepare_file("--save", path)
    assert asked == [f"make 2 folders, from {tmp_path / 'a'} on?"]
    assert list(tmp_path.iterdir()) == []
    at_terminal(monkeypatch, answer=True)
    prepare_file("--out", path)
    prepare_file("--out", tmp_path / "c" / "d" / "out.jsonl", makes=True)
    assert (tmp_path / "a" / "b").is_dir()
    assert (tmp_path / "c" / "d").is_dir()


def test_closed_input_answers_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(OptionError, match="does not exist"):
        prepare_file("--out", tmp_path / "a" / "b" / "out.jsonl")


@pytest.mark.parametrize("path", [".", "/dev/null"])
def test_folders_and_devices_are_no_files(path):
    with pytest.raises(OptionError, match="is a folder or a device, expected a file"):
        prepare_file("--out", Path(path))


def test_places_where_nothing_can_be_written_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match=r"--out '.*/file/out' cannot be written"):
        prepare_file("--out", tmp_path / "file" / "out")
    with pytest.raises(OptionError, match=r"--out '.*/file/out' cannot be written to"):
        require_folder_to_write("--out", tmp_path / "file" / "out")


def test_folder_that_can_be_written_to_is_left_as_it_was(tmp_path):
    require_folder_to_write("--out", tmp_path / "a" / "b")
    require_folder_to_write("--out", tmp_path)
    assert list(tmp_path.iterdir()) == []
