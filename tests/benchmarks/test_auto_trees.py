import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def auto_trees(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("auto_trees")
    sys.modules.pop("auto_trees")


def test_every_tree_is_recorded_beside_plain_decoding(auto_trees, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.jsonl"
    arguments = ["--heads", "medusa", "--n", "1", "--tune-n", "1", "--batch", "1"]
    monkeypatch.setattr(auto_trees, "LEAST_SHARE", 0.0)
    monkeypatch.setattr(auto_trees, "SIZES", (8,))
    monkeypatch.setattr(
        "sys.argv", ["auto_trees.py", *arguments, "--max-new-tokens", "16", "--out", str(out)]
    )

    auto_trees.main()

    records = [json.loads(line) for line in out.read_text().splitlines()]
    methods = [record["settings"]["method"] for record in records]
    assert methods == ["own", "chain-4", "static-8", "auto"]
    assert all(record["num_identical"] == record["n"] for record in records)
    assert "of the best fixed" in capsys.readouterr().out
