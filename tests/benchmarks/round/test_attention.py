from pathlib import Path

import pytest

from benchmarks.round import attention as script
from speclm.bench import read_records
from speclm.errors import MeasurementError

ROOT = Path(__file__).parents[3]
SIZES = ["--layers", "1", "--hidden", "256", "--prefix", "9", "--batch", "2", "--pairs", "2"]


def test_forwards_and_kept_paths_are_timed_and_recorded(tmp_path, capsys):
    path = tmp_path / "attention.jsonl"
    script.main([*SIZES, "--dtype", "float32", "--groups", "1", "4", "--out", str(path)])
    records = read_records(path)
    names = ["tree_forward_ratio", "tree_forward", "dense_forward", "keep_path"]
    assert [record["benchmark"] for record in records] == names * 2
    assert [record["settings"]["groups"] for record in records] == [1] * 4 + [4] * 4
    assert all(record["median"] > 0 and record["n"] == 2 for record in records)
    assert capsys.readouterr().out.count("times the dense one") == 2


def test_forwards_that_differ_are_not_recorded(tmp_path, monkeypatch):
    right = script.TreeForward.__call__
    monkeypatch.setattr(script.TreeForward, "__call__", lambda self, tree: 2 * right(self, tree))
    path = tmp_path / "attention.jsonl"
    with pytest.raises(MeasurementError, match="logits of the two forwards differ by"):
        script.main([*SIZES, "--dtype", "float32", "--groups", "1", "--out", str(path)])
    assert read_records(path) == []
