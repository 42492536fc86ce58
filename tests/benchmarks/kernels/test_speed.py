from dataclasses import replace
from pathlib import Path
from time import monotonic

import pytest
import torch

from benchmarks.kernels import bench as measuring
from benchmarks.kernels import dispatch, methods, rows, speed
from benchmarks.kernels.findings import Findings
from speclm.bench import read_records

ROOT = Path(__file__).parents[3]


@pytest.fixture
def bench(tmp_path):
    findings = Findings(monotonic() + 60)
    return measuring.Bench("cpu", tmp_path / "kernels.jsonl", findings, samples=2)


def test_dry_run_records_every_method(tmp_path, capsys):
    path = tmp_path / "kernels.jsonl"
    assert speed.main(["--tiny", "--out", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "0 failures, 0 left out"
    records = read_records(path)
    methods = {r["settings"]["method"] for r in records if r["benchmark"] == "tree_attention"}
    assert methods == {"ours", "flex", "sdpa", "grouped_sdpa", "eager", "deterministic"}
    others = {"copy_rate", "product_rate", "keep_path", "tree_words"}
    assert {record["benchmark"] for record in records} == {"tree_attention", *others}
    assert "goals: " in printed


def test_no_script_has_the_name_of_a_package_that_transformers_imports():
    names = {path.stem for path in (ROOT / "benchmarks").rglob("*.py")}
    assert not names & {"kernels", "triton", "accelerate", "datasets", "peft"}


def test_rows_come_in_order_of_importance_and_are_chosen_by_name():
    found = rows.rows()
    assert [row.name for row in found[:4]] == ["t64-n32k", "t16-n32k", "t32-n32k", "t1-n32k"]
    names = [row.name for row in found]
    assert len(set(names)) == len(names)
    shapes = {(row.shape.nodes, row.shape.prefix) for row in found if row.has_goals}
    assert shapes == {(t, 1024 * n) for t in (1, 16, 32, 64, 128) for n in (4, 8, 32, 128)}
    some = rows.chosen(found, ["t64-n4k", "*-b8"])
    assert [row.name for row in some] == ["t64-n4k", "t16-n8k-b8", "t64-n8k-b8"]
    assert rows.chosen(found, None) == found


@pytest.mark.parametrize(
    ("name", "times", "unmet"),
    [
        ("t64-n32k", {"ours": 75.0, "flex": 100.0, "sdpa": 310.0, "eager": 1200.0}, []),
        ("t64-n32k", {"ours": 80.0}, ["450 TFLOP/s"]),
        ("t64-n32k", {"ours": 75.0, "sdpa": 290.0}, ["sdpa takes 4.0 times as long"]),
        ("t64-n128k", {"ours": 300.0, "sdpa": 1500.0}, ["sdpa takes 6.0 times as long"]),
        ("t16-n32k", {"ours": 36.0}, []),
        ("t16-n32k", {"ours": 38.0}, ["85 % of the copy rate"]),
        ("t1-n8k", {"ours": 13.0}, ["65 % of the copy rate"]),
        ("t32-n128k", {"ours": 190.0}, ["70 % of the copy rate"]),
        ("t64-n4k", {"ours": 15.1, "flex": 15.2}, ["at most 15 us"]),
        ("t64-n4k", {"ours": 14.0, "flex": 13.0}, ["flex takes 1.0 times as long"]),
        ("t64-n8k", {"ours": 14.0, "flex": 18.0}, ["flex takes 1.3 times as long"]),
        ("t64-n32k-d64", {"ours": 900.0}, []),
    ],
)
def test_goals(name, times, unmet):
    (row,) = rows.chosen(rows.rows(), [name])
    found = rows.goals(rows.Measured(row, times, 4300.0))
    assert [text for text, met in found if not met] == unmet


def test_figures_count_keys_and_values_once():
    (row,) = rows.chosen(rows.rows(), ["t64-n128k"])
    measured = rows.Measured(row, {"ours": 125.0, "eager": 250.0}, 4300.0)
    assert row.shape.kv_bytes == 4096 * (131072 + 64)
    assert row.shape.operations == 16384 * 64 * (131072 + 64)
    assert measured.bandwidth == pytest.approx(4297, abs=1)
    assert measured.share == pytest.approx(1.0, abs=0.001)
    assert measured.speedup("eager") == 2.0
    assert measured.speedup("flex") is None


def test_block_mask_has_the_prefix_in_full_blocks():
    shape = methods.Shape(260, 5, 2, 4, 2, 16, torch.float32)
    workload = methods.Workload(shape, device="cpu", is_timed=False)
    mask = workload.block_mask()
    assert (workload.num_buffers, shape.lengths, shape.capacity) == (1, [260, 68], 384)
    assert mask.full_kv_num_blocks.flatten().tolist() == [2, 0]
    assert mask.kv_num_blocks.flatten().tolist() == [1, 2]
    assert mask.kv_indices[0, 0, 0, 0] == 2
    assert mask.kv_indices[1, 0, 0, :2].tolist() == [0, 2]


def test_wrong_outputs_are_not_recorded(bench, monkeypatch):
    row = replace(rows.tiny_rows()[1], methods=("ours", "sdpa", "eager"))
    right = methods.Workload.sdpa
    monkeypatch.setattr(
        methods.Workload, "sdpa", lambda self: lambda index: 1.1 * right(self)(index)
    )
    monkeypatch.setattr(methods.Workload, "eager", lambda self: lambda index: 1 / 0)
    measuring.measure_row(bench, row)
    assert [record["settings"]["method"] for record in read_records(bench.out)] == ["ours"]
    assert bench.findings.failures == []
    assert "off by" in bench.findings.left_out[0]
    assert "ZeroDivisionError" in bench.findings.left_out[1]


def test_wrong_outputs_of_ours_fail(bench, monkeypatch):
    right = methods.tree_attention

    def wrong(*arguments, backend="auto", **options):
        output = right(*arguments, backend=backend, **options)
        return output if backend == "reference" else output * 1.05

    monkeypatch.setattr(methods, "tree_attention", wrong)
    row = replace(rows.tiny_rows()[1], methods=("ours",))
    measuring.measure_row(bench, row)
    assert read_records(bench.out) == []
    assert "off by" in bench.findings.failures[0]


def test_what_there_is_no_time_for_is_named(bench, capsys):
    bench.findings.deadline = 0.0
    speed.run(bench, rows.tiny_rows())
    assert bench.findings.left_out[:2] == ["t5-n120: no time", "t5-n120-b3: no time"]
    assert "keep_path and tree_words, batch 8: no time" in bench.findings.left_out
    assert "goals: 0 met, 0 missed" in capsys.readouterr().out


def test_best_settings_of_flex_are_kept_and_refused_ones_passed_over(bench, monkeypatch):
    shape = methods.Shape(40, 5, 1, 4, 2, 16, torch.float32)
    workload = methods.Workload(shape, device="cpu")
    expected = workload.expected()

    def refuse(_):
        raise RuntimeError("out of resources")

    settings = [({}, refuse), ({"num_warps": 8}, workload.sdpa())]
    monkeypatch.setattr(measuring, "attends", lambda *_: settings)
    samples, options = measuring.time_method(bench, workload, "flex", expected)
    assert (len(samples), options) == (2, {"num_warps": 8})
    assert bench.flex_options == {(5, 16, 1): {"num_warps": 8}}
    with pytest.raises(RuntimeError, match="out of resources"):
        measuring.time_method(bench, workload, "sdpa", expected)


def test_compiling_and_listing_launches_time_nothing(capsys):
    speed.main(["--tiny", "--warm", "1/2", "--methods", "ours"])
    speed.main(["--tiny", "--launches", "--rows", "t5-n120"])
    assert "speclm::tree_attention" in capsys.readouterr().out
    commands = speed.warm_commands(patterns=["t1-*"])
    assert commands["compile 0/6"][-4:] == ["--warm", "0/6", "--rows", "t1-*"]


def test_dispatch_is_measured_in_pairs(tmp_path, capsys):
    path = tmp_path / "kernels.jsonl"
    assert len(list(dispatch.shapes())) == 48
    assert dispatch.measure_dispatch(path, seconds=60, pairs=2, is_tiny=True) == 0
    ratio, *calls = read_records(path)
    assert ratio["benchmark"] == "tree_attention_dispatch"
    assert (ratio["n"], ratio["settings"]["groups"], ratio["settings"]["batch"]) == (2, 2, 2)
    assert set(ratio["settings"]["times"]) == {"ours_ms", "theirs_ms"}
    methods = [record["settings"]["method"] for record in calls]
    assert methods == ["bare SDPA", "unchecked", "checked", "Transformers"]
    assert "times as fast" in capsys.readouterr().out


def test_dispatch_that_differs_is_not_recorded(tmp_path, monkeypatch, capsys):
    path = tmp_path / "kernels.jsonl"
    right = dispatch.Workload.ours
    monkeypatch.setattr(
        dispatch.Workload,
        "ours",
        lambda self, **options: lambda index: 1.1 * right(self, **options)(index),
    )
    assert dispatch.measure_dispatch(path, seconds=60, pairs=2, is_tiny=True) == 1
    assert {record["benchmark"] for record in read_records(path)} == {"call_overhead"}
    assert "FAILED tiny: off by" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_dry_run_is_named():
    with pytest.raises(SystemExit, match="--tiny"):
        speed.main(["--rows", "t1-*"])
