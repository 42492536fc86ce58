import gc

import pytest
import torch

from speclm import SpecModel
from speclm.errors import OptionError
from speclm.methods.recycling.proposer import RecyclingProposer
from speclm.testing import check_proposer
from tests.models import generate, prompts, shared_model


@pytest.mark.parametrize("settings", [{}, {"do_sample": True}])
def test_second_call_with_one_prompt_drafts_what_the_first_saw(settings):
    base = shared_model("llama")
    spec = SpecModel(base, RecyclingProposer(base))
    options = {**settings, "max_new_tokens": 24}
    expected = generate(base, prompts(6), **options)
    taus = []
    for _ in range(2):
        found = generate(spec, prompts(6), **options)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        taus.append(spec.last_speculation.tau)
    assert taus[1] > max(taus[0], 1.5)


def test_memory_of_a_call_is_gone_in_the_next():
    base = shared_model("llama")
    spec = SpecModel(base, RecyclingProposer(base, memory="call"))
    taus = []
    for _ in range(2):
        generate(spec, prompts(6), max_new_tokens=24)
        taus.append(spec.last_speculation.tau)
    assert taus[0] == taus[1]


def test_memory_file_serves_another_model_object(tmp_path):
    base = shared_model("llama")
    first = RecyclingProposer(base, memory=tmp_path / "memory")
    generate(SpecModel(base, first), prompts(6), max_new_tokens=24)
    del first
    gc.collect()  # which writes the file
    spec = SpecModel.from_pretrained(
        base, "recycling", heads_kwargs={"memory": tmp_path / "memory"}
    )
    generate(spec, prompts(6), max_new_tokens=24)
    assert spec.last_speculation.tau > 1.5


def test_rules_of_proposers_are_kept():
    check_proposer(lambda: RecyclingProposer(shared_model("llama")), vocab_size=32)


def test_static_trees_are_filled():
    base = shared_model("llama")
    spec = SpecModel(base, RecyclingProposer(base), tree=[(0,), (1,), (0, 0)])
    for _ in range(2):
        expected, _ = generate(base, prompts(6), max_new_tokens=12)
        found, _ = generate(spec, prompts(6), max_new_tokens=12)
        assert torch.equal(found, expected)
    assert spec.last_speculation.tau > 1.2


def test_options_out_of_range_are_named():
    base = shared_model("llama")
    for option, value in {"num_draft_tokens": 0, "min_probability": 0.0, "max_pairs": -1}.items():
        with pytest.raises(OptionError, match=f"{option} is {value}"):
            RecyclingProposer(base, **{option: value})
