import sys
from pathlib import Path

import pytest

from benchmarks.decode import rules
from benchmarks.trees import tau
from speclm.bench import read_records
from tests.benchmarks.eagle_folders import write_eagle_folders

ROOT = Path(__file__).parents[3]
FIXED = ["--set", "sql", "--n", "1", "--max-new-tokens", "12", "--threads", "1"]


def run(module, monkeypatch, path, *arguments):
    command = ["script", *FIXED, "--out", str(path), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    module.main()
    return read_records(path)


def test_every_drafter_is_measured_with_equal_numbers_of_nodes(monkeypatch, tmp_path):
    heads, path = write_eagle_folders(tmp_path / "heads"), tmp_path / "tau.jsonl"
    options = ["--nodes", "8", "--heads", str(heads), "--settings"]
    run(tau, monkeypatch, path, *options, "greedy", "--drafters", "draft", "eagle")
    sampled = [*options, "t1.0", "--drafters", "medusa", "eagle3"]
    records = run(tau, monkeypatch, path, *sampled)
    cells = [tuple(r["settings"][key] for key in ("setting", "drafter", "method")) for r in records]
    assert cells == [
        ("greedy", "draft", "top-k"),
        ("greedy", "eagle", "top-k"),
        *(
            ("t1.0", name, method)
            for name in ("medusa", "eagle3")
            for method in ("top-k", "coupled")
        ),
    ]
    assert {record["settings"]["num_nodes"] for record in records} == {8}
    assert all(record["num_identical"] == 1 for record in records)
    assert records[0]["tau"] > 1.5
    assert run(tau, monkeypatch, path, *sampled) == records


def test_rules_take_eagle_heads(monkeypatch, tmp_path):
    monkeypatch.setattr(rules, "TREE_NODES", (8,))
    for name in ("CHAIN_METHODS", "TREE_METHODS"):  # what is exact, and what draws
        monkeypatch.setattr(rules, name, getattr(rules, name)[1::2])
    heads = write_eagle_folders(tmp_path / "heads")
    options = ["--drafter", "eagle3", "--heads", str(heads)]
    records = run(rules, monkeypatch, tmp_path / "rules.jsonl", *options)
    assert [record["settings"]["method"] for record in records] == [
        "coupled",
        "block",
        "coupled",
        "traversal",
    ]
    assert {record["settings"]["drafter"] for record in records} == {"eagle3"}
    exact = [record for record in records if record["settings"]["rule"] == "exact"]
    assert [record["num_identical"] for record in exact] == [1] * 2
    assert all(record["fallbacks"] == [] for record in records)


def test_drafters_that_are_not_known_are_refused(capsys):
    with pytest.raises(SystemExit):
        tau.parse_arguments(["--drafters", "hydra"])
    assert "eagle3" in capsys.readouterr().err
