"""`repr` and report of a model say what is wrapped, how it decodes, and what the last call took."""

import pytest

from speclm import SpecModel
from speclm.methods.ngram.proposer import NgramProposer
from speclm.model.report import describe_tree_option, write_report
from speclm.self_check.verdict import SelfCheck, Verification
from speclm.stats import SpeculationStats
from speclm.target import TargetView
from speclm.tree.plan import TreePlan
from tests.models import prompts, shared_model


def report(check, stats=None, proposer=None):
    lines: list[str] = []
    view = TargetView(shared_model("llama"))
    write_report(view, proposer, check, stats, write=lines.append)
    return "\n".join(lines)


@pytest.mark.parametrize("backend", Verification)
def test_backend_and_reason_are_given(backend):
    text = report(SelfCheck(backend, "no trees: no mask", milliseconds=12.3))
    assert f"verified    {backend.value}: no trees: no mask" in text
    assert "checked in 12.3 ms" in text
    assert "proposer    none" in text


def test_cached_verdicts_are_marked():
    check = SelfCheck(Verification.TREES, "passed", milliseconds=0.4, is_cached=True)
    assert "from an earlier check in 0.4 ms" in report(check, proposer=NgramProposer())


def test_last_call_shows_its_counters_or_why_it_was_regular():
    spec = SpecModel(shared_model("llama"), NgramProposer())
    spec.generate(**prompts(6), do_sample=False, max_new_tokens=6)
    assert "  tau  " in report(spec.self_check, spec.last_speculation)
    stats = SpeculationStats(fallbacks=["num_beams=2"])
    assert report(spec.self_check, stats).endswith("last call\n  regular generation: num_beams=2")


def test_kernel_and_reason_are_given(monkeypatch):
    check = SelfCheck(Verification.TREES, "passed", milliseconds=1.0)
    assert "kernels     sdpa: the model is on a CPU" in report(check)
    monkeypatch.setenv("SPECLM_KERNELS", "reference")
    assert "kernels     reference: SPECLM_KERNELS asks for it" in report(check)


def test_repr_says_what_is_wrapped_and_how_it_decodes():
    text = repr(SpecModel(shared_model("llama"), NgramProposer(), tree="auto"))
    for line in (
        "LlamaForCausalLM",
        "proposer: NgramProposer",
        "tree: auto",
        "acceptance: exact",
        "verification: tree attention",
        "torch.float32, cpu",
    ):
        assert line in text


def test_tree_is_described_in_words():
    assert describe_tree_option(None) == "as the proposer is set"
    assert describe_tree_option(TreePlan(2, 3)) == "at most 3 nodes on 2 levels"
    static = TreePlan.of(((0,), (0, 0)))
    assert describe_tree_option(static) == "static tree of 2 nodes on 2 levels"
