"""Layouts of EAGLE heads, typed from their key tables."""

import json
import logging
import os

import pytest
import torch

from speclm.errors import CheckpointError, OptionError
from speclm.methods.eagle.checkpoint import read_eagle
from speclm.methods.eagle.network import build_eagle
from speclm.methods.medusa.checkpoint import find_medusa
from tests.eagle_tables import (
    DRAFT,
    DRAFTED,
    EAGLE1,
    EAGLE1_CONFIG,
    EAGLE3,
    EAGLE3_CONFIG,
    INNER,
    SPECULATORS_CONFIG,
    H,
    V,
    renamed,
    save,
    tensors,
)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_eagle_1_is_read(tmp_path, name, prefix):
    state = tensors({prefix + key: shape for key, shape in EAGLE1.items()})
    read = read_eagle(save(tmp_path, state, name=name, config=EAGLE1_CONFIG))
    config = read.config
    assert (config.kind, config.num_layers, config.num_features) == ("eagle", 1, 1)
    assert (config.hidden_size, config.target_hidden_size, config.intermediate_size) == (
        H,
        H,
        INNER,
    )
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 2)
    assert (config.vocab_size, config.draft_vocab_size) == (V, V)
    assert (config.fc_bias, config.attention_bias) == (True, False)
    assert (config.has_own_embeddings, config.has_own_lm_head) == (True, False)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert (config.rms_norm_eps, config.max_position_embeddings) == (1e-5, 64)
    heads = build_eagle(read)
    for key, tensor in state.items():
        assert torch.equal(heads.state_dict()[key.removeprefix("model.")], tensor)
    assert find_medusa(tmp_path) is None


def test_eagle_1_of_qwen_has_biases_and_may_lack_that_of_fc_and_embeddings(tmp_path):
    table = {k: v for k, v in EAGLE1.items() if k not in ("fc.bias", "embed_tokens.weight")}
    table |= {f"layers.0.self_attn.{part}_proj.bias": (8 if part == "q" else 4,) for part in "qkv"}
    config = {**EAGLE1_CONFIG, "qkv_bias": True, "bias": False, "rope_theta": 1000000.0}
    read = read_eagle(save(tmp_path, tensors(table, torch.float16), config=config))
    assert (read.config.fc_bias, read.config.attention_bias) == (False, True)
    assert not read.config.attention_output_bias
    assert not read.config.has_own_embeddings
    assert read.config.rope_parameters["rope_theta"] == 1000000.0
    assert read.dtype == torch.float16
    assert build_eagle(read).dtype == torch.float16


@pytest.mark.parametrize("offsets", [torch.int32, torch.int64])
@pytest.mark.parametrize("layout", ["midlayer.", "layers.0.", "model.layers.0.", "model.midlayer."])
def test_eagle_3_is_read(tmp_path, layout, offsets):
    state = tensors(renamed(EAGLE3, "midlayer.", layout), torch.bfloat16)
    state["d2t"] = state["d2t"].to(offsets)
    read = read_eagle(save(tmp_path, state))
    config = read.config
    assert (config.kind, config.num_features, config.feature_layers) == ("eagle3", 3, None)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 4)
    assert (config.vocab_size, config.draft_vocab_size) == (V, DRAFT)
    assert (config.has_own_embeddings, config.has_own_lm_head) == (False, True)
    assert not config.norm_before_residual
    assert read.dtype == torch.bfloat16
    heads = build_eagle(read, dtype=torch.float32)
    assert heads.dtype == torch.float32
    assert heads.draft_columns.tolist() == DRAFTED
    loaded = heads.state_dict()
    key = "self_attn.v_proj.weight"
    assert torch.equal(loaded[f"layers.0.{key}"], state[layout + key].float())
    hidden = heads.fuse(torch.randn(1, 2, 24))
    found = heads(hidden, torch.randn(1, 2, H), position_ids=torch.arange(2)[None])
    assert heads.logits(found, lm_head=torch.nn.Identity()).shape == (1, 2, DRAFT)


