import gc

import jaxtyping
import pytest
import torch

from speclm import SpecModel
from speclm.drafting.combined import CombinedProposer
from speclm.errors import OptionError, VocabularyMismatchError
from speclm.methods.lookup.proposer import LookupProposer
from speclm.methods.ngram.corpus import vocabulary_fingerprint
from speclm.methods.ngram.proposer import NgramProposer
from speclm.methods.ngram.suffix_index import SuffixIndex
from speclm.testing import check_proposer
from tests.models import build_model, generate, prompts, shared_model


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


def test_outputs_of_earlier_calls_are_drafted_from():
    base = shared_model("llama")
    spec = SpecModel.from_pretrained(
        base, "lookup", heads_kwargs={"memory": "call", "history": 64, "min_probability": 0.01}
    )
    taus = []
    for _ in range(2):
        found = generate(spec, prompts(6), max_new_tokens=24)
        assert torch.equal(found[0], generate(base, prompts(6), max_new_tokens=24)[0])
        taus.append(spec.last_speculation.tau)
    assert taus[1] > taus[0] + 1


def test_corpus_is_drafted_from_and_that_of_another_vocabulary_refused(tmp_path):
    base, path = shared_model("llama"), tmp_path / "corpus"
    expected = generate(base, prompts(6), max_new_tokens=24)
    about = {"vocab_size": 160, "fingerprint": vocabulary_fingerprint(base.config)}
    SuffixIndex.build(expected[0].tolist()).save(path, **about)
    spec = SpecModel.from_pretrained(
        base, "lookup", heads_kwargs={"corpus": path, "min_probability": 0.01}
    )
    found = generate(spec, prompts(6), max_new_tokens=24)
    assert torch.equal(found[0], expected[0])
    assert spec.last_speculation.tau > 3
    with pytest.raises(VocabularyMismatchError, match="the index is for vocab_size '160'"):
        LookupProposer(build_model("llama", vocab_size=40), corpus=path)


def test_memory_file_is_written_when_a_model_with_lookup_is_dropped(tmp_path):
    spec = SpecModel.from_pretrained(
        shared_model("llama"), "lookup", heads_kwargs={"memory": tmp_path / "memory"}
    )
    generate(spec, prompts(6), max_new_tokens=12)
    assert not (tmp_path / "memory").exists()
    del spec
    gc.collect()
    again = LookupProposer(shared_model("llama"), memory=tmp_path / "memory")
    assert "memory of 0 tokens" not in again.describe()


@pytest.mark.parametrize("corpus", [3, ["corpus"], b"corpus"])
def test_corpus_that_is_no_path_is_an_option_error(corpus, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    with pytest.raises(OptionError, match=r"corpus is .*, expected the path of a file"):
        LookupProposer(shared_model("llama"), corpus=corpus)


def test_options_out_of_range_are_named():
    base = shared_model("llama")
    wrong = {"num_draft_tokens": 0, "min_probability": 0.0, "history": -1, "max_pairs": -1}
    for option, value in wrong.items():
        with pytest.raises(OptionError, match=f"{option} is {value}"):
            LookupProposer(base, **{option: value})


def test_forgetting_makes_drafts_those_of_a_new_proposer():
    base = shared_model("llama")
    proposer = LookupProposer(base, history=64)
    for heads in (proposer, CombinedProposer([proposer, NgramProposer()])):
        spec, taus = SpecModel(base, heads), []
        for _ in range(3):
            for _ in range(2):
                generate(spec, prompts(6), max_new_tokens=24)
                taus.append(spec.last_speculation.tau)
            heads.forget()
            assert proposer.memory.num_pairs == 0
        assert taus[::2] == taus[:1] * 3
        assert min(taus[1::2]) > taus[0]
