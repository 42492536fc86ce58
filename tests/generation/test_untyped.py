"""Calls of `generate` without shape checks, as users make them: `make untyped` runs them."""

import os
import sys

import pytest

from speclm import SpecModel
from tests.models import prompts
from tests.outcomes import observe, require_same
from tests.proposers import PROPOSERS, build_proposer
from tests.settings import GREEDY, SAMPLED, tiny_draft, tiny_model

MODES = {"greedy": GREEDY, "sampled": {**SAMPLED, "temperature": 0.9}}


def test_shape_checks_are_installed_unless_the_variable_says_otherwise():
    is_checked = any(type(finder).__name__ == "_JaxtypingFinder" for finder in sys.meta_path)
    assert is_checked == (os.environ.get("SPECLM_TYPECHECK") != "0")


@pytest.mark.parametrize("kind", PROPOSERS)
def test_call_with_any_proposer_leaves_behind_what_regular_generation_does(kind):
    base, inputs = tiny_model("ends"), prompts(7, 3, 5, vocab_size=60)
    spec = SpecModel(base, None)
    for mode in MODES.values():
        arguments = {"max_new_tokens": 12, **mode}
        expected = observe(base, inputs, arguments, base=base)
        spec.proposer = build_proposer(
            kind,
            expected.new_tokens(inputs),
            target=base,
            draft=tiny_draft(base.config.vocab_size),
        )
        require_same(observe(spec, inputs, arguments, base=base), expected)
        assert spec.last_speculation.fallbacks == []


@pytest.mark.parametrize("rule", ["typical", "rejection"])
def test_call_with_a_rule_that_draws_returns_tokens(rule):
    base, inputs = tiny_model("endless"), prompts(7, 3, vocab_size=60)
    spec = SpecModel(base, build_proposer("twin draft", [], target=base, draft=base))
    output = spec.generate(**inputs, **SAMPLED, max_new_tokens=30, acceptance=rule)
    assert output.shape == (2, 37)
    assert spec.last_speculation.fallbacks == []
    assert spec.last_speculation.tau > 1
