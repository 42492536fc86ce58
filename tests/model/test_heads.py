"""Everything that `heads` may be, and what is said about everything else."""

import json
import re

import jaxtyping
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from speclm import SpeclmError, SpecModel
from speclm.drafting.combined import CombinedProposer
from speclm.errors import (
    CheckpointError,
    OptionError,
    UnknownNameError,
    UnsupportedModelError,
    VocabularyMismatchError,
)
from speclm.methods.draft_model.proposer import DraftModelProposer
from speclm.methods.finding import find_heads
from speclm.methods.lookup.proposer import LookupProposer
from speclm.methods.medusa.checkpoint import read_medusa
from speclm.methods.medusa.proposer import MedusaProposer
from speclm.methods.ngram.proposer import NgramProposer
from speclm.model.heads import load_proposer
from tests.model.hub import running_hub
from tests.models import VOCAB_SIZE, build_model, generate, prompts, shared_model


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
    proposer = load("ngram", base, heads_kwargs={"min_probability": 0.3}, num_draft_tokens=7)
    assert isinstance(proposer, NgramProposer)
    assert proposer.config.min_probability == 0.3
    assert proposer.config.num_draft_tokens == 7


def test_a_list_joins_proposers(base, tmp_path):
    save_heads(tmp_path)
    proposer = load(["ngram", tmp_path], base, num_draft_tokens=9)
    assert isinstance(proposer, CombinedProposer)
    assert [type(part) for part in proposer.parts] == [NgramProposer, MedusaProposer]
    assert proposer.config.num_draft_tokens == 9
    assert isinstance(load(("ngram",), base), CombinedProposer)


def test_a_list_takes_no_options_and_needs_a_part(base):
    with pytest.raises(OptionError, match=r"max_ngram.*no clear owner"):
        load(["ngram", "ngram"], base, heads_kwargs={"max_ngram": 3})
    with pytest.raises(OptionError, match="no proposers"):
        load([], base)


def test_files_that_are_no_weights_do_not_hide_a_draft_model(base, tmp_path):
    base.save_pretrained(tmp_path)
    (tmp_path / "onnx.index.json").write_text('{"a": 1}')
    assert isinstance(load(tmp_path, base), DraftModelProposer)
    (tmp_path / "model.safetensors").unlink()
    torch.save(base.state_dict(), tmp_path / "pytorch_model.bin")
    torch.save({"state": {}}, tmp_path / "optimizer.pt")
    assert isinstance(load(tmp_path, base), DraftModelProposer)


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
    with pytest.raises(OptionError, match=r"proposer 'ngram': unknown option 'wings'.*'max_ngram'"):
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
    draft = build_model("llama", vocab_size=300)
    draft.config._name_or_path = "org/draft"
    words = r"org/draft has a vocabulary of 300.*one of 160.*tokenizer"
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


def test_lookup_is_the_default(base):
    assert isinstance(SpecModel.from_pretrained(base).proposer, LookupProposer)


def test_arguments_beside_a_loaded_base_are_refused(base):
    with pytest.raises(OptionError, match=r"base is a loaded model and \['dtype'\]"):
        SpecModel.from_pretrained(base, dtype=torch.bfloat16)


def save_heads(folder, *, hidden=40, vocab=VOCAB_SIZE, own=True, config=None, prefix=""):
    state = {
        "0.0.linear.weight": torch.randn(hidden, hidden),
        "0.0.linear.bias": torch.randn(hidden),
        "1.0.linear.weight": torch.randn(hidden, hidden),
        "1.0.linear.bias": torch.randn(hidden),
    }
    if own:
        state |= {
            "0.1.weight": torch.randn(vocab, hidden),
            "1.1.weight": torch.randn(vocab, hidden),
        }
    folder.mkdir(parents=True, exist_ok=True)
    if not prefix:
        save_file(state, folder / "medusa_lm_head.safetensors")
        (folder / "config.json").write_text(json.dumps(config or {"medusa_num_heads": 2}))
    return {prefix + key: tensor for key, tensor in state.items()}


@pytest.mark.parametrize("own", [True, False])
def test_folder_of_medusa_heads_becomes_their_proposer(base, tmp_path, own):
    state = save_heads(tmp_path, own=own)
    spec = SpecModel.from_pretrained(base, tmp_path, heads_kwargs={"tree": [2, 1]})
    assert isinstance(spec.proposer, MedusaProposer)
    heads = spec.proposer.heads
    assert torch.equal(heads.weight[0, 1], state["1.0.linear.weight"])
    assert (heads.weight.dtype, heads.weight.device) == (base.dtype, base.device)
    assert not any(parameter.requires_grad for parameter in heads.parameters())
    assert spec.proposer.config.paths == ((0,), (1,), (0, 0), (1, 0))
    inputs = prompts(6, 9)
    for sampled in (True, False):
        expected = generate(base, inputs, do_sample=sampled, max_new_tokens=8)
        found = generate(spec, inputs, do_sample=sampled, max_new_tokens=8)
        assert torch.equal(found[0], expected[0])


