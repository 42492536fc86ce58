"""JSON of whatever content, and files that are whole or not there."""

import json
import os
import re
import stat
from pathlib import Path

import pytest

import speclm
from speclm.files.atomic import (
    MAX_LEVELS,
    append_line,
    cache_folder,
    folder_written_whole,
    load_json,
    read_json,
    write_file,
    write_json,
)
from speclm.files.atomic import written_together as together

PACKAGE = Path(speclm.__file__).parent
WRITES = re.compile(r"write_text|write_bytes|mkstemp|NamedTemporary|fdopen|open\([\"'][wax+]")


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield 0o640
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10**6,
        "[" * (MAX_LEVELS + 1) + "]" * (MAX_LEVELS + 1),
        '{"a":' * 200 + "1" + "}" * 200,
        "9" * 5000,
        '{"a": ' + "1" * 5000 + "}",
        '"\\ud800"',
        '{"\\uD800": 1}',
        "{",
        "",
        "\x00",
        "\ufeff{}",
    ],
)
def test_json_that_python_cannot_handle_is_a_value_error(text):
    with pytest.raises(ValueError, match=r"."):
        load_json(text)


def test_json_of_any_content_is_taken():
    assert [load_json(text) for text in ("1", '"ab"', "null", "[]")] == [1, "ab", None, []]
    nested = "[" * MAX_LEVELS + "]" * MAX_LEVELS
    assert load_json(nested)[0][0]
    assert load_json('{"a": "\\ud83d\\ude00", "b": Infinity}') == {"a": "😀", "b": float("inf")}


def test_files_that_are_no_text_or_not_there_raise_two_errors(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match="decode"):
        read_json(tmp_path / "a.json")
    with pytest.raises(OSError, match="No such file"):
        read_json(tmp_path / "b.json")


def test_new_files_have_ordinary_permissions_and_old_ones_keep_theirs(tmp_path, umask):
    path = tmp_path / "b.json"
    write_json(path, {"x": [1, 2.5]})
    assert mode(path) == umask
    path.chmod(0o600)
    write_json(path, {"x": [3]})
    assert mode(path) == 0o600
    assert json.loads(path.read_text()) == {"x": [3]}
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_file(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"


def test_what_cannot_be_written_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "b.json"
    write_json(path, {"x": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"x": object()})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"x": 2})
    assert json.loads(path.read_text()) == {"x": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_line_is_appended_to_a_file_without_line_break(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("a")
    append_line(path, "b\u2028")
    append_line(path, "c")
    assert path.read_text(encoding="utf-8") == "a\nb\u2028\nc\n"


def test_files_and_folders_are_synced_before_and_after_they_appear(tmp_path, monkeypatch):
    synced = []
    real = os.fsync

    def sync(handle):
        synced.append(Path(f"/proc/self/fd/{handle}").readlink())
        real(handle)

    monkeypatch.setattr(os, "fsync", sync)
    write_file(tmp_path / "a", b"")
    assert [path.parent for path in synced] == [tmp_path, tmp_path.parent]
    synced.clear()
    with together(tmp_path / "new", last="b") as aside:
        (aside / "a").write_text("a")
        (aside / "b").write_text("b")
    assert synced == [aside / "a", aside / "b", aside, tmp_path]


@pytest.mark.parametrize("is_new", [True, False])
def test_files_of_a_folder_appear_together(tmp_path, umask, monkeypatch, is_new):
    folder = tmp_path / "a" / "folder"
    if not is_new:
        folder.mkdir(parents=True)
        (folder / "other").write_text("stays")
        (folder / "a").write_text("old")
        (folder / "a").chmod(0o604)
    replaced = []
    replace = Path.replace
    monkeypatch.setattr(
        Path, "replace", lambda path, to: (replaced.append(to.name), replace(path, to))
    )
    with together(folder, last="config") as aside:
        for name in ("config", "a", "z"):
            (aside / name).write_text("new")
            (aside / name).chmod(0o600)
        assert folder.exists() is not is_new
    found = {path.name: (path.read_text(), mode(path)) for path in folder.iterdir()}
    expected = dict.fromkeys(("a", "config", "z"), ("new", umask))
    if not is_new:
        expected |= {"a": ("new", 0o604), "other": ("stays", umask)}
    assert found == expected
    assert replaced == ([] if is_new else ["a", "z", "config"])
    assert mode(folder) == 0o750
    assert [path.name for path in folder.parent.iterdir()] == ["folder"]


@pytest.mark.parametrize("is_new", [True, False])
def test_a_block_that_fails_leaves_nothing(tmp_path, is_new):
    folder = tmp_path / "folder"
    if not is_new:
        folder.mkdir()
        (folder / "a").write_text("old")

    def interrupt():
        with together(folder, last="a") as aside:
            (aside / "a").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert [path.name for path in tmp_path.rglob("*")] == ([] if is_new else ["folder", "a"])


def test_all_of_speclm_writes_its_files_here_but_for_rows_that_are_appended():
    modules = {
        path.relative_to(PACKAGE).as_posix(): path.read_text() for path in PACKAGE.rglob("*.py")
    }
    writers = sorted(name for name, text in modules.items() if WRITES.search(text))
    assert writers == ["data/shards.py", "files/atomic.py"]


def test_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SPECLM_CACHE", "~/mine")
    assert cache_folder() == Path.home() / "mine"
    monkeypatch.setenv("SPECLM_CACHE", "")
    assert cache_folder() is None
    monkeypatch.delenv("SPECLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "speclm"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == Path.home() / ".cache" / "speclm"

    def no_home():
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", no_home)
    assert cache_folder() is None


def test_tests_never_write_to_the_home():
    assert cache_folder() is not None
    assert Path.home() not in cache_folder().parents


def test_folder_is_replaced_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "folder"
    for name in ("first", "second"):
        with folder_written_whole(folder) as aside:
            (aside / "inner").mkdir()
            (aside / "inner" / name).write_text(name)
        assert [path.name for path in folder.rglob("*") if path.is_file()] == [name]

    def fail():
        with folder_written_whole(folder) as aside:
            (aside / "third").write_text("third")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["second"]
    assert list(tmp_path.iterdir()) == [folder]
