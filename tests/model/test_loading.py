"""Everything that `heads` may be, and what is said about everything else."""

import re

import pytest
import torch
from transformers import PreTrainedModel

from speclm import SpeclmError, SpecModel
from speclm.errors import OptionError, UnknownNameError, VocabularyMismatchError
from speclm.model.loading import load_proposer
from speclm.proposers.draft_model import DraftModelProposer
from speclm.proposers.ngram import NgramProposer
from tests.models import build_model, generate, prompts, shared_model


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return shared_model("llama")


@pytest.fixture(scope="module")
def base_folder(base: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    base.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def draft_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("draft")
    build_model("llama", seed=7, num_hidden_layers=1).save_pretrained(folder)
    return str(folder)


def load(heads, base, **settings):
    options = {"heads_kwargs": {}, "num_draft_tokens": None, **settings}
    return load_proposer(heads, base, **options)


def test_registered_name_builds_its_proposer_with_the_options(base):
    proposer = load("ngram", base, heads_kwargs={"max_ngram": 3}, num_draft_tokens=7)
    assert isinstance(proposer, NgramProposer)
    assert proposer.config.max_ngram == 3
    assert proposer.config.num_draft_tokens == 7


def test_none_and_built_proposers_are_taken_as_they_are(base):
    proposer = NgramProposer()
    assert load(None, base) is None
    assert load(proposer, base) is proposer


def test_folder_is_loaded_with_the_dtype_of_the_base(base, draft_folder):
    proposer = load(draft_folder, base, num_draft_tokens=3)
    assert isinstance(proposer, DraftModelProposer)
    assert proposer.view.model.dtype == base.dtype
    assert proposer.view.device == base.device
    assert proposer.config.num_draft_tokens == 3


def test_heads_kwargs_override_what_the_base_would_give(base, draft_folder):
    proposer = load(draft_folder, base, heads_kwargs={"dtype": torch.bfloat16})
    assert proposer.view.model.dtype == torch.bfloat16


def test_loaded_model_becomes_the_draft_model(base):
    draft = shared_model("qwen3", 7)
    proposer = load(draft, base, num_draft_tokens=2)
    assert proposer.view.model is draft
    assert proposer.config.num_draft_tokens == 2


@pytest.mark.parametrize("heads", [None, NgramProposer()])
@pytest.mark.parametrize("options", [{"num_draft_tokens": 3}, {"heads_kwargs": {"dtype": "auto"}}])
def test_options_that_would_have_no_effect_are_refused(base, heads, options):
    with pytest.raises(OptionError, match=r"no effect.*where the proposer is built"):
        load(heads, base, **options)


def test_heads_kwargs_beside_a_loaded_model_are_refused(base):
    with pytest.raises(OptionError, match=r"loaded model.*'dtype'.*no effect"):
        load(shared_model("llama", 7), base, heads_kwargs={"dtype": "auto"})


def test_option_that_a_registered_proposer_does_not_have_is_refused(base):
    with pytest.raises(OptionError, match=r"'ngram' does not take \['wings'\]"):
        load("ngram", base, heads_kwargs={"wings": 2})


@pytest.mark.parametrize(
    ("heads", "near"), [("n-gram", "'ngram'"), ("ngrams", "'ngram'"), ("Ngram", "'ngram'")]
)
def test_near_miss_names_the_nearest_registered_proposer(base, heads, near):
    with pytest.raises(UnknownNameError, match=f"did you mean {near}") as caught:
        load(heads, base)
    assert isinstance(caught.value, SpeclmError)
    assert isinstance(caught.value, LookupError)


def test_unknown_heads_list_what_is_registered(base, tmp_path):
    with pytest.raises(UnknownNameError, match=r"registered are \[.*'ngram'.*\]") as caught:
        load("qqqq-zzzz", base)
    assert "did you mean" not in str(caught.value)
    with pytest.raises(UnknownNameError, match=r"folder.*config\.json and weights"):
        load(tmp_path, base)  # an empty folder


def test_draft_of_another_vocabulary_is_refused_with_both_sizes(base):
    draft = build_model("llama", vocab_size=200)
    draft.config._name_or_path = "org/draft"
    words = r"org/draft has a vocabulary of 200.*one of 160.*tokenizer"
    with pytest.raises(VocabularyMismatchError, match=words) as caught:
        load(draft, base)
    assert "LlamaForCausalLM" in str(caught.value)  # the target has no name
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("num_draft_tokens", [0, 10**6])
@pytest.mark.parametrize("heads", ["ngram", "draft"])
def test_number_of_draft_tokens_out_of_range_is_refused(base, heads, num_draft_tokens):
    heads = shared_model("llama", 7) if heads == "draft" else heads
    with pytest.raises(SpeclmError, match=r"num_draft_tokens|depth") as caught:
        load(heads, base, num_draft_tokens=num_draft_tokens)
    assert re.search(str(num_draft_tokens), str(caught.value))


@pytest.mark.parametrize("as_folder", [True, False])
@pytest.mark.parametrize("heads", ["ngram", "folder", "model", "proposer", None])
def test_from_pretrained_takes_every_kind_of_base_and_heads(
    base, base_folder, draft_folder, heads, as_folder
):
    kinds = {
        "folder": draft_folder,
        "model": shared_model("llama", 7),
        "proposer": NgramProposer(),
    }
    settings = {"dtype": torch.float32} if as_folder else {}
    spec = SpecModel.from_pretrained(
        base_folder if as_folder else base, kinds.get(heads, heads), **settings
    )
    inputs = prompts(6, 9)
    for sampled in (True, False):
        expected = generate(base, inputs, do_sample=sampled, max_new_tokens=8)
        found = generate(spec, inputs, do_sample=sampled, max_new_tokens=8)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        assert spec.last_speculation.fallbacks == []


def test_num_draft_tokens_bounds_a_round(base):
    spec = SpecModel.from_pretrained(base, base, num_draft_tokens=2)
    spec.generate(**prompts(6), do_sample=False, max_new_tokens=12)
    total = spec.last_speculation.total
    assert total.num_draft_tokens <= 2 * len(total.accepted_lengths)
    assert len(spec.last_speculation.accepted_length_histogram) <= 3


def test_ngram_is_the_default(base):
    assert isinstance(SpecModel.from_pretrained(base).proposer, NgramProposer)


def test_arguments_beside_a_loaded_base_are_refused(base):
    with pytest.raises(OptionError, match=r"base is a loaded model and \['dtype'\]"):
        SpecModel.from_pretrained(base, dtype=torch.bfloat16)
