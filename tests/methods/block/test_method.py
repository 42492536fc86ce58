"""Block drafters as a method: recognised, loaded, saved, described, and their options."""

import json
from dataclasses import replace

import pytest
import torch
import yaml

from speclm import SpecModel
from speclm.cards import GENERATED_MARK
from speclm.errors import CheckpointError, OptionError, VocabularyMismatchError
from speclm.methods.block.checkpoint import block_checkpoint, read_block, write_block
from speclm.methods.block.method import (
    BlockMethod,
    BlockRecipe,
    BlockTrainingOptions,
    block_card,
    kind_of,
)
from speclm.methods.block.network import BlockHeads
from speclm.methods.block.proposer import BlockProposer
from speclm.methods.finding import find_heads
from speclm.training.arguments import training_arguments
from tests.block_tables import DFLASH, LAYOUTS, ZLAB_CONFIG, save, tensors
from tests.eagle_tables import EAGLE3, EAGLE3_CONFIG
from tests.eagle_tables import save as save_eagle
from tests.eagle_tables import tensors as eagle_tensors
from tests.methods.block.block_heads import MARKOV, make_heads
from tests.methods.block.target_heads import heads_for
from tests.model.hub import running_hub
from tests.models import build_model, generate, prompts, shared_model


@pytest.fixture
def base():
    return shared_model("llama")


def write(folder, base, kind="vanilla", **changes):
    made = heads_for(base, kind, **changes)
    write_block(folder, block_checkpoint(made), num_target_layers=base.config.num_hidden_layers)
    return made


def test_card_gives_numbers_loading_and_the_dtype_to_run_in():
    heads = make_heads(**MARKOV, dtype=torch.bfloat16)
    checkpoint = block_checkpoint(heads, base_name_or_path="org/base", choices=((0,), (0, 0)))
    text = block_card(checkpoint, repo_id="me/heads").render()
    header = yaml.safe_load(text.split("---\n", 2)[1])
    assert (header["tags"][1], header["base_model"]) == ("dspark", "org/base")
    assert "# DSpark heads for org/base" in text
    assert 'SpecModel.from_pretrained("org/base", "me/heads")' in text
    assert "| hidden states read | 2, 4 (0 is the embeddings) |" in text
    assert "| draft tokens of one pass | 4 |" in text
    assert "| head for the previous token | vanilla, rank 3 |" in text
    assert "| confidence head | yes |" in text
    assert "| tree | 2 nodes, not counting the root |" in text
    assert "layout of DeepSpec's DSpark" in text
    assert "float16 overflows" in text


def test_kinds_are_told_by_their_parts():
    both = {"is_causal": (False, False), "predicts_next": False}
    for kind, changes in (("dspark", MARKOV), ("jetspec", {}), ("dflash", both)):
        checkpoint = block_checkpoint(make_heads(**changes))
        assert kind_of(checkpoint.config) == kind
        assert f"- {kind}\n" in block_card(checkpoint).render()
    drafted = make_heads(draft_vocab_size=5, has_own_lm_head=True, predicts_next=False)
    text = block_card(block_checkpoint(drafted)).render()
    assert "| tokens drafted | 5 of 20 |" in text
    assert "layout of z-lab's DFlash" in text
    assert "None" not in text


def test_training_options_that_contradict_are_refused():
    for wrong, words in (
        ({"kind": "eagle"}, "--kind is 'eagle', expected one of"),
        ({"num_layers": 0}, "--num-layers is 0"),
        ({"block_size": 1}, "--block-size is 1, expected 2 to 64"),
        ({"draft_vocab_size": 0}, "--draft-vocab-size is 0"),
        ({"token_weight": -1.0}, "--token-weight is -1.0"),
        ({"decay_length": 0.0}, "--decay-length is 0.0"),
        ({"max_anchors": 0}, "--max-anchors is 0, expected 1 to 1048576; choose one in range"),
        ({"init_revision": "v2"}, "--init-revision is 'v2' without --init"),
        ({"init": "a", "block_size": 8}, "--block-size is 8 next to --init 'a'"),
        ({"init": "a", "num_layers": 2}, "--num-layers is 2 next to --init 'a'"),
    ):
        with pytest.raises(OptionError, match=words):
            BlockTrainingOptions(**wrong)
    options = BlockTrainingOptions(token_weight=0.0, distance_weight=1.0)
    assert options.losses == {"token_weight": 0.0, "distance_weight": 1.0}


def test_configs_may_declare_block_heads_and_may_be_broken(tmp_path):
    method, config = BlockMethod(), tmp_path / "config.json"
    assert not method.is_declared(tmp_path)
    assert not method.is_likely(tmp_path)
    for text, is_declared, is_likely in (
        ('{"architectures": ["Qwen3DSparkModel"]}', True, True),
        ('{"dflash_config": {}}', True, True),
        ('{"speculators_model_type": "dspark"}', True, True),
        ('{"target_layer_ids": [1]}', False, True),
        ('{"architectures": ["LlamaForCausalLMEagle3"]}', False, False),
        ('{"architectures": [3]}', False, False),
        ('{"architectures": 3}', False, False),
        ("[" * 10**5, False, False),
        ("[]", False, False),
    ):
        config.write_text(text)
        assert method.is_declared(tmp_path) is is_declared
        assert method.is_likely(tmp_path) is is_likely


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folders_of_every_layout_are_recognised(tmp_path, layout):
    table, config = LAYOUTS[layout]
    folder = save(tmp_path, tensors(table), config=config)
    assert find_heads(folder).method.name == "block"
    (folder / "config.json").write_text("{}")
    assert find_heads(folder).method.name == "block"


