import json
from itertools import chain

import pytest

from speclm.data.row_plan import MAX_SHARDS, RowPlan, Shard
from speclm.errors import DataError, OptionError


def row(length=1, turns=1, **keys):
    turn = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a" * length}]
    return json.dumps({"messages": turn * turns, **keys})


@pytest.fixture
def write(tmp_path):
    path = tmp_path / "data.jsonl"

    def write_rows(*rows):
        path.write_bytes("\n".join(rows).encode())
        return path

    return write_rows


def test_batches_hold_rows_of_as_many_and_similarly_long_answers(write):
    rows = [row(3), row(1, turns=2), row(9), row(2), row(8), row(1)]
    plan = RowPlan(write(*rows))
    assert list(plan.batches(2, Shard())) == [[1, 2], [4, 0], [3, 5]]
    assert len(plan) == 6


def test_shards_share_the_batches_of_one(write):
    plan = RowPlan(write(*(row(1 + n * 7 % 50) for n in range(200))))
    whole = list(plan.batches(3, Shard()))
    assert sorted(chain(*whole)) == list(range(200))
    # Batches are cut from 64 times three rows at a time, so that a run goes on through the file.
    assert {place for batch in whole[:64] for place in batch} == set(range(192))
    parts = [list(plan.batches(3, Shard(index, 4))) for index in range(4)]
    assert [batch for index in range(67) for batch in parts[index % 4][index // 4 :][:1]] == whole


def test_rows_are_read_where_they_are(write):
    path = write("\ufeff" + row(id="ä"), "", "  ", row(2, id="b") + "\r", row(3, id="c"))
    plan = RowPlan(path)
    ((last, first),) = plan.read_rows([[2, 0]])
    assert (first.id, first.position, first.where) == ("ä", 0, f"{path}:1")
    assert (last.id, last.position, last.where) == ("c", 2, f"{path}:5")
    assert last.content["messages"][1]["content"] == "aaa"


def test_identity_is_that_of_the_content(write):
    first = RowPlan(write(row(), row(2))).identity()
    assert first == RowPlan(write(row(), row(2))).identity()
    assert first != RowPlan(write(row(), row(3))).identity()
    assert first["rows"] == 2


def test_files_that_cannot_be_used_are_named(write, tmp_path):
    for rows, message in [
        ((row(id="x"), row(2, id="x")), r"jsonl:2: found the id 'x' of an earlier row"),
        (("", " "), r"no rows, expected one"),
        ((row(), "{"), r"jsonl:2: expected a JSON object"),
    ]:
        with pytest.raises(DataError, match=message):
            RowPlan(write(*rows))
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            RowPlan(path)


def test_shards_out_of_range_are_named():
    for index, count, name in [
        (2, 2, "shard"),
        (-1, 1, "shard"),
        (0, MAX_SHARDS + 1, "num_shards"),
    ]:
        with pytest.raises(OptionError, match=rf"^{name} is"):
            Shard(index, count)