def test_eagle_3_of_speculators_is_read_from_its_nested_config(tmp_path):
    table = renamed(EAGLE3, "midlayer.", "layers.0.")
    table |= {"input_norm.weight": (24,), "embed_tokens.weight": (20, 8)}
    table |= {f"layers.0.self_attn.{part}_norm.weight": (4,) for part in "qk"}
    table |= {"verifier_norm.weight": (8,), "layers.0.self_attn.rotary_emb.inv_freq": (2,)}
    read = read_eagle(save(tmp_path, tensors(table), config=SPECULATORS_CONFIG))
    config = read.config
    assert read.base_name_or_path == "org/base"
    assert config.norm_before_residual
    assert config.norm_before_fc
    assert config.norm_output
    assert not config.fc_norm
    assert config.has_qk_norm
    assert config.feature_layers == (1, 4, 8)
    assert (config.head_dim, config.vocab_size, config.sliding_window) == (4, V, 16)
    assert config.rope_parameters["rope_theta"] == 500000.0
    assert "verifier_norm.weight" not in build_eagle(read).state_dict()


def test_eagle_3_of_modelopt_is_read_without_its_lists(tmp_path):
    table = renamed(EAGLE3, "midlayer.", "layers.0.")
    del table["t2d"]
    options = {"eagle_aux_hidden_state_layer_ids": [1, 5, 8], "norm_before_fc": None}
    read = read_eagle(
        save(tmp_path, tensors(table), config={**EAGLE3_CONFIG, "eagle_config": options})
    )
    assert read.config.feature_layers == (1, 5, 8)
    assert read.tensors["draft_columns"].tolist() == DRAFTED


@pytest.mark.parametrize(
    "names",
    [["fc_norm.0", "fc_norm.1", "fc_norm.2"], ["aux_norm_low", "aux_norm_mid", "aux_norm_high"]],
)
def test_norms_of_single_features_are_read(tmp_path, names):
    state = tensors({**EAGLE3, **{f"{name}.weight": (8,) for name in names}})
    read = read_eagle(save(tmp_path, state, config={**EAGLE3_CONFIG, "norm_output": True}))
    assert read.config.fc_norm
    assert read.config.norm_output
    loaded = build_eagle(read).state_dict()
    for index, name in enumerate(names):
        assert torch.equal(loaded[f"feature_norms.{index}.weight"], state[f"{name}.weight"])


def test_full_vocabulary_needs_no_lists_and_may_share_the_targets_matrix(tmp_path):
    table = {k: v for k, v in EAGLE3.items() if k not in ("d2t", "t2d")}
    config = {**EAGLE3_CONFIG, "draft_vocab_size": None}
    read = read_eagle(save(tmp_path, tensors({**table, "lm_head.weight": (20, 8)}), config=config))
    assert (read.config.draft_vocab_size, read.config.has_own_lm_head) == (V, True)
    del table["lm_head.weight"]
    read = read_eagle(save(tmp_path, tensors(table), config=config))
    assert (read.config.draft_vocab_size, read.config.has_own_lm_head) == (V, False)
    state = tensors({**EAGLE3, "lm_head.weight": (20, 8)})
    state |= {"d2t": torch.zeros(20, dtype=torch.int64), "t2d": torch.ones(20, dtype=torch.bool)}
    read = read_eagle(save(tmp_path, state, config=config))
    assert build_eagle(read).draft_columns is None


