import json

import pytest

from speclm.data.dialogues import Finished
from speclm.data.row_plan import Shard
from speclm.data.shards import (
    MANIFEST,
    ShardFile,
    delete_folder,
    merge_shards,
    open_folder,
    shard_path,
)
from speclm.errors import BusyError, DataError, OptionError

ABOUT = {"speclm": "1", "settings": {"seed": 0, "top_p": 1.0}}


def kept(position, text="é\u2028"):
    messages = [{"role": "assistant", "content": text}]
    return Finished(position, {"id": str(position), "messages": messages}, 5)


def dropped(position, detail=""):
    return Finished(position, None, 2, "empty answer", detail)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.jsonl"


@pytest.fixture
def folder(out):
    return open_folder(out, ABOUT, overwrite=False)


def written(folder, *rows, shard=None):
    with ShardFile(folder, shard or Shard()) as file:
        return file.append(rows)


def test_rows_of_all_shards_become_one_file_in_the_order_of_the_data(folder, out):
    written(folder, kept(3), dropped(0, "why"), shard=Shard(0, 2))
    assert merge_shards(folder, out, num_rows=4, count=2) is None
    written(folder, kept(2), shard=Shard(1, 2))
    assert merge_shards(folder, out, num_rows=4, count=2) is None
    assert not out.exists()
    written(folder, kept(1), shard=Shard(1, 2))
    totals = merge_shards(folder, out, num_rows=4, count=2)
    assert [json.loads(line)["id"] for line in out.read_text().split("\n")[:-1]] == ["1", "2", "3"]
    assert "é\u2028" in out.read_text()  # as it is
    assert (totals.num_rows, totals.num_tokens, totals.dropped) == (3, 17, {"empty answer": 1})
    assert totals.examples == {"empty answer": "row 1: why"}


def test_a_line_written_in_part_is_cut_off_and_its_row_is_not_finished(folder):
    written(folder, kept(0), kept(1))
    path = shard_path(folder, Shard())
    whole = path.read_bytes()
    for cut in (1, 20):  # without its end, and in the middle
        path.write_bytes(whole[:-cut])
        with ShardFile(folder, Shard()) as file:
            assert file.finished == {0}
            assert file.totals.num_rows == 1
            assert [row.position for row in file.append([kept(0), kept(1)])] == [1]
        assert path.read_bytes() == whole


def test_a_shard_has_one_writer(folder):
    with ShardFile(folder, Shard()), pytest.raises(BusyError, match=r"written by another process"):
        ShardFile(folder, Shard())
    written(folder)


@pytest.mark.parametrize(
    "line", [b"{", b"\xff", b"[]", b'{"position": 0}', b'{"position": 0, "tokens": 1, "row": 3}']
)
def test_a_damaged_line_is_named(folder, line):
    path = shard_path(folder, Shard())
    path.write_bytes(line + b"\n")
    with pytest.raises(DataError, match=r"jsonl:1: expected a finished row, found .*delete it"):
        ShardFile(folder, Shard())


def test_rows_that_are_there_twice_or_not_in_the_data_are_errors(folder, out):
    for rows in ([kept(0), kept(0)], [kept(4)]):
        shard_path(folder, Shard()).unlink(missing_ok=True)
        with ShardFile(folder, Shard()) as file:
            for row in rows:
                file.finished.clear()
                file.append([row])
        with pytest.raises(DataError, match=r"there twice, or is none of 2"):
            merge_shards(folder, out, num_rows=2, count=1)


def test_nothing_kept_is_an_error_that_gives_the_reasons(folder, out):
    written(folder, dropped(0), dropped(1, "more"))
    with pytest.raises(DataError, match=r"all 2 rows are dropped.*empty answer: 2 \(row 1\)"):
        merge_shards(folder, out, num_rows=2, count=1)


def test_rows_of_another_run_are_kept_unless_they_are_to_be_replaced(folder, out):
    written(folder, kept(0))
    other = {"speclm": "1", "settings": {"seed": 1, "top_p": 1.0}, "model": "m"}
    with pytest.raises(
        OptionError,
        match=r"differs in settings seed \(0 there, 1 here\); model \(None there, 'm' here\); use",
    ):
        open_folder(out, other, overwrite=False)
    for replace in (False, True):  # rows of the same run are kept anyway
        open_folder(out, ABOUT, overwrite=replace)
        assert shard_path(folder, Shard()).is_file()
    open_folder(out, other, overwrite=True)
    assert [path.name for path in folder.iterdir()] == [MANIFEST]


def test_an_existing_file_is_replaced_only_on_request(out):
    out.write_text("mine")
    with pytest.raises(OptionError, match=r"out.jsonl' exists; name another file, or pass --over"):
        open_folder(out, ABOUT, overwrite=False)
    folder = open_folder(out, ABOUT, overwrite=True)
    assert out.read_text() == "mine"
    open_folder(out, ABOUT, overwrite=False)  # the run that may replace it goes on
    delete_folder(folder, Shard())
    assert not folder.exists()


def test_a_folder_that_another_shard_is_making_is_shared(out, folder):
    (folder / MANIFEST).rename(folder / ".writing-1")  # as before the other one has renamed it
    assert open_folder(out, ABOUT, overwrite=False) == folder
    assert json.loads((folder / MANIFEST).read_text()) == ABOUT


def test_folders_of_somebody_else_are_left_untouched(out):
    folder = out.with_name("out.jsonl.shards")
    folder.mkdir()
    (folder / "letters").write_text("dear")
    for content, message in [(None, "no readable manifest"), ("[1]", "expected an object")]:
        if content:
            (folder / MANIFEST).write_text(content)
        with pytest.raises(DataError, match=message):
            open_folder(out, ABOUT, overwrite=True)
    (folder / MANIFEST).write_text(json.dumps(ABOUT))
    delete_folder(folder, Shard())
    assert [path.name for path in folder.iterdir()] == ["letters"]


def test_files_that_cannot_be_written_are_named(tmp_path, folder, out):
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="cannot be written"):
        open_folder(tmp_path / "file" / "out", ABOUT, overwrite=False)
    shard_path(folder, Shard()).mkdir()
    with pytest.raises(OptionError, match="cannot be written"):
        ShardFile(folder, Shard())
    shard_path(folder, Shard()).rmdir()
    written(folder, kept(0))
    out.mkdir()
    with pytest.raises(OptionError, match="cannot be written"):
        merge_shards(folder, out, num_rows=1, count=1)
