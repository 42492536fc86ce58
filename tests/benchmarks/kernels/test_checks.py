import re
import sys
from time import monotonic

import pytest
import torch

from benchmarks.kernels import cases, checks, checks_attention, checks_graphs, checks_memory
from benchmarks.kernels.findings import Findings, run_side_by_side


@pytest.fixture
def findings():
    return Findings(monotonic() + 60)


def test_dry_run_passes_every_part_and_says_what_needs_a_gpu(capsys):
    status = checks.main(["--tiny"])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "0 failed, 2 left out" in printed.splitlines()[-1]
    for name in ("attention 0", "equal bits", "graph of a whole round", "torch.compile of"):
        assert f"ok {name}" in printed
    assert "ok keep_path_ at far slots" in printed
    assert "kernels     sdpa: the model is on a CPU" in printed
    assert "left out compute-sanitizer racecheck: " in printed


def test_cases_hold_every_value_of_every_factor():
    found = checks_attention.attention_cases(is_tiny=False)
    for name, values in checks_attention.FACTORS.items():
        assert {getattr(case, name) for case in found} >= set(values)
    assert all(case.nodes + case.above <= 256 for case in found)
    assert found[0].dtype == torch.bfloat16
    assert len(set(map(str, found))) == len(found)


def test_build_gives_equal_shapes_and_poisons_what_nobody_may_read():
    case = cases.Case(nodes=5, lengths=(9, 4), has_padding=True, gap=3, above=2)
    first, second = (cases.build(case, device="cpu", seed=seed) for seed in (0, 1))
    assert first.arguments["key"].shape == second.arguments["key"].shape
    assert not torch.equal(first.visible, second.visible)
    assert first.arguments["key"].isnan().any()
    assert not first.key.isnan().any()


@pytest.mark.parametrize(
    ("plant", "complaint"),
    [
        (lambda output, lse: (output + 0.1, lse), "off by .* expected at most"),
        (lambda output, lse: (output * 1.03, lse), "of its norm"),
        (lambda output, lse: (output, lse + 0.01), "lse off by"),
        (lambda output, lse: (output.fill_(torch.nan), lse), "off by inf"),
    ],
)
def test_wrong_results_of_attention_are_found(monkeypatch, plant, complaint):
    right = cases.Call.outputs
    monkeypatch.setattr(
        cases.Call, "outputs", lambda call, **options: plant(*right(call, **options))
    )
    case = cases.Case(dtype=torch.bfloat16, nodes=3, head_dim=16, lengths=(400, 200))
    found = checks_attention.check_case(case, device="cpu", backend="reference")
    assert re.search(complaint, found)


def test_unequal_bits_are_found(monkeypatch):
    (case,) = checks_attention.deterministic_cases(is_tiny=True)
    given = {"device": "cpu", "backend": "reference"}
    assert checks_attention.check_deterministic(case, **given) is None
    right = cases.Call.outputs

    def wrong(call, **options):
        output = right(call, **options)
        return output if "query" not in options else output.nextafter(output + 1)

    monkeypatch.setattr(cases.Call, "outputs", wrong)
    assert "node 0 by itself: differs by" in checks_attention.check_deterministic(case, **given)


def test_wrong_moves_are_found(monkeypatch):

    def in_order(storage, paths, *, prefix_lengths, tree_starts=None, **_):
        """Copy slot after slot, from behind: what is moved is overwritten before it is read."""
        begins = prefix_lengths if tree_starts is None else tree_starts
        for row in range(len(paths)):
            for offset in reversed(range(paths.shape[1])):
                if paths[row, offset] >= 0:
                    source = storage[:, row, :, begins[row] + paths[row, offset]]
                    storage[:, row, :, prefix_lengths[row] + offset] = source

    assert checks_memory.check_races(device="cpu", repeats=4) is None
    monkeypatch.setattr(checks_memory, "keep_path_", in_order)
    monkeypatch.setattr(checks_graphs, "keep_path_", lambda *_, **__: None)
    assert "otherwise than the reference" in checks_memory.check_races(device="cpu", repeats=4)
    found = dict(checks_graphs.graph_checks(device="cpu", backend="reference", is_tiny=True))
    assert "not moved" in found["graph of keep_path_"]()