def test_heads_of_eagle_are_left_to_eagle_and_damaged_ones_are_claimed(tmp_path):
    for name in ("eagle", "damaged"):
        (tmp_path / name).mkdir()
    folder = save_eagle(tmp_path / "eagle", eagle_tensors(EAGLE3), config=EAGLE3_CONFIG)
    assert find_heads(folder).method.name == "eagle"
    state = tensors(DFLASH)
    del state["hidden_norm.weight"]
    source = find_heads(save(tmp_path / "damaged", state, config=ZLAB_CONFIG))
    assert source.method.name == "block"


@pytest.mark.parametrize("kind", ["vanilla", "rnn", "both ways", "window"])
def test_folder_decodes_the_tokens_of_its_base_and_is_saved_as_it_was(base, tmp_path, kind):
    changes = {"windows": (6, 6)} if kind == "window" else {}
    made = write(tmp_path / "heads", base, kind, **changes)
    spec = SpecModel.from_pretrained(
        base, tmp_path / "heads", heads_kwargs={"min_probability": 0.0}
    )
    assert isinstance(spec.proposer, BlockProposer)
    inputs = prompts(9)
    expected, _ = generate(base, inputs, max_new_tokens=12)
    assert torch.equal(generate(spec, inputs, max_new_tokens=12)[0], expected)
    spec.save_pretrained(tmp_path / "again")
    read = read_block(tmp_path / "again")
    assert read.config == made.config
    state = made.state_dict()
    assert read.tensors.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in read.tensors.items())
    assert GENERATED_MARK in (tmp_path / "again" / "README.md").read_text()
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["num_target_layers"] == base.config.num_hidden_layers


def test_hub_id_is_downloaded(base, tmp_path, monkeypatch):
    write(tmp_path / "org" / "heads", base)
    (tmp_path / "org" / "heads" / "dspark.py").write_text("raise SystemExit")
    with running_hub(tmp_path, monkeypatch) as hub:
        spec = SpecModel.from_pretrained(base, "org/heads")
        assert {*hub.sent} == {"config.json", "model.safetensors"}
    assert isinstance(spec.proposer, BlockProposer)


def test_static_trees_are_saved_and_loaded(base, tmp_path):
    write(tmp_path / "heads", base)
    spec = SpecModel.from_pretrained(base, tmp_path / "heads", heads_kwargs={"tree": [2, 1]})
    spec.save_pretrained(tmp_path / "heads")
    again = SpecModel.from_pretrained(base, tmp_path / "heads")
    assert again.proposer.config.paths == spec.proposer.config.paths


def test_copies_of_the_bases_matrices_are_shared(base, tmp_path):
    made = heads_for(base, "vanilla", has_own_embeddings=True, has_own_lm_head=True)
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    with torch.no_grad():
        made.embed_tokens.weight.copy_(embeddings.weight)
        made.lm_head.weight.copy_(head.weight)
    write_block(tmp_path, block_checkpoint(made))
    heads = SpecModel.from_pretrained(base, tmp_path).proposer.heads
    assert heads.embed_tokens is None
    assert heads.lm_head is None


def test_heads_of_another_base_are_refused(base, tmp_path):
    for name, changes, error, words in (
        ("layers", {"feature_layers": (1, 9)}, CheckpointError, r"target_layer_ids is \[0, 8\]"),
        ("vocabulary", {"vocab_size": 200}, VocabularyMismatchError, "vocabulary of 200"),
        ("width", {"hidden_size": 48}, OptionError, "width 48"),
    ):
        numbers = heads_for(base, "both ways").config
        numbers = replace(numbers, draft_vocab_size=changes.get("vocab_size", 160), **changes)
        write_block(tmp_path / name, block_checkpoint(BlockHeads(numbers)))
        with pytest.raises(error, match=words):
            SpecModel.from_pretrained(base, tmp_path / name)


def test_options_that_block_heads_do_not_have_are_named(base, tmp_path):
    write(tmp_path, base)
    for wrong, words in (
        ({"num_heads": 3}, "block heads: unknown option 'num_heads', expected some of"),
        ({"dtype": "int8"}, "dtype of the heads is torch.int8"),
        ({"min_acceptance": 2.0}, "min_acceptance is 2.0"),
    ):
        with pytest.raises(OptionError, match=words):
            SpecModel.from_pretrained(base, tmp_path, heads_kwargs=wrong)


def test_heads_next_to_a_base_in_float16_run_in_bfloat16(base, tmp_path, caplog):
    half = build_model("llama", seed=3).half()
    write(tmp_path, base)
    with caplog.at_level("INFO", logger="speclm"):
        spec = SpecModel.from_pretrained(half, tmp_path)
    assert spec.proposer.heads.dtype == torch.bfloat16
    assert "run in bfloat16 next to a base in float16" in caplog.text
    inputs = prompts(9)
    expected, _ = generate(half, inputs, max_new_tokens=8)
    assert torch.equal(generate(spec, inputs, max_new_tokens=8)[0], expected)
    same = SpecModel.from_pretrained(half, tmp_path, heads_kwargs={"dtype": "float16"})
    assert same.proposer.heads.dtype == torch.float16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"kind": "dflash", "confidence_weight": 0.5},
            r"--confidence-weight is 0\.5, found heads without a confidence head; leave it out",
        ),
        ({"temperature": 2.0}, r"--temperature is 2\.0.*pass a --distribution-weight above 0"),
    ],
)
def test_settings_of_a_loss_that_is_not_computed_are_refused(tmp_path, options, words):
    base = build_model("llama", num_hidden_layers=4)
    with pytest.raises(OptionError, match=words):
        BlockRecipe().trainer(
            base,
            training_arguments(tmp_path, {}, defaults=BlockRecipe.defaults),
            options=BlockTrainingOptions(**options),
            train_dataset=[],
        )
