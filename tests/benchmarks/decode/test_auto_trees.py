import json
from pathlib import Path

from benchmarks.decode import auto_trees

ROOT = Path(__file__).parents[3]


def test_every_tree_is_recorded_beside_plain_decoding(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.jsonl"
    arguments = ["--heads", "medusa", "--n", "1", "--tune-n", "1", "--batch", "1"]
    monkeypatch.setattr(auto_trees, "MIN_SHARE", 0.0)
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
