import json
import re

import pytest
import torch

from speclm import SpecModel
from speclm.errors import CheckpointError, OptionError, suggest
from speclm.target.loading import eos_token_ids, load_causal_lm
from tests.model.hub import running_hub
from tests.models import shared_model


@pytest.fixture
def folder(tmp_path):
    shared_model("llama", 0).save_pretrained(tmp_path)
    return tmp_path


def test_option_that_the_model_does_not_take_is_named_with_one_like_it(folder):
    with pytest.raises(OptionError, match=r"does not take \['num_draft_token'\]") as caught:
        SpecModel.from_pretrained(folder, "ngram", num_draft_token=5)
    assert "did you mean 'num_draft_tokens'?" in str(caught.value)
    with pytest.raises(OptionError, match=r"base .* does not take \['wings'\].*drop 'wings'"):
        load_causal_lm(folder, {"wings": 2}, owner="base")


def test_option_next_to_a_loaded_base_is_named_with_one_like_it():
    with pytest.raises(OptionError, match=r"no effect; did you mean 'num_draft_tokens'\?"):
        SpecModel.from_pretrained(shared_model("llama", 0), "ngram", num_draft_token=5)
    with pytest.raises(OptionError, match=r"no effect; drop 'torch_dtype', or pass it where"):
        SpecModel.from_pretrained(shared_model("llama", 0), torch_dtype="auto")


def test_option_that_a_draft_model_does_not_take_is_named(folder):
    base = shared_model("llama", 0)
    with pytest.raises(OptionError, match=r"draft model .* does not take \['dtyp'\].*'dtype'"):
        SpecModel.from_pretrained(base, folder, heads_kwargs={"dtyp": "auto"})


@pytest.mark.parametrize("as_draft", [False, True])
@pytest.mark.parametrize("dtype", ["flaot16", "relu", torch.int8, 16])
def test_dtype_that_is_none_for_weights_is_named(folder, as_draft, dtype):
    given = (shared_model("llama", 0), folder) if as_draft else (folder, "ngram")
    options = {"dtype": dtype}
    options = {"heads_kwargs": options} if as_draft else options
    words = rf"dtype of the .* is {re.escape(repr(dtype))}, expected one such as"
    with pytest.raises(OptionError, match=words):
        SpecModel.from_pretrained(*given, **options)


@pytest.mark.parametrize("as_draft", [False, True])
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("hidden_size", -3, "hidden_size is -3, expected at most .* for weights of"),
        ("num_hidden_layers", 300000, "num_hidden_layers is 300000, expected at most"),
        ("hidden_act", True, "cannot be loaded .*StrictDataclass.*export them again"),
        ("rms_norm_eps", [[]] * 3, "cannot be loaded .*export them again"),
    ],
)
def test_damaged_files_are_named(folder, as_draft, name, value, words):
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), name: value}))
    given = (shared_model("llama", 0), folder) if as_draft else (folder, "ngram")
    with pytest.raises(CheckpointError, match=words):
        SpecModel.from_pretrained(*given)


def test_files_are_checked_before_transformers_reads_them(folder):
    (folder / "generation_config.json").write_text('{"a": ' + "[" * 5000 + "]" * 5000 + "}")
    with pytest.raises(CheckpointError, match=r"generation_config.json: no JSON can be read"):
        load_causal_lm(folder, {}, owner="base")


@pytest.mark.parametrize("is_sharded", [False, True])
def test_files_on_the_hub_are_checked_too_and_downloaded_once(tmp_path, monkeypatch, is_sharded):
    model, place = shared_model("llama", 0), tmp_path / "org/draft"
    model.save_pretrained(place, max_shard_size="20KB" if is_sharded else "1GB")
    (place / "optimizer.safetensors").write_text("not needed")
    wanted = {*place.iterdir()} - {place / "optimizer.safetensors"}
    with running_hub(tmp_path, monkeypatch) as hub:
        found = load_causal_lm("org/draft", {"force_download": True}, owner="draft model")
        assert sorted(hub.sent) == sorted(path.name for path in wanted)
        assert torch.equal(found.lm_head.weight, model.lm_head.weight)
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 300_000}))
        options = {"cache_dir": tmp_path / "other"}
        with pytest.raises(CheckpointError, match="num_hidden_layers is 300000, expected at most"):
            load_causal_lm("org/draft", options, owner="draft model")


def test_other_errors_of_transformers_stay_what_they_are(tmp_path):
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        load_causal_lm(tmp_path, {}, owner="base")


def test_suggestion_is_one_that_is_alike():
    assert suggest("num_draft_token", ["num_draft_tokens"]) == "did you mean 'num_draft_tokens'?"
    assert suggest("wings", ["tree"]) == "drop 'wings'"


def test_eos_tokens_come_from_the_generation_config(monkeypatch):
    config = shared_model("llama", 0).generation_config
    for given, found in ((2, {2}), ([2, 5], {2, 5}), (None, set())):
        monkeypatch.setattr(config, "eos_token_id", given)
        assert eos_token_ids(shared_model("llama", 0)) == found
