import io
import json
import sys
from pathlib import Path

import pytest

from speclm.cli._files import (
    positive_numbers,
    prepare_file,
    read_chats,
    read_prompt,
    read_prompts,
    require_folder_to_write,
)
from speclm.errors import DataError, OptionError


def at_terminal(monkeypatch, answer):
    """Have somebody at a terminal answer questions."""
    asked = []
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    confirm = lambda text, **_: asked.append(text) or answer  # noqa: E731
    monkeypatch.setattr("speclm.cli._files.typer.confirm", confirm)
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


def test_folders_where_nothing_can_be_written_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match=r"--out '.*/file/out' cannot be written"):
        prepare_file("--out", tmp_path / "file" / "out")
    with pytest.raises(OptionError, match=r"--out '.*/file/out' cannot be written to"):
        require_folder_to_write("--out", tmp_path / "file" / "out")


def test_folder_that_can_be_written_to_is_left_as_it_was(tmp_path):
    require_folder_to_write("--out", tmp_path / "a" / "b")
    require_folder_to_write("--out", tmp_path)
    assert list(tmp_path.iterdir()) == []


PROMPTS = [
    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]},
    {"prompt": "a\u2028b\x85c"},  # these separators end no line
]


def as_input(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_prompts_come_from_a_file_or_standard_input_without_their_answer(tmp_path, monkeypatch):
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in PROMPTS) + "\n\n"
    path = tmp_path / "prompts.jsonl"
    path.write_text(text, "utf-8")
    as_input(monkeypatch, text.encode())
    expected = [[{"role": "user", "content": "2 + 2?"}], "a\u2028b\x85c"]
    assert read_prompts(path) == read_prompts(Path("-")) == expected


def test_bad_prompts_are_named_with_the_line(tmp_path, monkeypatch):
    path = tmp_path / "bad.jsonl"
    for text, message in {
        "": "--prompts .* is empty",
        "not json": ":1: expected a JSON object",
        '{"text": "a"}': ':1: expected "prompt", a string, or "messages"',
        '{"messages": [1]}': ':1: expected "prompt", a string, or "messages"',
        '{"prompt": ""}': ":1: the prompt is empty",
        '{"messages": []}': ":1: no message that asks",
        '{"messages": [{"role": "assistant", "content": "4"}]}': ":1: no message that asks",
    }.items():
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_prompts(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(tmp_path / "none.jsonl")
    as_input(monkeypatch, b"{")
    with pytest.raises(DataError, match="standard input:1: expected a JSON object"):
        read_prompts(Path("-"))


def test_one_prompt_comes_from_an_option_a_file_or_standard_input(tmp_path, monkeypatch):
    (tmp_path / "prompt").write_text("a")
    as_input(monkeypatch, b"b")
    found = [read_prompt("c", None), read_prompt(None, tmp_path / "prompt")]
    assert [*found, read_prompt(None, Path("-"))] == ["c", "a", "b"]


def test_input_that_is_closed_or_no_text_is_named(tmp_path, monkeypatch):
    (tmp_path / "prompt").write_bytes(b"\xff\xfe")
    with pytest.raises(OptionError, match=r"--file .* cannot be read .*UTF-8"):
        read_prompt(None, tmp_path / "prompt")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(OptionError, match="--prompts is '-' and standard input is closed"):
        read_prompts(Path("-"))


def test_numbers_of_rows_are_positive():
    assert positive_numbers("1,16") == [1, 16]
    for text in ("", "1,,2", "-1", "²", "1" * 5000):
        with pytest.raises(OptionError, match="--batch has"):
            positive_numbers(text)


def test_chats_keep_the_answers_that_prompts_lose(tmp_path):
    path, asked = tmp_path / "chats.jsonl", {"role": "user", "content": "1"}
    chat = [asked, {"role": "assistant", "content": "2"}]
    path.write_text(json.dumps({"messages": chat}) + '\n{"prompt": "3"}')
    assert read_chats(path) == [chat, "3"]
    assert read_prompts(path) == [[asked], "3"]
