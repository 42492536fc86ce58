"""Transformers' changes for decode steps hold in rounds, and not while a prompt is read."""

from contextlib import contextmanager

import pytest

from speclm import SpecModel
from speclm.methods.ngram.proposer import NgramProposer
from tests.models import build_model, generate, prompts
from tests.outcomes import reading


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_prompts_are_read_without_what_is_meant_for_steps(family, monkeypatch):
    base, is_step, seen = build_model(family), [], []

    @contextmanager
    def optimised(self):
        is_step.append(True)
        yield
        is_step.pop()

    monkeypatch.setattr(type(base), "_optimize_model_for_decode", optimised)
    spec = SpecModel(base, NgramProposer())
    hook = base.register_forward_hook(reading(lambda *_: seen.append(bool(is_step))))
    for model in (base, spec):
        seen.clear()
        generate(model, prompts(7), max_new_tokens=8)
        assert seen[0] is False
        assert all(seen[1:])
        assert len(seen) > 1
    hook.remove()
