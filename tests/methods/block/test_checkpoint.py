"""Tensors of block heads: read in every layout, written in one, and what is refused of them."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from speclm.drafting import package
from speclm.errors import CheckpointError, SpeclmError
from speclm.methods.block.checkpoint import (
    block_checkpoint,
    build_block,
    find_block,
    read_block,
    require_writable,
    write_block,
)
from speclm.methods.eagle.checkpoint import find_eagle, read_eagle
from speclm.methods.medusa.checkpoint import find_medusa
from tests.block_tables import (
    CONFIDENCE,
    DEEPSPEC_CONFIG,
    DFLASH,
    DRAFTED,
    DSPARK,
    LAYOUTS,
    LISTS,
    SPECULATORS,
    SPECULATORS_CONFIG,
    ZLAB_CONFIG,
    V,
    changed,
    save,
    tensors,
)
from tests.methods.block.block_heads import MARKOV, make_heads

SAVED = {
    "DSpark": MARKOV,
    "DSpark in place": {**MARKOV, "predicts_next": False},
    "gated": {**MARKOV, "markov": "gated", "has_confidence": False},
    "rnn": {**MARKOV, "markov": "rnn", "is_causal": (False, False)},
    "confidence alone": {"has_confidence": True},
    "JetSpec": {"predicts_next": False},
    "DFlash": {"predicts_next": False, "is_causal": (False, False)},
    "next tokens": {},
    "windows": {"windows": (None, 9), "is_causal": (False, True), "predicts_next": False},
    "open windows": {"windows": (9, 9), "is_causal": (False, False)},
    "biases": {"has_attention_bias": True, "rms_norm_eps": 1e-5, "hidden_act": "gelu"},
    "drafted": {**MARKOV, "draft_vocab_size": 5, "has_own_lm_head": True},
    "own matrices": {"has_own_embeddings": True, "has_own_lm_head": True},
    "embeddings read": {"feature_layers": (0, 6)},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


def heads(case, dtype=torch.bfloat16):
    made = make_heads(**SAVED[case]).to(dtype)
    if made.draft_columns is not None:
        made.set_draft_columns_(torch.tensor(DRAFTED))
    return made


def written(folder):
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_of_every_layout_are_loaded_bit_by_bit(tmp_path, layout):
    table, config = LAYOUTS[layout]
    state = tensors(table, torch.bfloat16)
    loaded = build_block(read_block(save(tmp_path, state, config=config))).state_dict()
    expected = {key: tensor for key, tensor in state.items() if key not in LISTS}
    assert {key for key in loaded if key != "draft_columns"} == set(expected)
    assert all(torch.equal(loaded[key], tensor) for key, tensor in expected.items())
    assert find_medusa(tmp_path) is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_written_and_read_back_equal(tmp_path, layout):
    table, config = LAYOUTS[layout]
    first = read_block(save(tmp_path, tensors(table), config=config))
    folder = tmp_path / "again"
    write_block(folder, first, num_target_layers=36)
    second = read_block(folder, num_target_layers=36)
    assert second.config == first.config
    assert second.base_name_or_path == first.base_name_or_path
    assert second.tensors.keys() == first.tensors.keys()
    assert all(torch.equal(second.tensors[name], t) for name, t in first.tensors.items())


@pytest.mark.parametrize("case", SAVED)
def test_saved_heads_load_back_with_equal_outputs(tmp_path, case):
    made = heads(case, torch.float32)
    write_block(tmp_path, block_checkpoint(made, choices=((0,), (0, 0))))
    read = read_block(tmp_path)
    assert (read.config, read.choices) == (made.config, ((0,), (0, 0)))
    loaded = build_block(read)
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(1, 6, 16, generator=generator)
    embeds = torch.randn(1, 4, 8, generator=generator)
    tokens = torch.tensor([7, 1, 5, 2])[: made.config.num_drafts]
    outputs = []
    for network in (made, loaded):
        positions = torch.arange(6)[None]
        keys, values = network.context(features, network.rotation(positions))
        rotation = network.rotation(positions[:, :4] + 6)
        hidden = network(embeds, rotation, keys, values, [None, None])[0]
        parts = [hidden, network.logits(hidden, lm_head=torch.nn.Identity())]
        if network.markov_head is not None:
            parts.append(network.markov_head.code(tokens, hidden)[0])
        if network.confidence_head is not None:
            parts.append(network.confidence(hidden, tokens))
        outputs.append(parts)
    for mine, theirs in zip(*outputs, strict=True):
        assert torch.equal(mine, theirs)


def test_dspark_is_written_with_the_keys_and_config_of_deepspec(tmp_path):
    folder = tmp_path / "new" / "folder"
    write_block(folder, block_checkpoint(heads("DSpark"), base_name_or_path="org/base"))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    state, config = written(folder)
    other_layers = ("layers.2", "layers.3", "layers.4", "embed", "lm_head")
    expected = {key for key in DSPARK if not key.startswith(other_layers)}
    assert set(state) == expected
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert config == {
        "architectures": ["Qwen3DSparkModel"],
        "model_type": "qwen3",
        "base_model_name_or_path": "org/base",
        "num_hidden_layers": 2,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "vocab_size": 20,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "layer_types": ["full_attention"] * 2,
        "is_causal": True,
        "block_size": 4,
        "mask_token_id": 3,
        "target_layer_ids": [1, 3],
        "markov_rank": 3,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "num_anchors": 512,
    }


def test_dflash_and_jetspec_are_written_as_z_lab_does(tmp_path):
    write_block(tmp_path, block_checkpoint(heads("DFlash")), num_target_layers=6)
    state, config = written(tmp_path)
    assert set(state) == {
        key for key in DFLASH if not key.startswith(("layers.2", "layers.3", "layers.4"))
    }
    assert (config["architectures"], config["block_size"]) == (["DFlashDraftModel"], 4)
    assert config["num_target_layers"] == 6
    assert config["dflash_config"] == {
        "block_size": 4,
        "mask_token_id": 3,
        "target_layer_ids": [1, 3],
    }
    assert not {"is_causal", "markov_rank", "draft_vocab_size", "speclm"} & set(config)
    write_block(tmp_path, block_checkpoint(heads("JetSpec")))
    config = written(tmp_path)[1]
    assert config["is_causal"]
    assert config["dflash_config"]["causal_head"]
    assert "sample_from_anchor" not in config["dflash_config"]


def test_draft_vocabularies_are_written_as_both_lists(tmp_path):
    write_block(tmp_path, block_checkpoint(heads("drafted")))
    state, config = written(tmp_path)
    assert (state["d2t"] + torch.arange(5)).tolist() == DRAFTED
    assert state["t2d"].nonzero()[:, 0].tolist() == DRAFTED
    assert config["draft_vocab_size"] == 5


@pytest.mark.parametrize(
    ("name", "prefix"), [("pytorch_model.bin", ""), ("model.safetensors", "model.")]
)
def test_pickles_and_prefixes_are_read(tmp_path, name, prefix):
    state = {prefix + key: tensor for key, tensor in tensors(DFLASH).items()}
    read = read_block(save(tmp_path, state, name=name))
    assert torch.equal(read.tensors["norm.weight"], state[f"{prefix}norm.weight"])


def test_what_can_be_computed_or_belongs_to_the_base_is_left_out(tmp_path):
    state = tensors(SPECULATORS) | {
        "verifier_lm_head.weight": torch.ones(5, 8),
        "verifier_norm.weight": torch.ones(8),
        "layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
    }
    assert read_block(save(tmp_path, state, config=SPECULATORS_CONFIG)).config.draft_vocab_size == 5


def test_copies_of_the_bases_matrices_are_dropped(tmp_path):
    state = tensors(DSPARK, torch.bfloat16)
    read = read_block(save(tmp_path, state, config=DEEPSPEC_CONFIG))
    base = {"embeddings": state["embed_tokens.weight"].float(), "lm_weight": torch.ones(V, 8)}
    shared = read.share(**base)
    assert not shared.config.has_own_embeddings
    assert shared.config.has_own_lm_head
    assert "embed_tokens.weight" not in shared.tensors
    assert build_block(shared).embed_tokens is None
    assert read.share().tensors.keys() == read.tensors.keys()


def test_confidence_without_the_previous_token_gets_columns_of_zeros(tmp_path):
    state = tensors({**DSPARK, "confidence_head.proj.weight": (1, 8)})
    config = {**DEEPSPEC_CONFIG, "confidence_head_with_markov": False}
    weight = read_block(save(tmp_path, state, config=config)).tensors["confidence_head.proj.weight"]
    assert torch.equal(weight[:, :8], state["confidence_head.proj.weight"])
    assert weight[:, 8:].tolist() == [[0.0] * 3]


def test_eagle_leaves_block_heads_alone(tmp_path):
    folder = save(tmp_path, tensors(DFLASH))
    assert find_block(folder) is not None
    with pytest.raises(CheckpointError, match="of another method, such as a block drafter"):
        read_eagle(folder)
    assert find_eagle(folder) is not None  # so block heads are looked for first


@pytest.mark.parametrize("key", [k for k in SPECULATORS if "layers." not in k and k != "t2d"])
def test_every_missing_key_is_an_error(tmp_path, key):
    state = tensors(SPECULATORS)
    del state[key]
    with pytest.raises(CheckpointError, match=f"model.safetensors: key '{key}' is missing"):
        read_block(save(tmp_path, state, config=SPECULATORS_CONFIG))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"extra.weight": (2,)}, r"found key 'extra.weight'.*remove it"),
        ({"fc.weight_scale": (2,)}, r"'fc.weight_scale'.*quantised; load those in full precision"),
        ({"layers.0.mlp.up_proj.qweight": (2,)}, r"qweight'.*quantised"),
        ({"model.norm.weight": (8,)}, r"'model.norm.weight' and 'norm.weight' are the same tensor"),
        ({"norm.weight": (9,)}, r"'norm.weight' is .* of shape \[9\], expected.*\[8\]"),
        ({"fc.weight": (9, 45)}, r"hidden_norm.weight' is .*\[8\], expected.*\[9\]"),
        ({"fc.weight": (8, 36)}, r"'fc.weight' reads 36 values, 4.5 hidden states 8 wide"),
        ({"fc.weight": (8,)}, r"'fc.weight' has shape \[8\], expected a matrix"),
        ({"layers.4.self_attn.k_proj.weight": (4, 8)}, r"layers.4.*\[4, 8\], expected.*\[8, 8\]"),
        ({"layers.6.mlp.up_proj.weight": (12, 8)}, r"'layers.5.* is missing"),
        ({"layers.0.self_attn.q_proj.weight": (18, 8)}, r"18 and 8 wide, expected multiples of 4"),
        ({"layers.0.self_attn.q_proj.bias": (16,)}, r"'layers.0.self_attn.k_proj.bias' is missing"),
        ({"markov_head.markov_w1.weight": (20, 3)}, r"'markov_head.markov_w2.weight' is missing"),
        ({"markov_head.markov_w2.weight": (20, 3)}, r"found key 'markov_head.markov_w2.weight'"),
        (CONFIDENCE, r"'confidence_head.proj.weight' is .*\[1, 11\], expected.*\[1, 8\]"),
        ({"embed_tokens.weight": (21, 8), "lm_head.weight": (20, 8)}, r"'d2t' is missing"),
        ({"embed_tokens.weight": (20, 7)}, r"'embed_tokens.weight'.*expected.*\[20, 8\]"),
    ],
)
def test_wrong_keys_and_shapes_name_file_key_and_remedy(tmp_path, change, words):
    with pytest.raises(CheckpointError, match=words) as caught:
        read_block(save(tmp_path, tensors({**DFLASH, **change})))
    assert isinstance(caught.value, SpeclmError)
    assert "model.safetensors" in str(caught.value)


def test_other_numbers_than_floating_ones_are_refused(tmp_path):
    state = tensors(DFLASH) | {"layers.1.mlp.up_proj.weight": torch.ones(12, 8, dtype=torch.int8)}
    with pytest.raises(CheckpointError, match=r"up_proj.weight' is torch.int8.*floating numbers"):
        read_block(save(tmp_path, state))


def test_heads_of_the_config_have_to_be_in_the_file(tmp_path):
    state = tensors({key: shape for key, shape in DSPARK.items() if "markov" not in key})
    with pytest.raises(CheckpointError, match=r"'markov_head.markov_w1.weight' is missing"):
        read_block(save(tmp_path, state, config=DEEPSPEC_CONFIG))
    state = tensors({key: shape for key, shape in DSPARK.items() if "confidence" not in key})
    with pytest.raises(CheckpointError, match=r"'confidence_head.proj.weight' is missing"):
        read_block(save(tmp_path, state, config=DEEPSPEC_CONFIG))
    kind = changed(DEEPSPEC_CONFIG, markov_head_type="third")
    with pytest.raises(CheckpointError, match="markov is 'third', expected one of"):
        read_block(save(tmp_path, tensors(DSPARK), config=kind))


def test_values_that_overflow_are_refused_and_bf16_is_named(tmp_path):
    state = tensors(DFLASH, torch.float16)
    state["fc.weight"][0, 0] = float("inf")
    with pytest.raises(CheckpointError, match=r"'fc.weight' .* not finite in torch.float16.*bf16"):
        read_block(save(tmp_path, state))
    state = tensors(DFLASH, torch.bfloat16)
    state["norm.weight"][3] = float("nan")
    with pytest.raises(CheckpointError, match=r"'norm.weight' .* torch.bfloat16.*download"):
        read_block(save(tmp_path, state))
    state["norm.weight"][3] = 1e6
    read = read_block(save(tmp_path, state))
    assert build_block(read).dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match=r"block heads: 'norm.weight'.*bf16"):
        build_block(read, dtype=torch.float16)


def test_sizes_in_the_file_are_compared_with_its_bytes(tmp_path):
    shared = torch.ones(1).expand(8, 40)
    state = tensors(DFLASH) | {"fc.weight": torch.ones(1).expand(80000, 400000)}
    with pytest.raises(CheckpointError, match="bytes, expected at most"):
        read_block(save(tmp_path, state, name="pytorch_model.bin"))
    assert read_block(
        save(tmp_path, tensors(DFLASH) | {"fc.weight": shared}, name="pytorch_model.bin")
    )


def test_layers_for_multi_token_prediction_are_recognised_by_themselves_only(tmp_path):
    mtp = {"mtp.fc.weight": (8, 16), "mtp.layers.0.input_layernorm.weight": (8,)}
    folder = save(tmp_path, tensors(mtp))
    with pytest.raises(CheckpointError, match=r"heads of multi-token prediction \(MTP\)"):
        read_block(folder)
    state = tensors({"model.layers.9.eh_proj.weight": (8, 16)})
    assert find_block(save(tmp_path, state)) is not None
    model = {"model.language_model.layers.0.input_layernorm.weight": (8,), **mtp}
    assert find_block(save(tmp_path, tensors(model))) is None


def test_other_models_are_never_overwritten(tmp_path):
    checkpoint = block_checkpoint(heads("DFlash"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="another model, expected none or those of block"):
        write_block(tmp_path, checkpoint)
    for table in ({"mtp.fc.weight": (2,)}, {**DFLASH, "prefix_gru.weight_ih_l0": (2,)}):
        save(tmp_path, tensors(table))
        with pytest.raises(CheckpointError, match="another model"):
            require_writable(tmp_path)
    save(tmp_path, tensors(DFLASH))
    write_block(tmp_path, checkpoint)
    assert read_block(tmp_path).config == checkpoint.config
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"read in place of model\.safetensors"):
        require_writable(tmp_path)
    with pytest.raises(CheckpointError, match="found a file, expected a folder"):
        require_writable(tmp_path / "config.json")


def test_failed_writing_keeps_the_old_files(tmp_path, monkeypatch):
    write_block(tmp_path, block_checkpoint(heads("DFlash")))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def save_other(state, path, **options):
        first = next(iter(state))
        save_file({**state, first: state[first] + 1}, path, **options)

    save_file = package.save_file
    monkeypatch.setattr(package, "save_file", save_other)
    with pytest.raises(CheckpointError, match="read back differ from what was written"):
        write_block(tmp_path, block_checkpoint(heads("JetSpec")))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_no_library_reads_is_not_written(tmp_path):
    windows = make_heads(windows=(3, 9), is_causal=(True, True))
    mixed = make_heads(is_causal=(True, False))
    for made in (windows, mixed):
        with pytest.raises(CheckpointError, match=r"windows are .* and is_causal .*expected one"):
            write_block(tmp_path / "new", block_checkpoint(made))
    checkpoint = block_checkpoint(heads("DFlash"))
    numbers = replace(checkpoint.config, intermediate_size=16)
    with pytest.raises(CheckpointError, match=r"tensor 'layers.0.mlp.down_proj.weight' has shape"):
        write_block(tmp_path / "new", replace(checkpoint, config=numbers))
    broken = {**checkpoint.tensors, "norm.weight": torch.full((8,), float("nan"))}
    with pytest.raises(CheckpointError, match=r"'norm.weight' has values that are not finite"):
        write_block(tmp_path / "new", replace(checkpoint, tensors=broken))
    assert not (tmp_path / "new").exists()


def test_z_labs_older_files_have_the_block_size_at_the_top(tmp_path):
    assert read_block(save(tmp_path, tensors(DFLASH), config=ZLAB_CONFIG)).config.block_size == 16


@pytest.mark.parametrize("name", ["g_idx", "qweight", "weight_packed"])
def test_heads_without_any_weight_in_full_precision_are_called_quantised(tmp_path, name):
    state = tensors(DFLASH)
    for key in [key for key in state if "_proj" in key]:
        state[key.replace("weight", name)] = state.pop(key)
    with pytest.raises(CheckpointError, match=f"{name}'.*quantised; load those in full precision"):
        read_block(save(tmp_path, state))


def test_folders_without_any_key_of_block_heads_are_refused(tmp_path):
    words = "no file has the keys of block heads, found .*model.safetensors.*name a folder"
    with pytest.raises(CheckpointError, match=words):
        read_block(save(tmp_path, {"wte.weight": torch.ones(2, 2)}))
