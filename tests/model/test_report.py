"""The report names what is wrapped, the backend and why, and the last call's counters."""

import pytest

from speclm import SpecModel
from speclm.methods.ngram.proposer import NgramProposer
from speclm.model.report import write_report
from speclm.self_check.verdict import SelfCheck, Verification
from speclm.stats import SpeculationStats
from speclm.target import TargetView
from tests.models import prompts, shared_model


def report(check, stats=None, proposer=None):
    lines: list[str] = []
    view = TargetView(shared_model("llama"))
    write_report(view, proposer, check, stats, write=lines.append)
    return "\n".join(lines)


@pytest.mark.parametrize("backend", Verification)
def test_backend_and_reason_are_given(backend):
    text = report(SelfCheck(backend, "no trees: no mask", milliseconds=12.3))
    assert f"backend   {backend.value}: no trees: no mask" in text
    assert "checked in 12.3 ms" in text
    assert "proposer  none" in text


def test_cached_verdicts_are_marked():
    check = SelfCheck(Verification.TREES, "passed", milliseconds=0.4, is_cached=True)
    assert "from an earlier check in 0.4 ms" in report(check, proposer=NgramProposer())


def test_last_call_shows_its_counters_or_why_it_was_plain():
    spec = SpecModel(shared_model("llama"), NgramProposer())
    spec.generate(**prompts(6), do_sample=False, max_new_tokens=6)
    assert "last call tau" in report(spec.self_check, spec.last_speculation)
    stats = SpeculationStats(fallbacks=["num_beams=2"])
    assert "last call regular generation: num_beams=2" in report(spec.self_check, stats)


def test_kernel_and_reason_are_given(monkeypatch):
    check = SelfCheck(Verification.TREES, "passed", milliseconds=1.0)
    assert "kernels   sdpa: the model is on a CPU" in report(check)
    monkeypatch.setenv("SPECLM_KERNELS", "reference")
    assert "kernels   reference: SPECLM_KERNELS asks for it" in report(check)
