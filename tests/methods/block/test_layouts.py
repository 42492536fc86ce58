"""Configs of block drafters, typed from what is published, and what is refused in them."""

import json

import pytest
import torch

from speclm.errors import CheckpointError, SpeclmError
from speclm.methods.block.checkpoint import read_block
from tests.block_tables import (
    CONFIDENCE,
    DEEPSPEC_CONFIG,
    DFLASH,
    DRAFTED,
    DSPARK,
    GATED,
    JETSPEC_CONFIG,
    LAYOUTS,
    MARKOV,
    RNN,
    SPECFORGE_CONFIG,
    SPECULATORS,
    SPECULATORS_CONFIG,
    ZLAB_CONFIG,
    changed,
    save,
    tensors,
)

SLIDING = ["sliding_attention"] * 4 + ["full_attention"]


def read(folder, config, table=DFLASH):
    return read_block(save(folder, tensors(table), config=config)).config


@pytest.mark.parametrize(
    ("layout", "block_size", "is_causal", "predicts_next", "num_drafts"),
    [
        ("z-lab", 16, False, False, 15),
        ("DeepSpec", 7, False, True, 7),
        ("SpecForge", 16, False, True, 16),
        ("JetSpec", 16, True, False, 15),
        ("speculators", 8, False, False, 7),
    ],
)
def test_sizes_layers_and_blocks_are_those_of_the_layout(
    tmp_path, layout, block_size, is_causal, predicts_next, num_drafts
):
    table, config = LAYOUTS[layout]
    found = read(tmp_path, config, table)
    assert (found.hidden_size, found.intermediate_size, found.num_layers) == (8, 12, 5)
    assert (found.num_heads, found.num_kv_heads, found.head_dim) == (4, 2, 4)
    assert found.feature_layers == (2, 10, 18, 26, 34)
    assert (found.vocab_size, found.mask_token_id) == (20, 19)
    assert found.windows == (None,) * 5
    assert found.rope_parameters["rope_theta"] == (5e5 if layout == "speculators" else 1e6)
    assert (found.rms_norm_eps, found.max_position_embeddings) == (1e-6, 64)
    assert (found.block_size, found.num_drafts) == (block_size, num_drafts)
    assert found.is_causal == (is_causal,) * 5
    assert found.predicts_next == predicts_next
    is_dspark = layout in ("DeepSpec", "SpecForge")
    assert (found.markov, found.markov_rank) == (("vanilla", 3) if is_dspark else (None, 0))
    assert found.has_confidence == is_dspark


def test_copies_and_draft_vocabularies_are_read(tmp_path):
    for layout, folder in ((name, tmp_path / name) for name in ("DeepSpec", "speculators")):
        folder.mkdir()
        table, config = LAYOUTS[layout]
        found = read_block(save(folder, tensors(table), config=config))
        if layout == "DeepSpec":
            assert found.config.has_own_embeddings
            assert not found.config.has_draft_vocab
        else:
            assert found.config.draft_vocab_size == 5
            assert found.tensors["draft_columns"].tolist() == DRAFTED
            assert found.base_name_or_path == "org/base"
        assert found.config.has_own_lm_head


@pytest.mark.parametrize(("parts", "kind"), [(GATED, "gated"), (RNN, "rnn")])
def test_other_markov_heads_are_shown_by_their_tensors(tmp_path, parts, kind):
    config = changed(DEEPSPEC_CONFIG, markov_head_type=None)
    found = read(tmp_path, config, {**DSPARK, **parts})
    assert (found.markov, found.markov_rank) == (kind, 3)


def test_embeddings_are_layer_minus_one_and_layers_may_stand_in_any_order(tmp_path):
    config = {**DEEPSPEC_CONFIG, "target_layer_ids": [-1, 30, 2, 1, 35]}
    assert read(tmp_path, config, DSPARK).feature_layers == (0, 31, 3, 2, 36)
    config = {**SPECULATORS_CONFIG, "aux_hidden_state_layer_ids": [0, 31, 3, 2, 36]}
    assert read(tmp_path, config, SPECULATORS).feature_layers == (0, 31, 3, 2, 36)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [True] * 4 + [False]),
        ({"is_causal": False}, [False] * 5),
        ({"causal": True}, [True] * 5),
        ({"is_causal": False, "causal": True, "causal_head": True}, [False] * 5),
        ({"causal": False, "causal_head": True}, [False] * 5),
        ({"causal_head": True}, [True] * 5),
        ({"sliding_window_non_causal": True}, [False] * 5),
        ({"sliding_window_non_causal": True, "is_causal": True}, [True] * 5),
    ],
)
def test_causality_is_what_the_config_says_else_that_of_sliding_layers(tmp_path, changes, expected):
    base = {**ZLAB_CONFIG, "layer_types": SLIDING, "sliding_window": 9, "use_sliding_window": True}
    inner = {n: v for n, v in changes.items() if n in ("causal", "causal_head")}
    outer = {n: v for n, v in changes.items() if n not in inner}
    config = {**base, **outer, "dflash_config": {**ZLAB_CONFIG["dflash_config"], **inner}}
    found = read(tmp_path, config)
    assert found.is_causal == tuple(expected)
    assert found.windows == (9, 9, 9, 9, None)