def test_other_width_and_several_layers_are_read(tmp_path):
    table = {**EAGLE3, "fc.weight": (8, 18), "embed_tokens.weight": (20, 8)}
    table |= {k.replace("layers.0.", "layers.1."): v for k, v in EAGLE1.items() if "layers.0" in k}
    table |= {
        "layers.1.self_attn.q_proj.weight": (16, 8),
        "layers.1.self_attn.k_proj.weight": (8, 8),
        "layers.1.self_attn.v_proj.weight": (8, 8),
        "layers.1.self_attn.o_proj.weight": (8, 16),
        "layers.1.input_layernorm.weight": (8,),
    }
    config = {**EAGLE3_CONFIG, "target_hidden_size": 6, "num_hidden_layers": 2}
    read = read_eagle(save(tmp_path, tensors(table), config=config))
    assert (read.config.target_hidden_size, read.config.num_layers) == (6, 2)
    assert build_eagle(read).fuse(torch.randn(1, 1, 18)).shape == (1, 1, H)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_are_read(tmp_path, suffix):
    state, weight_map = tensors(EAGLE3), {}
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    for number, keys in enumerate((sorted(state)[:7], sorted(state)[7:])):
        name = f"{stem}-0000{number + 1}-of-00002.{suffix}"
        save(tmp_path, {key: state[key] for key in keys}, name=name)
        weight_map |= dict.fromkeys(keys, name)
    index = tmp_path / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    read = read_eagle(tmp_path)
    assert torch.equal(read.tensors["norm.weight"], state["norm.weight"])
    (tmp_path / f"{stem}-00002-of-00002.{suffix}").unlink()
    with pytest.raises(CheckpointError, match=r"file is missing.*index says"):
        read_eagle(tmp_path)


def test_config_wrapped_for_old_vllm_and_its_copied_output_matrix_are_read(tmp_path):
    state = tensors({**EAGLE1, "lm_head.weight": (20, 8)})
    config = {"model_type": "eagle", "model": EAGLE1_CONFIG, "eagle_fc_bias": True}
    read = read_eagle(save(tmp_path, state, config=config))
    assert read.config.kind == "eagle"
    assert read.config.has_own_lm_head
    shared = read.share(lm_weight=state["lm_head.weight"], embeddings=torch.zeros(20, 8))
    assert (shared.config.has_own_lm_head, shared.config.has_own_embeddings) == (False, True)
    assert build_eagle(shared).lm_head is None


def test_copies_of_the_targets_matrices_are_shared_across_dtypes(tmp_path):
    target = torch.randn(20, 8).bfloat16()
    state = tensors(EAGLE1) | {"embed_tokens.weight": target.float()}
    read = read_eagle(save(tmp_path, state, config=EAGLE1_CONFIG))
    assert not read.share(embeddings=target).config.has_own_embeddings
    assert "embed_tokens.weight" not in read.share(embeddings=target).tensors
    assert read.share().tensors == read.tensors
    for other in (target[:19], target + 1, target.to("meta")):
        assert read.share(embeddings=other).config == read.config


ROPES = [
    ({"rope_theta": 500.0}, {"rope_type": "default", "rope_theta": 500.0}),
    (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    ),
    (
        {"rope_theta": 7.0, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
        {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 7.0},
    ),
    (
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 9.0}},
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 9.0},
    ),
    (
        {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1]}, "rope_theta": 3.0},
        {"rope_type": "default", "rope_theta": 3.0},
    ),
    ({"rope_scaling": None, "rope_theta": None}, {"rope_type": "default", "rope_theta": 10000.0}),
]


@pytest.mark.parametrize(("named", "expected"), ROPES)
def test_rotation_is_that_of_the_heads_config_old_or_new(tmp_path, named, expected):
    read = read_eagle(save(tmp_path, tensors(EAGLE3), config={**EAGLE3_CONFIG, **named}))
    assert read.config.rope_parameters == expected
    assert build_eagle(read).rotary.inv_freq.isfinite().all()


def test_sizes_come_from_tensors_and_a_wrong_config_is_logged_once(tmp_path, caplog):
    config = {**EAGLE3_CONFIG, "num_key_value_heads": 1, "intermediate_size": 99, "head_dim": None}
    with caplog.at_level(logging.WARNING, logger="speclm"):
        read = read_eagle(save(tmp_path, tensors(EAGLE3), config=config))
    assert (read.config.num_key_value_heads, read.config.head_dim) == (2, 4)
    (record,) = caplog.records
    assert "num_key_value_heads 1 (found 2)" in record.getMessage()
    assert "intermediate_size 99 (found 12)" in record.getMessage()


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path):
    sign = tmp_path / "executed"
    save(tmp_path, {**tensors(EAGLE1), "x": Evil(sign)}, name="pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin.*would run code.*safetensors"):
        read_eagle(tmp_path)
    assert not sign.exists()


