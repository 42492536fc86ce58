"""What is refused of EAGLE heads, and what the message says."""

import pytest
import torch

from speclm.errors import CheckpointError, SpeclmError
from speclm.methods.eagle.checkpoint import find_eagle, read_eagle
from tests.eagle_tables import EAGLE1, EAGLE1_CONFIG, EAGLE3, EAGLE3_CONFIG, save, tensors


@pytest.mark.parametrize("key", [key for key in EAGLE3 if key not in ("t2d", "lm_head.weight")])
def test_every_missing_key_is_an_error(tmp_path, key):
    state = tensors(EAGLE3)
    del state[key]
    if key in ("fc.weight", "midlayer.self_attn.q_proj.weight"):
        words = r"no file has the keys of EAGLE heads"
    else:
        words = rf"key '{key.replace('midlayer.', 'layers.0.')}' is missing.*download"
    with pytest.raises(CheckpointError, match=words):
        read_eagle(save(tmp_path, state))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"extra.weight": (2,)}, r"found key 'extra.weight'.*remove it"),
        ({"mask_hidden": (1, 24)}, r"'mask_hidden'.*P-EAGLE.*not supported"),
        ({"layers.0.mlp.up_proj.weight": (12, 8)}, r"'midlayer.mlp.up_proj.weight'.*same tensor"),
        ({"midlayer.mlp.up_proj.weight": (12, 7)}, r"shape \[12, 7\], expected.*\[12, 8\]"),
        ({"midlayer.self_attn.o_proj.weight": (8, 8)}, r"o_proj.*\[8, 8\], expected.*\[8, 16\]"),
        ({"midlayer.self_attn.q_proj.weight": (16, 8)}, r"q_proj.*expected.*\[16, 16\]"),
        ({"midlayer.self_attn.k_proj.weight": (6, 16)}, r"16 and 6 wide, expected multiples of 4"),
        ({"midlayer.self_attn.q_proj.weight": (12, 16)}, r"queries are 12 wide, expected 16"),
        ({"midlayer.self_attn.q_proj.bias": (16,)}, r"'layers.0.self_attn.k_proj.bias' is missing"),
        ({"midlayer.mlp.gate_proj.weight": (12,)}, r"gate_proj.weight' has shape \[12\].*a matrix"),
        ({"fc.weight": (8, 25)}, r"'fc.weight' reads 25 values, expected a multiple of 3"),
        ({"fc.weight": (8, 27)}, r"has_own_embeddings is off.*target_hidden_size 9"),
        ({"fc_norm.0.weight": (8,)}, r"'feature_norms.1.weight' is missing"),
        ({"layers.2.input_layernorm.weight": (8,)}, r"'layers.1.* is missing"),
        ({"lm_head.weight": (6, 8)}, r"'d2t' is torch.int64 of shape \[5\], expected.*\[6\]"),
        ({"embed_tokens.weight": (21, 8)}, r"'embed_tokens.weight'.*expected.*\[20, 8\]"),
    ],
)
def test_wrong_keys_and_shapes_name_file_key_and_remedy(tmp_path, change, words):
    with pytest.raises(CheckpointError, match=words) as caught:
        read_eagle(save(tmp_path, tensors({**EAGLE3, **change})))
    assert isinstance(caught.value, SpeclmError)
    assert "model.safetensors" in str(caught.value)


def test_parts_of_other_layers_are_refused_in_eagle_1(tmp_path):
    state = tensors({**EAGLE1, "layers.0.input_layernorm.weight": (8,)})
    with pytest.raises(CheckpointError, match=r"'layers.0.input_layernorm.weight', expected none"):
        read_eagle(save(tmp_path, state, config=EAGLE1_CONFIG))


@pytest.mark.parametrize(
    ("lists", "words"),
    [
        ({"d2t": [0, 2, 2, 8, 16]}, r"draft token 4 to 20, expected a token from 0 to 19.*offsets"),
        ({"d2t": [-1, 2, 2, 8, 15]}, r"draft token 0 to -1"),
        ({"d2t": [0, 2, 1, 8, 15]}, r"draft tokens 1 and 2 to 3 and 3, expected increasing"),
        ({"d2t": [0.0, 2.0, 2.0, 8.0, 15.0]}, r"'d2t' is torch.float32.*whole numbers"),
        ({"d2t": [0, 2, 2, 8]}, r"'d2t'.*\[4\], expected.*\[5\]"),
        (
            {"t2d": [token in (0, 3, 5, 11, 19) for token in range(20)]},
            r"token 4.*2 such",
        ),
        ({"t2d": [0.5] * 20}, r"'t2d' is torch.float32"),
    ],
)
def test_draft_vocabularies_that_contradict_themselves_are_refused(tmp_path, lists, words):
    state = tensors(EAGLE3) | {key: torch.tensor(values) for key, values in lists.items()}
    with pytest.raises(CheckpointError, match=words):
        read_eagle(save(tmp_path, state))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_attention_heads": None, "head_dim": None}, r"neither num_attention_heads nor"),
        ({"head_dim": 2}, r"queries are 16 wide, expected 8.*4 heads of head_dim 2"),
        ({"hidden_act": "nothing"}, r"hidden_act is 'nothing'"),
        ({"vocab_size": "x"}, r"vocab_size is 'x', expected int; correct it"),
        ({"head_dim": True}, r"head_dim is True, expected int"),
        ({"rope_scaling": {"type": "other"}}, r"rope_type is 'other', expected one of"),
        ({"rope_scaling": {"type": "linear"}}, r"'linear' name no 'factor'"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0.5, expected 1"),
        ({"eagle_config": 3}, r"eagle_config is 3, expected an object"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2.5, 3]}, r"expected whole numbers"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 1, 3]}, r"\(1, 1, 3\), expected 3 different"),
        ({"num_aux_hidden_states": 2}, r"num_features is 2.*name the feature_layers"),
        ({"norm_before_fc": True}, r"key 'feature_norm.weight' is missing"),
        ({"fc_norm": True}, r"key 'feature_norms.0.weight' is missing"),
    ],
)
def test_config_that_cannot_be_meant_is_refused(tmp_path, change, words):
    with pytest.raises(CheckpointError, match=words):
        read_eagle(save(tmp_path, tensors(EAGLE3), config={**EAGLE3_CONFIG, **change}))


def test_vocabulary_that_nothing_shows_is_refused(tmp_path):
    table = {k: v for k, v in EAGLE3.items() if k != "t2d"}
    config = {**EAGLE3_CONFIG, "vocab_size": None}
    with pytest.raises(CheckpointError, match=r"neither config.json nor a tensor shows vocab_size"):
        read_eagle(save(tmp_path, tensors(table), config=config))


def test_folders_without_heads_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no file has the keys of EAGLE heads"):
        read_eagle(tmp_path)
    save(tmp_path, {"model.layers.0.self_attn.q_proj.weight": torch.ones(2, 2)})
    assert find_eagle(tmp_path) is None