def test_windows_of_all_layers_may_stand_with_the_drafting(tmp_path):
    inner = {**ZLAB_CONFIG["dflash_config"], "use_swa": True, "swa_window_size": 1024}
    found = read(tmp_path, {**ZLAB_CONFIG, "dflash_config": inner})
    assert found.windows == (1024,) * 5
    assert found.is_causal == (True,) * 5


def test_longer_lists_of_layers_are_those_of_the_base(tmp_path):
    assert read(tmp_path, {**ZLAB_CONFIG, "layer_types": ["full_attention"] * 36}).num_layers == 5


@pytest.mark.parametrize(
    ("num_drafts", "predicts_next"), [(8, True), (7, False), (5, None), ("x", None), (None, None)]
)
def test_dspark_of_older_speculators_is_read_by_its_drafts(tmp_path, num_drafts, predicts_next):
    methods = [{"proposal_type": "greedy", "speculative_tokens": num_drafts}]
    config = {
        **changed(SPECULATORS_CONFIG, sample_from_anchor=None),
        "speculators_model_type": "dspark",
        "draft_vocab_size": 20,
        "speculators_config": {"proposal_methods": methods if num_drafts else None},
    }
    table = {**DFLASH, **MARKOV, **CONFIDENCE}
    if predicts_next is None:
        with pytest.raises(CheckpointError, match=r"names neither sample_from_anchor nor.*add"):
            read(tmp_path, config, table)
        return
    assert read(tmp_path, config, table).predicts_next == predicts_next
    told = {**config, "sample_from_anchor": True}
    assert read(tmp_path, told, table).predicts_next


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_layer_ids": None}, "names no target_layer_ids, the layers of the base.*add"),
        ({"target_layer_ids": []}, "names no target_layer_ids"),
        (
            {"target_layer_ids": [1, 9, 17, 25, 36]},
            r"target_layer_ids.*from -1 to 35 for a base of",
        ),
        ({"target_layer_ids": [1, 9, 17, 25, -2]}, "target_layer_ids .* whole numbers from -1"),
        ({"target_layer_ids": [1, 9, 17, 25, "4"]}, "target_layer_ids .* whole numbers"),
        ({"target_layer_ids": [1, 9, 17, 17, 25]}, "target_layer_ids .* different whole numbers"),
        ({"target_layer_ids": [1, 9, 17]}, r"'fc.weight' reads 40 values, 5 .* expected 3 of them"),
        ({"target_layer_ids": 7}, "target_layer_ids is 7, expected list"),
        ({"block_size": None}, "names no block_size, and no tensor shows it; add"),
        ({"block_size": 1}, "block_size is 1, expected 2 to 64"),
        ({"block_size": 65}, "block_size is 65, expected 2 to 64"),
        ({"block_size": "8"}, "block_size is '8', expected int"),
        ({"mask_token_id": None}, "names no mask_token_id"),
        ({"mask_token_id": 20}, "mask_token_id is 20, expected 0 to 19"),
        ({"mask_token_id": -1}, "mask_token_id is -1, expected 0 to 19"),
        ({"mask_token_id": True}, "mask_token_id is True, expected int"),
        ({"dflash_config": 3}, "dflash_config is 3, expected an object"),
        ({"vocab_size": None}, "neither config.json nor a tensor shows vocab_size"),
        ({"draft_vocab_size": 5}, "'lm_head.weight' is missing, expected it with 5 rows"),
        ({"layer_types": ["full_attention"]}, "layer_types .* expected .* for each of 5 layers"),
        ({"layer_types": ["linear_attention"] * 5}, "layer_types .*'linear_attention'"),
        ({"layer_types": SLIDING}, "no sliding_window in use.*add sliding_window"),
        ({"layer_types": SLIDING, "sliding_window": 9}, "no sliding_window in use"),
        ({"hidden_act": "tanhish"}, "hidden_act is 'tanhish'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "name no 'factor'"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        (
            {"quantization_config": {"bits": 4}},
            "quantization_config in config.json is.*expected none",
        ),
        ({"input_embedding_scale": 62.0}, "input_embedding_scale in config.json is 62.0"),
        ({"final_logit_softcapping": 20.0}, "final_logit_softcapping"),
        ({"attention_mode": "mla"}, "attention_mode in config.json is 'mla'"),
        ({"rope_is_neox_style": False}, "rope_is_neox_style"),
        ({"use_qk_norm": False}, "use_qk_norm"),
        ({"is_causal": "yes"}, "is_causal is 'yes', expected bool"),
        ({"speclm": {"choices": [[9], [0, 1]]}}, "choices is no tree"),
    ],
)
def test_values_that_cannot_be_right_are_named(tmp_path, changes, words):
    folder = save(tmp_path, tensors(DFLASH), config=changed(ZLAB_CONFIG, **changes))
    with pytest.raises(CheckpointError, match=words) as caught:
        read_block(folder)
    assert isinstance(caught.value, SpeclmError)
    assert str(tmp_path) in str(caught.value)


