"""New draft models, saved ones, and the folders that are written."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from speclm.errors import CheckpointError, OptionError, UnknownNameError
from speclm.methods.draft_model.training import (
    leading_components,
    load_draft_model,
    new_draft_model,
    require_writable,
    write_draft_model,
)
from speclm.model.publishing import prepare_publication
from tests.models import build_model, shared_model
from tests.training.alphabet import TAGGED, tiny_base, word_tokenizer

CLOSE = 1e-4  # float32 products of 30 by 40


def test_new_draft_model_has_the_tokens_and_positions_of_its_base():
    base = build_model("qwen2", eos_token_id=[7, 9], rope_parameters={"rope_theta": 5e5})
    draft = new_draft_model(base, hidden_size=48, num_layers=3, num_heads=4)
    config = draft.config
    assert (config.num_hidden_layers, config.hidden_size, config.head_dim) == (3, 48, 12)
    assert (config.vocab_size, config.max_position_embeddings) == (160, 512)
    assert (config.eos_token_id, config.rope_parameters["rope_theta"]) == ([7, 9], 5e5)
    assert draft.dtype == torch.float32
    other = new_draft_model(base, hidden_size=48, num_layers=3, num_heads=4, seed=1)
    assert not torch.equal(
        draft.model.layers[0].mlp.up_proj.weight, other.model.layers[0].mlp.up_proj.weight
    )


def test_embeddings_start_as_those_of_the_base():
    base = tiny_base()  # 40 wide
    equal = new_draft_model(base, hidden_size=40, num_heads=1, is_tied=False)
    assert torch.equal(equal.get_input_embeddings().weight, base.get_input_embeddings().weight)
    assert torch.equal(equal.lm_head.weight, base.lm_head.weight)
    narrow = new_draft_model(base, hidden_size=32, num_heads=2).get_input_embeddings().weight
    theirs = base.get_input_embeddings().weight.detach()
    # No other basis of 32 directions keeps more of the products of rows.
    kept = torch.linalg.svdvals(theirs)[:32].square().sum()
    assert narrow.square().sum().item() == pytest.approx(kept.item(), rel=CLOSE)
    wide = new_draft_model(base, hidden_size=64)
    assert wide.get_input_embeddings().weight.std() < 0.1  # at random


def test_rows_keep_their_products_in_the_leading_directions():
    directions = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0))).Q
    rows = torch.randn(9, 2, generator=torch.Generator().manual_seed(1)) @ directions[:2]
    found = leading_components(rows, 3)
    torch.testing.assert_close(found @ found.T, rows @ rows.T, atol=CLOSE, rtol=0)


def test_heads_have_to_divide_the_width():
    for width, heads in ((40, 3), (30, 2)):
        with pytest.raises(OptionError, match=f"--hidden-size is {width} and --num-heads {heads}"):
            new_draft_model(tiny_base(), hidden_size=width, num_heads=heads)


def test_written_folder_is_that_of_an_ordinary_model(tmp_path):
    base, folder = tiny_base(), tmp_path / "draft"
    base.generation_config.eos_token_id = 5
    draft = new_draft_model(base, hidden_size=32, num_heads=2)
    write_draft_model(folder, draft, base=base, tokenizer=word_tokenizer(TAGGED))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for name, tensor in draft.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert loaded.generation_config.eos_token_id == 5
    assert AutoTokenizer.from_pretrained(folder).chat_template == TAGGED
    card = (folder / "README.md").read_text()
    assert "draft-model" in card
    assert "| architecture | LlamaForCausalLM |" in card
    assert "| base model | not recorded |" in card  # a path of this machine
    found = prepare_publication(folder, "me/draft", base="org/base")
    assert {"tokenizer.json", "generation_config.json", "model.safetensors"} <= found.sizes.keys()
    assert 'from_pretrained("org/base", "me/draft")' in found.card
    again = load_draft_model(folder)
    assert again.dtype == torch.float32
    write_draft_model(folder, again, base=base)  # its own folder may be replaced


def test_folders_of_other_models_are_not_replaced(tmp_path):
    shared_model("llama").save_pretrained(tmp_path)
    before = json.loads((tmp_path / "config.json").read_text())
    for check in (
        require_writable,
        lambda folder: write_draft_model(folder, tiny_base(), base=tiny_base()),
    ):
        with pytest.raises(CheckpointError, match="expected none or those of a draft model that"):
            check(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == before


def test_what_is_no_language_model_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for name, words in ((tmp_path, "the folder has no config.json"), ("file", "but a file; pass")):
        with pytest.raises(UnknownNameError, match=f"--init.*of a causal language model.*{words}"):
            load_draft_model(tmp_path / name)


def test_heads_with_the_config_of_a_language_model_are_refused(tmp_path):
    build_model("llama", num_hidden_layers=1).config.save_pretrained(tmp_path)  # as EAGLE
    save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks \d+ weights such as .* and not of heads"):
        load_draft_model(tmp_path)
