"""EAGLE heads as they are written, by the key tables of those that read them."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from speclm.drafting import package
from speclm.errors import CheckpointError
from speclm.files import atomic as files
from speclm.methods.eagle import checkpoint as eagle_checkpoint
from speclm.methods.eagle.checkpoint import EagleCheckpoint, read_eagle, write_eagle
from speclm.methods.eagle.config import EagleConfig
from speclm.methods.eagle.network import EagleHeads
from tests.eagle_tables import DRAFTED, EAGLE1, EAGLE3, H, V

NUMBERS = {
    "hidden_size": H,
    "intermediate_size": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": V,
    "target_hidden_size": H,
}
OF_3 = {"kind": "eagle3", "draft_vocab_size": 5, "num_features": 3, "has_own_lm_head": True}
OF_1 = {"kind": "eagle", "draft_vocab_size": V, "head_dim": 2}


def checkpoint(dtype=torch.float32, **numbers):
    kind = numbers.pop("kind", "eagle3")
    config = EagleConfig(**{**NUMBERS, **(OF_3 if kind == "eagle3" else OF_1), **numbers})
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: torch.randn(tensor.shape, generator=generator).to(dtype)
        for name, tensor in EagleHeads(config, device=torch.device("meta")).state_dict().items()
    }
    if config.has_draft_vocab:
        tensors["draft_columns"] = torch.tensor(DRAFTED)
    return EagleCheckpoint(config, tensors, base_name_or_path="org/base")


def written(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no dict
    return tensors, json.loads((folder / "config.json").read_text())


def test_eagle_3_has_the_keys_and_config_that_engines_read(tmp_path):
    folder = tmp_path / "new" / "folder"
    write_eagle(folder, checkpoint(torch.bfloat16), num_target_layers=12)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    tensors, config = written(folder)
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == EAGLE3
    assert tensors["d2t"].dtype == torch.int64
    assert (tensors["d2t"] + torch.arange(5)).tolist() == DRAFTED
    assert tensors["t2d"].nonzero()[:, 0].tolist() == DRAFTED
    assert config == {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "base_model_name_or_path": "org/base",
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "num_hidden_layers": 1,
        "vocab_size": 20,
        "draft_vocab_size": 5,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "attention_bias": False,
    }


def test_eagle_1_has_the_keys_and_config_that_engines_read(tmp_path):
    write_eagle(tmp_path, checkpoint(kind="eagle", has_own_embeddings=True, fc_bias=True))
    tensors, config = written(tmp_path)
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == EAGLE1
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["bias"], config["qkv_bias"]) == (True, False)
    assert "draft_vocab_size" not in config
    write_eagle(tmp_path, checkpoint(kind="eagle", attention_bias=True))
    tensors, config = written(tmp_path)
    assert not {"fc.bias", "embed_tokens.weight", "lm_head.weight"} & tensors.keys()
    assert (config["bias"], config["qkv_bias"]) == (False, True)


def test_all_tokens_are_listed_unless_the_output_matrix_is_the_targets(tmp_path):
    write_eagle(tmp_path, checkpoint(draft_vocab_size=V))
    tensors, config = written(tmp_path)
    assert (tensors["d2t"] == 0).all()
    assert tensors["t2d"].all()
    assert config["draft_vocab_size"] == V
    write_eagle(tmp_path, checkpoint(draft_vocab_size=V, has_own_lm_head=False))
    tensors, config = written(tmp_path)
    assert not {"d2t", "t2d", "lm_head.weight"} & tensors.keys()
    assert config["draft_vocab_size"] is None


@pytest.mark.parametrize(
    ("layers", "named"), [((2, 6, 9), None), ((1, 5, 8), None), ((3, 6, 9), [3, 6, 9])]
)
def test_hidden_states_are_named_only_if_they_are_not_the_usual_ones(tmp_path, layers, named):
    heads = checkpoint(feature_layers=layers)
    write_eagle(tmp_path, heads, num_target_layers=12)
    config = written(tmp_path)[1].get("eagle_config", {})
    assert config.get("eagle_aux_hidden_state_layer_ids") == named
    found = read_eagle(tmp_path).config
    assert found.layers_to_read(12) == heads.config.layers_to_read(12)
    write_eagle(tmp_path, heads)
    assert read_eagle(tmp_path).config.feature_layers == layers


def test_static_tree_is_stored_and_a_broken_one_is_refused(tmp_path):
    write_eagle(tmp_path, replace(checkpoint(), choices=((0,), (1,), (0, 0))))
    assert read_eagle(tmp_path).choices == ((0,), (1,), (0, 0))
    config = written(tmp_path)[1]
    assert config["speclm"] == {"choices": [[0], [1], [0, 0]]}
    broken = {**config, "speclm": {"choices": [[0, 0]]}}
    (tmp_path / "config.json").write_text(json.dumps(broken))
    with pytest.raises(CheckpointError, match=r"speclm.choices is no tree.*remove it"):
        read_eagle(tmp_path)


def test_options_of_eagle_3_1_and_other_widths_are_named(tmp_path):
    options = {"norm_before_residual": True, "fc_norm": True, "norm_output": True}
    heads = checkpoint(**options, target_hidden_size=6, has_own_embeddings=True, num_layers=2)
    write_eagle(tmp_path, heads)
    tensors, config = written(tmp_path)
    assert {name: config[name] for name in options} == options
    assert config["target_hidden_size"] == 6
    assert tensors["fc_norm.2.weight"].shape == (6,)
    assert "layers.1.input_layernorm.weight" in tensors
    write_eagle(tmp_path, checkpoint(norm_before_fc=True))
    tensors, config = written(tmp_path)
    assert tensors["input_norm.weight"].shape == (24,)
    assert config["norm_before_fc"]
    write_eagle(tmp_path, checkpoint(has_qk_norm=True))
    assert written(tmp_path)[1]["architectures"] == ["Eagle3Qwen3ForCausalLM"]


@pytest.mark.parametrize(
    ("rope", "scaling"),
    [
        ({"rope_type": "linear", "factor": 2.0}, {"type": "linear", "factor": 2.0}),
        (
            {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32},
            {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32},
        ),
    ],
)
def test_scaled_rotation_is_written_as_old_configs_have_it(tmp_path, rope, scaling):
    heads = checkpoint(rope_parameters={**rope, "rope_theta": 7.0})
    write_eagle(tmp_path, heads)
    config = written(tmp_path)[1]
    assert (config["rope_theta"], config["rope_scaling"]) == (7.0, scaling)
    assert read_eagle(tmp_path).config == heads.config


@given(
    kind=st.sampled_from(["eagle", "eagle3"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    num_layers=st.integers(1, 2),
    switches=st.sets(
        st.sampled_from(
            [
                *("attention_bias", "attention_output_bias", "has_qk_norm", "fc_bias"),
                *("has_own_embeddings", "norm_output", "norm_before_residual", "norm_before_fc"),
            ]
        )
    ),
    numbers=st.fixed_dictionaries(
        {},
        optional={
            "sliding_window": st.just(16),
            "logit_scale": st.just(0.5),
            "rms_norm_eps": st.just(1e-5),
            "hidden_act": st.just("gelu"),
            "max_position_embeddings": st.just(64),
        },
    ),
)
def test_what_is_written_is_read_bit_by_bit(tmp_path_factory, switches, numbers, **others):
    folder = tmp_path_factory.mktemp("heads")
    only_3 = {"norm_output", "norm_before_residual", "norm_before_fc"}
    on = switches - only_3 if others["kind"] == "eagle" else switches
    heads = checkpoint(**others, **numbers, **dict.fromkeys(on, True))
    write_eagle(folder, heads)
    found = read_eagle(folder)
    assert found.config == heads.config
    assert found.base_name_or_path == "org/base"
    assert found.tensors.keys() == heads.tensors.keys()
    assert all(torch.equal(found.tensors[name], heads.tensors[name]) for name in found.tensors)
    assert found.dtype == heads.dtype


STEPS = [(package, "save_file"), (files, "_sync"), (eagle_checkpoint, "read_eagle")]


@pytest.mark.parametrize(("module", "step"), STEPS)
def test_failure_leaves_the_old_files(tmp_path, monkeypatch, module, step):
    write_eagle(tmp_path, checkpoint())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(module, step, fail)
    with pytest.raises(OSError, match="disk full"):
        write_eagle(tmp_path, checkpoint(kind="eagle"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"config": {"rms_norm_eps": 1e-5}}, r"rms_norm_eps reads back as 1e-05, expected 1e-06"),
    ],
)
def test_what_changed_on_disk_is_an_error(tmp_path, monkeypatch, changed, words):
    heads = checkpoint()
    found = replace(
        heads,
        config=replace(heads.config, **changed.get("config", {})),
    )
    monkeypatch.setattr(eagle_checkpoint, "read_eagle", lambda folder: found)
    with pytest.raises(CheckpointError, match=words):
        write_eagle(tmp_path, heads)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norm.weight": None}, r"'norm.weight' has shape None, expected \(8,\)"),
        ({"extra": torch.zeros(2)}, r"'extra' has shape \(2,\), expected None"),
        ({"fc.weight": torch.zeros(8, 16)}, r"'fc.weight' has shape \(8, 16\), expected \(8, 24\)"),
        ({"draft_columns": torch.arange(4)}, r"'draft_columns' has shape \(4,\)"),
    ],
)
def test_tensors_other_than_the_numbers_say_are_refused(tmp_path, change, words):
    heads = checkpoint()
    tensors = {name: t for name, t in {**heads.tensors, **change}.items() if t is not None}
    with pytest.raises(CheckpointError, match=words):
        write_eagle(tmp_path / "heads", replace(heads, tensors=tensors))
    assert not (tmp_path / "heads").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("config.json", "config or weights of another model.*folder of their own"),
        ("pytorch_model.bin", "read in place of model.safetensors"),
        ("model.safetensors.index.json", "read in place of model.safetensors"),
    ],
)
def test_other_models_are_never_overwritten(tmp_path, name, words):
    (tmp_path / name).write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=words):
        write_eagle(tmp_path, checkpoint())
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_weights_of_another_model_are_never_overwritten(tmp_path):
    package.save_file({"lm_head.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="config or weights of another model"):
        write_eagle(tmp_path, checkpoint())


def test_a_file_is_no_place_for_heads(tmp_path):
    (tmp_path / "heads").write_text("")
    with pytest.raises(CheckpointError, match="found a file, expected a folder"):
        write_eagle(tmp_path / "heads", checkpoint())


def test_what_was_saved_is_what_is_read_whatever_else_lies_there(tmp_path):
    write_eagle(tmp_path, checkpoint(num_layers=2))
    (tmp_path / "model.safetensors").rename(tmp_path / "best.safetensors")
    (tmp_path / "config.json").unlink()
    write_eagle(tmp_path, checkpoint())
    assert read_eagle(tmp_path).config.num_layers == 1
