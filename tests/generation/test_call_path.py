"""A call of `generate` stays readable: it passes through few files."""

import sys
from pathlib import Path

import pytest

import speclm
from speclm import SpecModel
from speclm.methods.eagle.proposer import EagleProposer
from speclm.methods.ngram.proposer import NgramProposer
from tests.models import prompts, shared_model
from tests.proposers import random_eagle

PACKAGE = Path(speclm.__file__).parent
MAX_FILES = {"ngram": 43, "EAGLE": 52}


def files_entered(call):
    """Return the files of speclm whose functions a call enters."""
    seen = set()

    def note(frame, event, _):
        if event == "call":
            seen.add(frame.f_code.co_filename)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return {name for name in seen if Path(name).is_relative_to(PACKAGE)}


@pytest.mark.parametrize("kind", MAX_FILES)
def test_one_call_passes_through_few_files(kind):
    base = shared_model("llama")
    is_ngram = kind == "ngram"
    proposer = NgramProposer() if is_ngram else EagleProposer(random_eagle(base), target=base)
    spec = SpecModel(base, proposer)
    spec.generate(**prompts(6), max_new_tokens=4, do_sample=True)
    names = files_entered(lambda: spec.generate(**prompts(6), max_new_tokens=12, do_sample=True))
    assert len(names) <= MAX_FILES[kind], sorted(Path(n).relative_to(PACKAGE) for n in names)