def test_far_checks_find_what_is_read_or_moved_elsewhere(monkeypatch):
    right, moves = checks_memory.tree_attention, checks_memory.keep_path_

    def near(query, key, value, **options):
        key = key.roll(1, 2) if options["backend"] == "auto" else key
        return right(query, key, value, **options)

    def too_much(storage, paths, **options):
        storage[..., 0, :] += 1
        moves(storage, paths, **options)

    monkeypatch.setattr(checks_memory, "tree_attention", near)
    monkeypatch.setattr(checks_memory, "keep_path_", too_much)
    found = {
        name: check()
        for name, check in checks_memory.offset_checks(
            device="cpu", backend="auto", sizes=checks_memory.NEAR
        )
    }
    assert all(complaint is not None for complaint in found.values())
    assert found["keep_path_ at far rows"] == "slots before the prefix's end have changed"


def test_findings_note_complaints_errors_and_what_came_too_late(tmp_path, capsys):
    path = tmp_path / "findings.jsonl"
    findings = Findings(monotonic() + 60, path)

    def fail():
        raise RuntimeError("no kernel")

    findings.check("good", lambda: None)
    findings.check("bad", lambda: "off by 1")
    findings.check("worse", fail)
    findings.deadline = 0.0
    findings.check("late", lambda: None)
    other = Findings(0.0)
    other.read(path)
    assert (other.passed, other.left_out) == (["good"], ["late: no time"])
    assert other.failures == ["bad: off by 1", "worse: RuntimeError: no kernel"]
    other.read(tmp_path / "missing.jsonl")
    assert "ok good" in capsys.readouterr().out


def test_parts_run_side_by_side_and_crashes_are_failures(findings, monkeypatch):
    script = "import sys; print('nothing'); sys.exit(3)"
    monkeypatch.setattr(checks, "NUM_SHARDS", 1)
    right = checks.run_side_by_side

    def with_script(commands, **options):
        replaced = {name: [sys.executable, "-c", script] for name in commands}
        return right(replaced, **options)

    monkeypatch.setattr(checks, "run_side_by_side", with_script)
    checks.run_in_processes(["attention", "bits"], findings, is_tiny=True, also={"warm": []})
    assert sorted(findings.failures) == [
        f"{name} 0/1: exit status 3\nnothing\n" for name in ("attention", "bits")
    ]


def test_processes_that_take_too_long_are_ended_and_named(tmp_path):
    command = [sys.executable, "-c", "print('begun', flush=True); import time; time.sleep(60)"]
    (finished,) = run_side_by_side({"slow": command}, deadline=monotonic() + 1, folder=tmp_path)
    assert finished.status is None
    assert finished.seconds < 30


@pytest.mark.parametrize(
    ("status", "output", "kind", "text"),
    [
        (0, "fine", "passed", "memcheck"),
        (9, "x\n========= Invalid __global__ read\n", "failures", "Invalid __global__ read"),
        (1, "Traceback\nImportError: no", "failures", "ImportError: no"),
        (1, "========= Device not supported. See\n", "left_out", "Device not supported. See"),
    ],
)
def test_sanitizers_are_judged_by_what_they_say(findings, status, output, kind, text):
    checks.judge("memcheck", output, status, findings)
    (found,) = getattr(findings, kind)
    assert text in found
    assert len(findings.passed + findings.failures + findings.left_out) == 1


def test_sanitizer_runs_the_small_calls(findings, monkeypatch):
    monkeypatch.setattr(checks.shutil, "which", lambda *_, **__: None)
    checks.sanitize("memcheck", findings)
    monkeypatch.setattr(checks.shutil, "which", lambda *_, **__: "/bin/echo")
    checks.sanitize("memcheck", findings)
    monkeypatch.setattr(checks.torch.cuda, "is_available", lambda: True)
    checks.sanitize("racecheck", findings)
    assert findings.passed == ["compute-sanitizer racecheck"]
    assert findings.left_out[0] == "compute-sanitizer memcheck: it is not installed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_dry_run_is_named():
    with pytest.raises(SystemExit, match="--tiny"):
        checks.main(["--parts", "bits"])
