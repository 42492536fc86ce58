import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import gpu
from speclm.bench import read_records
from speclm.devices import device_path
from tests.stand_ins import replaying

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    "families", [("mistral",), pytest.param(gpu.FAMILIES, marks=pytest.mark.slow)], ids=len
)
def test_dry_run_checks_identity_and_writes_records(families, tmp_path, monkeypatch, capsys):
    path = tmp_path / "gpu.jsonl"
    monkeypatch.setattr(gpu, "FAMILIES", families)
    monkeypatch.setattr(gpu, "DRY_ENGINES", (replaying(),))
    with device_path():
        assert gpu.main(["--tiny", "--out", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "0 failures, 0 left out"
    for family in ("bundled", *families):
        assert f"identity {family}" in printed
    records = [json.loads(line) for line in path.read_text().splitlines()]
    methods = {"gpu_decode": set(), "large_rounds": set()}
    for record in records:
        methods[record["benchmark"]].add(record["settings"]["method"])
        assert record["num_identical"] == record["n"] or not record["promises_identity"]
    assert methods["gpu_decode"] == {"ngram", "prompt_lookup", "assisted"}
    assert methods["large_rounds"] == {"static", "ngram", "eagle3"}
    assert {record["settings"]["engine"] for record in records} == {"eager", "graph"}
    by_stage = [r["settings"].get("stage_milliseconds") for r in records]
    assert any(stages and stages["verify"] > 0 and stages["draft"] > 0 for stages in by_stage)
    assert "batch 2 graph ngram  identical" in printed
    assert "batch 2 graph eagle3 identical" in printed
    assert "kernels: 7 checks passed" in printed
    records = read_records(tmp_path / "kernels.jsonl")
    methods = [r["settings"]["method"] for r in records if r["benchmark"] == "tree_attention"]
    assert methods == ["ours", "sdpa"] * 2


@pytest.mark.parametrize("family", gpu.FAMILIES)
def test_models_of_every_family_have_the_vocabulary_of_the_base(family):
    model = gpu.tiny_model(family, vocab_size=90)
    assert model.config.model_type == family
    assert model.get_output_embeddings().out_features == 90


def test_what_there_is_no_time_for_is_named(capsys):
    plan = gpu.make_plan(argparse.Namespace(tiny=True, seconds=0.0))
    gpu.check_identity(plan, torch.float32)
    gpu.measure_decoding(plan, torch.float32, Path("not written"))
    gpu.measure_kernels(plan, Path("not written"), deadline=0.0)
    gpu.measure_large_rounds(plan, Path("not written"))
    names = {name.split()[0] for name in plan.left_out}
    assert names == {"identity", "decode", "rounds", "t5-n120:", "t5-n120-b3:"}
    assert all(name.endswith(": no time") for name in plan.left_out)
    assert not Path("not written").exists()
    assert plan.failures == []


def test_what_checks_of_kernels_find_is_found_by_all(monkeypatch, capsys):
    plan = gpu.make_plan(argparse.Namespace(tiny=True, seconds=60.0))

    def fail(parts, setup, findings):
        assert parts == ("attention", "report")
        findings.fail("attention: off by 1")
        findings.leave_out("bits", "no time")

    monkeypatch.setattr(gpu.checks, "run_in_process", fail)
    gpu.check_kernels(plan)
    assert plan.failures == ["attention: off by 1"]
    assert plan.left_out == ["bits: no time"]


def test_on_a_gpu_checks_run_beside_compilations(monkeypatch):
    plan = gpu.make_plan(argparse.Namespace(tiny=True, seconds=60.0))
    plan.device = "cuda"
    started = {}
    monkeypatch.setattr(
        gpu.checks, "run_in_processes", lambda *parts, **given: started.update(given)
    )
    gpu.check_kernels(plan)
    assert not started["is_tiny"]
    assert len(started["also"]) == 6


def test_a_wrong_output_fails():
    plan = gpu.make_plan(argparse.Namespace(tiny=True, seconds=60.0))
    base = gpu.load_model("base", dtype=torch.float32, device=plan.device)
    plain = gpu.plain_decoder(base)
    wrong = replace(plain, name="wrong", generate=lambda call: plain.generate(call) + 1)
    (cell, *_) = gpu.build_cells(
        base,
        sets=("sql",),
        num_prompts=1,
        settings=("greedy",),
        batches=(1,),
        tune=True,
        max_new_tokens=4,
    )
    assert gpu.compare_states(base, wrong, list(cell.calls), is_half=False).startswith("FAILED")
    assert gpu.compare_states(base, wrong, list(cell.calls), is_half=True).startswith("FAILED")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_dry_run_is_named():
    with pytest.raises(SystemExit, match="--tiny"):
        gpu.make_plan(argparse.Namespace(tiny=False, seconds=1.0, n=1))
