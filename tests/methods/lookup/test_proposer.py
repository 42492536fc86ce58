import pytest
import torch

from speclm import SpecModel
from speclm.errors import OptionError
from speclm.methods.lookup.proposer import LookupProposer
from speclm.testing import check_proposer
from tests.models import generate, prompts, shared_model


@pytest.mark.parametrize("lengths", [(6,), (4, 9, 6)])
@pytest.mark.parametrize("settings", [{}, {"do_sample": True}])
def test_tokens_are_those_of_regular_generation_and_later_calls_are_faster(settings, lengths):
    base = shared_model("llama")
    spec = SpecModel.from_pretrained(base, "lookup")
    options = {**settings, "max_new_tokens": 24}
    expected = generate(base, prompts(*lengths), **options)
    taus = []
    for _ in range(2):
        found = generate(spec, prompts(*lengths), **options)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        taus.append(spec.last_speculation.tau)
    assert taus[1] > max(taus[0], 1.5)


def test_report_says_what_the_memory_holds():
    base = shared_model("llama")
    spec = SpecModel.from_pretrained(base, "lookup")
    generate(spec, prompts(6), max_new_tokens=12)
    assert "pairs" in str(spec)
    assert "of look-ups found by the pair" in str(spec)


def test_rules_of_proposers_are_kept():
    check_proposer(lambda: LookupProposer(shared_model("llama")), vocab_size=32)


def test_options_out_of_range_are_named():
    base = shared_model("llama")
    wrong = {"num_draft_tokens": 0, "min_probability": 0.0, "history": -1, "max_pairs": -1}
    for option, value in wrong.items():
        with pytest.raises(OptionError, match=f"{option} is {value}"):
            LookupProposer(base, **{option: value})