def test_stored_choices_are_the_default_tree(base, tmp_path):
    save_heads(tmp_path, config={"speclm": {"choices": [[0], [1], [2]]}})
    assert load(tmp_path, base).config.paths == ((0,), (1,), (2,))
    tree = load(tmp_path, base, heads_kwargs={"tree": [1]}).config.paths
    assert tree == ((0,),)
    assert len(load(tmp_path, base, num_draft_tokens=2).config.paths) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
@pytest.mark.parametrize("own", [True, False])
def test_dtype_of_heads_may_differ_from_that_of_the_base(base, tmp_path, dtype, own):
    save_heads(tmp_path, own=own)
    assert load(tmp_path, base, heads_kwargs={"dtype": dtype}).heads.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"wings": 2}, r"Medusa heads: unknown option 'wings'.*'dtype'.*'tree'"),
        ({"dtype": "nothing"}, r"dtype of the heads is 'nothing'"),
        ({"dtype": torch.int8}, r"dtype of the heads is torch.int8"),
    ],
)
def test_options_that_heads_do_not_have_are_refused(base, tmp_path, options, words):
    save_heads(tmp_path)
    with pytest.raises(OptionError, match=words):
        load(tmp_path, base, heads_kwargs=options)


def test_heads_of_another_model_are_refused(base, tmp_path):
    save_heads(tmp_path / "vocab", vocab=200)
    with pytest.raises(VocabularyMismatchError, match=r"vocabulary of 200.*160"):
        SpecModel.from_pretrained(base, tmp_path / "vocab")
    save_heads(tmp_path / "width", hidden=24)
    with pytest.raises(OptionError, match=r"24 wide.*40"):
        SpecModel.from_pretrained(base, tmp_path / "width")
    (tmp_path / "width" / "medusa_lm_head.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match=r"medusa_lm_head.safetensors.*download it again"):
        SpecModel.from_pretrained(base, tmp_path / "width")


def test_merged_model_gives_heads_to_its_own_base_alone(base, tmp_path):
    base.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    heads = save_heads(tmp_path, prefix="medusa_head.")
    save_file({**load_file(file), **heads}, file, metadata={"format": "pt"})
    with pytest.raises(OptionError, match=r"merged with its heads.*load the base from"):
        SpecModel.from_pretrained(base, tmp_path)
    spec = SpecModel.from_pretrained(tmp_path, tmp_path, dtype=torch.float32)
    assert isinstance(spec.proposer, MedusaProposer)


def test_heads_on_the_hub_are_downloaded_without_any_code(base, tmp_path, monkeypatch):
    save_heads(tmp_path / "me" / "heads")
    (tmp_path / "me" / "heads" / "evil.py").write_text("raise SystemExit")
    (tmp_path / "me" / "heads" / "pytorch_model.bin").write_text("not needed")
    with running_hub(tmp_path, monkeypatch) as hub:
        proposer = load("me/heads", base)
        assert isinstance(proposer, MedusaProposer)
        assert {*hub.sent} == {"config.json", "medusa_lm_head.safetensors"}
    # A second call takes what is there; the hub has stopped.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert isinstance(load("me/heads", base), MedusaProposer)


@pytest.mark.parametrize("is_sharded", [True, False])
def test_pickled_merged_model_on_the_hub_is_downloaded(base, tmp_path, monkeypatch, is_sharded):
    folder = tmp_path / "me" / "merged"
    state = save_heads(folder, prefix="medusa_head.")
    state["model.norm.weight"] = torch.ones(2)
    (folder / "config.json").write_text('{"medusa_num_heads": 2}')
    name = "pytorch_model-00001-of-00001.bin" if is_sharded else "pytorch_model.bin"
    torch.save(state, folder / name)
    if is_sharded:
        index = {"weight_map": dict.fromkeys(state, name)}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with running_hub(tmp_path, monkeypatch):
        source = find_heads("me/merged")
    assert source.method.name == "medusa"
    assert read_medusa(source.folder).is_merged


@pytest.mark.parametrize("wrong", ["a", [1], 0, "", {1: 2}])
def test_heads_kwargs_that_are_no_dictionary_are_refused(wrong, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    with pytest.raises(OptionError, match=r"heads_kwargs is .*, expected a dictionary"):
        SpecModel.from_pretrained(shared_model("llama"), "ngram", heads_kwargs=wrong)


@pytest.mark.parametrize("wrong", [3, None, ["org/model"]])
def test_base_that_is_neither_name_nor_model_is_refused(wrong, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    with pytest.raises(UnsupportedModelError, match=r"base is a .*, expected a folder, a hub id"):
        SpecModel.from_pretrained(wrong)