def test_heads_without_a_config_are_refused_since_their_layers_cannot_be_known(tmp_path):
    with pytest.raises(CheckpointError, match="shows vocab_size"):
        read_block(save(tmp_path, tensors(DFLASH), config=None))
    with pytest.raises(CheckpointError, match="names no target_layer_ids"):
        read_block(save(tmp_path, tensors(DSPARK), config=None))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="found a list, expected a JSON object"):
        read_block(tmp_path)


def test_layers_that_the_base_does_not_have_are_refused(tmp_path):
    folder = save(tmp_path, tensors(DFLASH))
    assert read_block(folder, num_target_layers=36).config.feature_layers[-1] == 34
    assert read_block(folder, num_target_layers=34)
    with pytest.raises(CheckpointError, match=r"target_layer_ids is \[1, 9.*up to 23, the layers"):
        read_block(folder, num_target_layers=24)


@pytest.mark.parametrize(
    ("keys", "changes", "name"),
    [
        (["prefix_gru.weight_ih_l0", "embed_proj.0.weight"], {}, "Domino"),
        ([], {"dflash_config": {"projector_type": "domino"}}, "Domino"),
        (["candidate_selector.successor_codebook"], {}, "DFlash 2"),
        (["layers.0.attention_conv.base_kernel"], {}, "DFlash 2"),
        ([], {"speculators_model_type": "dflash2"}, "DFlash 2"),
        (["mask_hidden"], {}, "P-EAGLE"),
        (["mtp.fc.weight"], {}, "multi-token prediction"),
    ],
)
def test_other_methods_are_named(tmp_path, keys, changes, name):
    state = tensors({**DFLASH, **dict.fromkeys(keys, (2,))})
    folder = save(tmp_path, state, config={**ZLAB_CONFIG, **changes})
    with pytest.raises(CheckpointError, match=f"these are heads of {name}.*, expected those of"):
        read_block(folder)


def test_numbers_that_differ_from_the_tensors_are_logged(tmp_path, caplog):
    config = {**ZLAB_CONFIG, "num_hidden_layers": 4, "hidden_size": 16}
    assert read(tmp_path, config).num_layers == 5
    assert "hidden_size 16 (found 8), num_hidden_layers 4 (found 5)" in caplog.text


def test_specforge_names_causality_at_the_top(tmp_path):
    config = {**changed(SPECFORGE_CONFIG, enable_confidence_head=False), "is_causal": True}
    found = read(tmp_path, config, {**DFLASH, **MARKOV})
    assert found.is_causal == (True,) * 5
    assert (found.markov, found.has_confidence) == ("vanilla", False)


def test_dflash_of_deepspec_drafts_at_every_position(tmp_path):
    config = {**DEEPSPEC_CONFIG, "markov_rank": 0, "enable_confidence_head": False}
    found = read(tmp_path, changed(config, markov_head_type=None), DFLASH)
    assert (found.markov, found.has_confidence, found.predicts_next) == (None, False, True)


def test_jetspec_differs_from_dflash_by_its_mask_only(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    causal, both = read(first, JETSPEC_CONFIG), read(second, ZLAB_CONFIG)
    assert causal.is_causal != both.is_causal
    assert json.dumps(causal.feature_layers) == json.dumps(both.feature_layers)
    assert torch.equal(read_block(first).tensors["fc.weight"], tensors(DFLASH)["fc.weight"])


def test_vocabulary_is_that_of_the_markov_heads_embeddings(tmp_path, caplog):
    table = {key: shape for key, shape in DSPARK.items() if key[:2] not in ("em", "lm")}
    for config in (
        changed(DEEPSPEC_CONFIG, vocab_size=None),
        {**DEEPSPEC_CONFIG, "vocab_size": 24},
    ):
        found = read(tmp_path, config, table)
        assert (found.vocab_size, found.draft_vocab_size) == (20, 20)
    assert "config.json says vocab_size 24 (found 20)" in caplog.text