def with_map(folder, tokens, *, name="freq_5.pt", more=(), **config):
    """Return a folder of EAGLE-1 heads with FR-Spec's token map."""
    table = {**EAGLE1, **dict(more)}
    save(folder, tensors(table), config={**EAGLE1_CONFIG, **config})
    torch.save(tokens, folder / name)
    return folder


@pytest.mark.parametrize("tokens", [DRAFTED[::-1], torch.tensor(DRAFTED, dtype=torch.int32)])
def test_a_token_map_reduces_the_draft_vocabulary_of_eagle_1(tmp_path, tokens):
    more = {"lm_head.weight": (V, H)}
    read = read_eagle(with_map(tmp_path, tokens, more=more))
    assert (read.config.kind, read.config.draft_vocab_size) == ("eagle", DRAFT)
    assert read.tensors["draft_columns"].tolist() == DRAFTED
    whole = read_eagle(tmp_path, token_map="all")
    assert not whole.config.has_draft_vocab
    matrix = whole.tensors["lm_head.weight"]
    assert torch.equal(read.tensors["lm_head.weight"], matrix[DRAFTED])
    states, heads = torch.randn(3, H), build_eagle(whole)
    expected = heads.logits(states, lm_head=torch.nn.Identity())[:, DRAFTED]
    assert torch.equal(build_eagle(read).logits(states, lm_head=torch.nn.Identity()), expected)
    shared = read.share(lm_weight=matrix[DRAFTED])  # as with the base's own rows
    found = build_eagle(shared)
    logits = found.logits(states, lm_head=found.among_drafted(lambda rows: rows @ matrix.T))
    assert torch.equal(logits, (states @ matrix.T)[:, DRAFTED])


def test_one_of_several_token_maps_is_chosen_by_its_size_or_by_name(tmp_path):
    folder = with_map(with_map(tmp_path, DRAFTED), [2, 1], name="freq_2.pt")
    with pytest.raises(CheckpointError, match=r"found 2 token maps \['freq_2.pt', 'freq_5.pt'\]"):
        read_eagle(folder)
    assert read_eagle(folder, token_map="freq_2.pt").config.draft_vocab_size == 2
    assert read_eagle(folder, token_map=folder / "freq_5.pt").config.draft_vocab_size == DRAFT
    save(folder, tensors(EAGLE1), config={**EAGLE1_CONFIG, "hot_vocab_size": 2})
    assert read_eagle(folder).tensors["draft_columns"].tolist() == [1, 2]
    (folder / "freq_2.pt").unlink()
    with pytest.raises(CheckpointError, match=r"freq_5.pt: found 5 tokens, expected 2"):
        read_eagle(folder)
    for file in folder.glob("*.pt"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"found 0 token maps .*hot_vocab_size 2"):
        read_eagle(folder)
    save(folder, tensors(EAGLE3), config=EAGLE3_CONFIG)
    with pytest.raises(OptionError, match=r"token_map is 'all', while the heads .* leave it out"):
        read_eagle(folder, token_map="all")


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([3, 7, 3], r"freq_5.pt: found token 3 twice"),
        ([-1, 7], r"found token -1, expected ids"),
        ([1, V], r"found token 20, expected ids up to 19.*belongs to another base"),
        ([], "expected a pickled list of whole numbers"),
        ([True, 2.5], "expected a pickled list of whole numbers"),
        ([1 << 70], "freq_5.pt: cannot be read"),
        (torch.ones(3), "found an empty Tensor or one of other things"),
        (torch.tensor(1).expand(10**9), r"8000000000 bytes, expected at most"),
        ({"ids": DRAFTED}, "found an empty dict or one of other things"),
        (["code"], "damaged or would run code"),
    ],
)
def test_token_maps_that_are_none_are_refused_and_run_nothing(tmp_path, tokens, words):
    sign = tmp_path / "executed"
    tokens = Evil(sign) if tokens == ["code"] else tokens
    with pytest.raises(CheckpointError, match=words):
        read_eagle(with_map(tmp_path, tokens))
    assert not sign.exists()
