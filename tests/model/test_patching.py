"""`patch` makes the base's own `generate` speculative, and nothing else."""

import copy
import pickle

import pytest
import torch

import speclm
from speclm import SpecModel
from speclm.errors import OptionError, PatchError
from tests.models import build_model, generate, prompts

SAMPLED = {"do_sample": True, "max_new_tokens": 10}


@pytest.fixture
def base():
    return build_model("llama")


def test_patched_base_gives_its_own_tokens_and_is_restored(base):
    expected, state = generate(base, prompts(9, 4), **SAMPLED)
    before = dict(vars(base))
    with speclm.patch(base, "ngram") as spec:
        found, state_found = generate(base, prompts(9, 4), **SAMPLED)
        assert spec.last_speculation.rounds > 0
        assert spec.last_speculation.fallbacks == []
        assert type(spec) is SpecModel
    assert torch.equal(found, expected)
    assert torch.equal(state_found, state)
    assert vars(base) == before


def test_patch_is_on_from_the_call_until_detach(base):
    spec = speclm.patch(base, None)
    base.generate(**prompts(4), max_new_tokens=3)
    assert spec.last_speculation.rounds > 0
    spec.detach()
    spec.last_speculation = None
    base.generate(**prompts(4), max_new_tokens=3)
    assert spec.last_speculation is None
    spec.attach()
    base.generate(**prompts(4), max_new_tokens=3)
    assert spec.last_speculation is not None
    spec.detach()
    assert "generate" not in vars(base)


@pytest.mark.parametrize("wrapped", [True, False])
def test_base_is_restored_after_an_exception(base, wrapped):
    if wrapped:
        base.generate = wrapper = base.generate
    with pytest.raises(ZeroDivisionError), speclm.patch(base, None):
        raise ZeroDivisionError
    assert vars(base).get("generate") is (wrapper if wrapped else None)


def test_double_patch_is_refused_and_leaves_the_first(base):
    with speclm.patch(base, "ngram") as spec:
        with pytest.raises(PatchError, match=r"another SpecModel already.*one patch at a time"):
            speclm.patch(base, None)
        with pytest.raises(PatchError, match="this SpecModel already"), spec:
            pass
        base.generate(**prompts(4), max_new_tokens=3)
        assert spec.last_speculation.rounds > 0
    assert "generate" not in vars(base)


def test_any_spec_model_can_patch_its_base(base):
    spec = SpecModel.from_pretrained(base, "ngram")
    for _ in range(2):
        with spec as entered:
            assert entered is spec
            base.generate(**prompts(4), max_new_tokens=3)
    assert spec.last_speculation.rounds > 0
    assert "generate" not in vars(base)


def test_refused_heads_patch_nothing(base):
    with pytest.raises(OptionError, match="no effect"):
        speclm.patch(base, None, num_draft_tokens=3)
    assert "generate" not in vars(base)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_patched_base_are_plain(base, duplicate):
    inputs = prompts(6)
    with speclm.patch(base, "ngram") as spec:
        expected = base.generate(**inputs, do_sample=False, max_new_tokens=6)
        copied, other = duplicate(base), duplicate(spec)
        spec.last_speculation = None
        assert torch.equal(copied.generate(**inputs, do_sample=False, max_new_tokens=6), expected)
        assert torch.equal(other.generate(**inputs, do_sample=False, max_new_tokens=6), expected)
        assert spec.last_speculation is None
    with speclm.patch(copied, "ngram"):
        assert torch.equal(copied.generate(**inputs, do_sample=False, max_new_tokens=6), expected)
