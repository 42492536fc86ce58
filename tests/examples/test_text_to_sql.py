import importlib
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from speclm import plots
from speclm.demo import assets

ROOT = Path(__file__).parents[2]


@pytest.fixture
def case(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    threads = torch.get_num_threads()
    yield importlib.import_module("text_to_sql")
    torch.set_num_threads(threads)


@pytest.fixture
def report(case):
    return sys.modules["sql_report"]


@pytest.fixture
def refused(case, tmp_path, capsys):
    """Return what a run prints that ends with an error, before anything is loaded."""

    def run(*options):
        assert case.main(["--out", str(tmp_path / "out"), *map(str, options)]) == 2
        return capsys.readouterr().err

    return run


def test_case_is_run_and_goes_on_where_it_ended(case, tmp_path, capsys):
    out = tmp_path / "out"
    sizes = ("--num-rows", "6", "--num-prompts", "3", "--epochs", "1", "--max-new-tokens", "48")
    options = ["--out", str(out), *sizes, "--fine-tune", "--train", "medusa", "--bundled", "draft"]
    assert case.main(options) == 0
    printed = capsys.readouterr().out
    assert [line.split()[2:4] for line in printed.splitlines() if line.startswith("$ speclm")] == [
        ["data", "convert"],
        ["data", "convert"],
        ["data", "distill"],
        ["train", "medusa"],
    ]
    assert f"--base {out / 'base'}" in printed
    found = json.loads((out / "report" / "report.json").read_text())
    names = ["regular generation", "medusa, trained here", "draft, bundled"]
    assert [each["name"] for each in found["measured"]] == names
    assert [each["num_identical"] for each in found["measured"]] == [3, 3, 3]

    first = (out / "calls.jsonl").read_text()
    (out / "report" / "report.json").unlink()
    assert case.main(options) == 0
    assert "$ speclm" not in capsys.readouterr().out
    assert json.loads((out / "report" / "report.json").read_text()) == found
    assert (out / "calls.jsonl").read_text() == first

    assert case.main([*options, "--num-rows", "7"]) == 2
    assert "num_rows=6, expected 7; name another folder" in capsys.readouterr().err


def test_rows_that_are_held_out_are_not_trained_on(case, tmp_path, capsys):
    held_out = assets()["prompts"] / "sql_case.jsonl"
    options = ["--rows", str(held_out), "--out", str(tmp_path / "out"), "--num-rows", "2"]
    assert case.main(options) == 2
    printed = capsys.readouterr()
    assert "450 rows are left out, because their prompts are held out" in printed.out
    assert "has 0 rows to train on, expected 2" in printed.err


def test_a_failed_start_does_not_bind_the_folder(case, refused, tmp_path):
    assert "has 300 rows to train on, expected 301; pass more" in refused("--num-rows", "301")
    assert "has 450 rows, expected 451" in refused("--num-prompts", "451")
    assert (tmp_path / "out" / "rows.jsonl").exists()


def test_bad_options_and_files_are_named(refused, tmp_path):
    assert "--train has 'mamba', expected some of" in refused("--train", "mamba")
    assert "name no heads" in refused("--train", "none", "--bundled", "none")
    assert "--bundled is 'draft' with --base" in refused("--base", "x", "--bundled", "draft")
    assert "--num-prompts" in refused("--num-prompts", "1")
    assert "--epochs" in refused("--epochs", "0")
    assert "missing.jsonl cannot be read" in refused("--rows", tmp_path / "missing.jsonl")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    assert "holds other files, expected a new folder" in refused()
    (tmp_path / "out" / "settings.json").write_text('{"editor.tabSize": 4}')
    assert "settings.json is not of this example and version; name another --out" in refused()
    (tmp_path / "out" / "settings.json").write_text("[1]")
    assert "settings.json cannot be read" in refused()


def test_missing_packages_are_named_with_their_extras(case, refused, monkeypatch):
    monkeypatch.setattr(case, "find_spec", lambda _: None)
    assert "'speclm[train]'" in refused("--fine-tune")
    monkeypatch.setattr(plots, "find_spec", lambda _: None)
    assert "'speclm[plots]'" in refused()


def test_interruption_says_how_to_go_on(case, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(case, "app", lambda *_, **__: 130)
    assert case.main(["--out", str(tmp_path / "out")]) == 130
    assert "the same command goes on" in capsys.readouterr().err


def measured(report):
    return [
        report.Measured("regular generation", [0.1 * n for n in range(1, 12)], 11, 0, 0),
        report.Measured("medusa, trained here", [0.05 * n for n in range(1, 12)], 11, 40, 50),
    ]


def test_table_has_latencies_next_to_the_published_ones(report):
    lines = report.table(measured(report)).splitlines()
    assert lines[2] == "| regular generation | 600 | 1000 | | | | |"
    assert lines[3] == "| medusa, trained here | 300 | 500 | 2.00 | 2.00 | 2.25 | 11 of 11 |"
    assert lines[5].startswith("| published: Zephyr 7B, Medusa heads | 530 | 800 | 1.79 | 1.60 |")


def test_charts_are_drawn(report):
    for chart in (report.latency_chart, report.cumulative_chart):
        image = Image.open(io.BytesIO(chart(measured(report))))
        assert image.format == "PNG"
        assert len(set(image.convert("L").get_flattened_data())) > 10


def test_chunks_of_calls_are_joined(report):
    one, _ = measured(report)
    both = report.joined([one, one])
    assert (len(both.seconds), both.num_identical) == (22, 22)
