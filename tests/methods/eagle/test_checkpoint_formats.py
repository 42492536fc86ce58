"""EAGLE heads in the layouts of other software, by tables typed from what that software reads."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from speclm.drafting.base_parts import BaseParts
from speclm.errors import CheckpointError
from speclm.methods.eagle.checkpoint import read_eagle
from speclm.methods.eagle.checkpoint_formats import EAGLE_FORMATS
from speclm.methods.eagle.checkpoint_limits import LIMITS, unusual_parts
from speclm.methods.registry import registered_methods
from speclm.model.exporting import detect_formats, write_format
from tests.eagle_tables import DRAFTED, EAGLE1, EAGLE3, H, V
from tests.methods.eagle.test_checkpoint_writing import checkpoint

FORMATS = {each.name: each for each in EAGLE_FORMATS}
METHOD = registered_methods()["eagle"]
LAYERS_0 = {key.replace("midlayer.", "layers.0."): shape for key, shape in EAGLE3.items()}
OF_1 = {key: EAGLE1[key] for key in EAGLE1 if key not in ("embed_tokens.weight", "fc.bias")}


BIASES = {"attention_bias": True, "attention_output_bias": True}


@pytest.fixture
def base(tmp_path):
    """A base of 12 layers, of which only the matrices that are asked for exist."""
    folder = tmp_path / "base"
    folder.mkdir()
    config = {"hidden_size": H, "vocab_size": V, "num_hidden_layers": 12}
    (folder / "config.json").write_text(
        json.dumps({**config, "architectures": ["LlamaForCausalLM"]})
    )
    names = {"model.embed_tokens.weight": 1.0, "lm_head.weight": 2.0}
    tensors = {
        name: scale * torch.arange(V * H, dtype=torch.float32).view(V, H)
        for name, scale in names.items()
    }
    save_file(tensors, folder / "head.safetensors")
    others = {"model.layers.0.mlp.up_proj.weight": "not-there.safetensors"}
    weight_map = dict.fromkeys(names, "head.safetensors") | others
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return BaseParts.find(folder)


def write(folder, heads, name, base=None):
    source = {"name": None, "format": "speclm"}
    return write_format(folder, heads, FORMATS[name], method=METHOD, base=base, source=source)


def parts(folder):
    tensors = load_file(folder / "model.safetensors")
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    return tensors, shapes, json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("name", "kind", "expected", "architecture"),
    [
        ("eagle", "eagle", OF_1, "LlamaForCausalLM"),
        ("vllm", "eagle", OF_1, "LlamaForCausalLM"),
        ("sglang", "eagle", OF_1 | {"fc.bias": (8,)}, "LlamaForCausalLMEagle"),
        ("eagle", "eagle3", EAGLE3, "LlamaForCausalLMEagle3"),
        ("vllm", "eagle3", EAGLE3, "LlamaForCausalLMEagle3"),
        ("sglang", "eagle3", EAGLE3, "LlamaForCausalLMEagle3"),
        ("specforge", "eagle3", EAGLE3, "LlamaForCausalLMEagle3"),
        ("speculators", "eagle3", LAYERS_0, "Eagle3Speculator"),
        (
            "modelopt",
            "eagle3",
            {key: shape for key, shape in LAYERS_0.items() if key != "t2d"},
            "LlamaForCausalLMEagle3",
        ),
    ],
)
def test_keys_shapes_and_class_are_those_of_the_software(
    tmp_path, name, kind, expected, architecture
):
    done = write(tmp_path / "out", checkpoint(kind=kind), name)
    _, shapes, config = parts(tmp_path / "out")
    assert shapes == expected
    assert config["architectures"] == [architecture]
    assert "speclm" not in config
    assert FORMATS[name] in detect_formats(tmp_path / "out", METHOD)
    assert done.engines[0].versions
    assert json.loads((tmp_path / "out/speclm_export.json").read_text())["format"] == name


def test_legacy_vllm_gets_one_file_with_the_matrices_of_the_base(tmp_path, base):
    done = write(tmp_path / "out", checkpoint(kind="eagle", fc_bias=True), "vllm-legacy", base)
    tensors, shapes, config = parts(tmp_path / "out")
    assert shapes == EAGLE1 | {"lm_head.weight": (V, H)}
    assert torch.equal(tensors["lm_head.weight"], base.output_matrix())
    assert torch.equal(tensors["embed_tokens.weight"], base.embeddings())
    assert config["model_type"] == "eagle"
    assert config["eagle_fc_bias"] is True
    assert config["model"]["num_hidden_layers"] == 1
    assert "lm_head.weight was added, 640 bytes" in " ".join(done.notes)
    shared = read_eagle(tmp_path / "out").share(
        embeddings=base.embeddings(), lm_weight=base.output_matrix()
    )
    assert not shared.config.has_own_lm_head  # and back without copies
    with pytest.raises(CheckpointError, match=r"needs 'embed_tokens.weight'.*pass the base"):
        write(tmp_path / "other", checkpoint(kind="eagle"), "vllm-legacy")


def test_rtp_llm_gets_the_whole_vocabulary(tmp_path, base):
    heads = checkpoint(draft_vocab_size=V, has_own_lm_head=False, has_qk_norm=True)
    write(tmp_path / "out", heads, "rtp-llm", base)
    _, shapes, config = parts(tmp_path / "out")
    assert config["architectures"] == ["Qwen3MoeForCausalLMEagle"]
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (V, H)
    assert shapes["fc.weight"] == (H, 3 * H)
    assert shapes["model.layers.0.hidden_norm.weight"] == (H,)
    assert not {"d2t", "t2d"} & shapes.keys()
    with pytest.raises(CheckpointError, match="a part of the vocabulary"):
        write(tmp_path / "part", checkpoint(has_qk_norm=True), "rtp-llm", base)


@pytest.mark.parametrize("name", ["vllm", "sglang", "speculators", "modelopt"])
def test_vllm_gets_no_lists_of_the_whole_vocabulary(tmp_path, name):
    heads = checkpoint(draft_vocab_size=V, has_own_lm_head=True)
    write(tmp_path / "out", heads, name)
    tensors = parts(tmp_path / "out")[0]
    assert "lm_head.weight" in tensors
    assert not {"d2t", "t2d"} & tensors.keys()
    assert name == "speculators" or FORMATS["vllm"] in detect_formats(tmp_path / "out", METHOD)
    write(
        tmp_path / "own", heads, "speclm"
    )  # with lists, as SafeAILab's and SpecForge's code needs
    assert FORMATS["vllm"] not in detect_formats(tmp_path / "own", METHOD)


def test_vllm_finds_the_number_of_hidden_states_in_speculators_format(tmp_path):
    heads = checkpoint(num_features=4, feature_layers=(1, 4, 7, 10))
    write(tmp_path / "out", heads, "speculators")
    config = parts(tmp_path / "out")[2]
    assert config["transformer_layer_config"]["num_aux_hidden_states"] == 4
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 4, 7, 10]
    with pytest.raises(CheckpointError, match="4 hidden states of the base, not 3"):
        write(tmp_path / "other", heads, "specforge")


def test_speculators_nests_the_layer_and_names_the_base(tmp_path):
    write(tmp_path / "out", checkpoint(norm_before_residual=True), "speculators")
    _, _, config = parts(tmp_path / "out")
    assert config["speculators_model_type"] == "eagle3"
    assert config["norm_before_residual"] is True
    assert config["speculators_config"]["verifier"]["name_or_path"] == "org/base"
    assert config["transformer_layer_config"]["vocab_size"] == V
    assert "model_type" not in config
    write(tmp_path / "other", checkpoint(), "speculators")
    assert parts(tmp_path / "other")[2]["norm_before_residual"] is False  # vLLM's default is true


@pytest.mark.parametrize(
    ("name", "first"), [("vllm", 0), ("sglang", -1), ("specforge", -1), ("modelopt", -1)]
)
def test_layer_ids_are_counted_as_the_software_counts_them(tmp_path, base, name, first):
    heads = checkpoint(feature_layers=(1, 4, 8))
    write(tmp_path / "out", heads, name, base)
    _, _, config = parts(tmp_path / "out")
    ids = config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
    assert ids == [1 + first, 4 + first, 8 + first]
    assert read_eagle(tmp_path / "out").config.feature_layers == (1, 4, 8)
    write(tmp_path / "usual", checkpoint(feature_layers=(2, 6, 9)), name, base)
    described = parts(tmp_path / "usual")[2].get("eagle_config", {})
    assert "eagle_aux_hidden_state_layer_ids" not in described


def test_sglang_always_gets_a_bias_and_no_key_that_it_takes_for_that_of_attention(tmp_path):
    write(tmp_path / "out", checkpoint(kind="eagle"), "sglang")
    tensors, _, config = parts(tmp_path / "out")
    assert not tensors["fc.bias"].any()
    assert not {"bias", "qkv_bias"} & config.keys()


def test_sglang_gets_the_tokens_that_eagle_1_drafts_as_a_token_map(tmp_path, base):
    heads = checkpoint(kind="eagle", draft_vocab_size=5, has_own_lm_head=True)
    rows = base.output_matrix()[DRAFTED]
    heads = replace(heads, tensors={**heads.tensors, "lm_head.weight": rows})
    done = write(tmp_path / "my heads", heads, "sglang", base)
    assert parts(tmp_path / "my heads")[1] == OF_1 | {"fc.bias": (8,)}
    tokens = torch.load(tmp_path / "my heads/freq_5.pt", weights_only=True)  # as SGLang does
    assert tokens == DRAFTED
    command = done.engines[0].command_for(base="org/base", heads=str(tmp_path / "my heads"))
    assert f" --speculative-token-map '{tmp_path}/my heads'/freq_5.pt" in command
    assert "--speculative-token-map path/to/this/folder/freq_5.pt" in (
        tmp_path / "my heads/README.md"
    ).read_text(encoding="utf-8")
    assert read_eagle(tmp_path / "my heads").config.draft_vocab_size == 5
    with pytest.raises(CheckpointError, match=r"a part of the vocabulary.*'sglang'"):
        write(tmp_path / "other", heads, "vllm", base)


def test_sglang_can_tell_heads_that_share_the_output_matrix(tmp_path):
    write(tmp_path / "out", checkpoint(draft_vocab_size=V, has_own_lm_head=False), "sglang")
    assert parts(tmp_path / "out")[2]["draft_vocab_size"] is None


def test_vllm_gets_no_zero_bias_and_no_copies_of_the_base(tmp_path, base):
    heads = checkpoint(kind="eagle", fc_bias=True, has_own_lm_head=True)
    tensors = {
        **heads.tensors,
        "fc.bias": torch.zeros(H),
        "lm_head.weight": base.output_matrix().clone(),
    }
    done = write(tmp_path / "out", replace(heads, tensors=tensors), "vllm", base)
    assert parts(tmp_path / "out")[1] == OF_1
    assert "was zero" in done.notes[0]


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("vllm", {"kind": "eagle", "fc_bias": True}, "a bias after the joined inputs"),
        ("vllm", {"kind": "eagle", "has_own_lm_head": True}, "an output matrix.*with the base"),
        ("vllm", {"attention_bias": True}, "biases of queries, keys and values only"),
        ("sglang", {"norm_before_residual": True}, r"residual after the norm.*'vllm'"),
        ("sglang", {"num_layers": 2}, r"2 decoder layers.*choose one of \['speclm', 'vllm'"),
        ("sglang", {"has_own_embeddings": True}, "embeddings of their own"),
        ("sglang", {"kind": "eagle", "attention_bias": True}, "queries, keys and values only"),
        ("sglang", BIASES, "biases in all of attention"),
        ("specforge", BIASES, "biases in all of attention"),
        ("modelopt", {"fc_norm": True}, "a norm for each hidden state"),
        ("specforge", {"kind": "eagle"}, "holds heads of EAGLE-3 only, found heads of EAGLE-1"),
        ("vllm-legacy", {}, "holds heads of EAGLE-1 only"),
        ("rtp-llm", {}, "is for heads with qk_norm"),
        ("eagle", {"feature_layers": (1, 2, 3)}, r"hidden states \[1, 2, 3\] of the base"),
    ],
)
def test_what_the_software_would_misread_is_refused(tmp_path, name, change, words):
    with pytest.raises(CheckpointError, match=words):
        write(tmp_path / "out", checkpoint(**change), name)
    assert not (tmp_path / "out").exists()


FLAGS = ("fc_norm", "norm_before_fc", "norm_output", "norm_before_residual", "has_qk_norm")
NAMES = sorted(FORMATS)


@st.composite
def numbers(draw):
    kind = draw(st.sampled_from(["eagle", "eagle3"]))
    change = {
        "num_layers": draw(st.sampled_from([1, 1, 2])),
        "num_key_value_heads": draw(st.sampled_from([1, 2, 4])),
        "intermediate_size": draw(st.integers(1, 9)),
        "logit_scale": draw(st.sampled_from([1.0, 1.0, 0.5])),
    }
    change["attention_bias"] = change["attention_output_bias"] = draw(st.booleans())
    if kind == "eagle3":
        change |= {flag: draw(st.sampled_from([False, False, True])) for flag in FLAGS}
        change["norm_before_fc"] = change["norm_before_fc"] and not change["fc_norm"]
        if draw(st.booleans()):
            change |= {"draft_vocab_size": V, "has_own_lm_head": draw(st.booleans())}
        change["feature_layers"] = draw(st.sampled_from([None, (1, 4, 8)]))
    else:
        change["fc_bias"] = draw(st.booleans())
        change["draft_vocab_size"] = draw(st.sampled_from([V, len(DRAFTED)]))
    return {"kind": kind, "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16])), **change}


@given(numbers(), st.sampled_from(NAMES), st.sampled_from(NAMES))
def test_heads_come_back_from_every_format_that_can_hold_them(
    tmp_path_factory, drawn, first, second
):
    made, place = checkpoint(**drawn), tmp_path_factory.mktemp("heads")
    kind = made.config.kind
    for index, name in enumerate((first, second)):
        limits = LIMITS[name].get(kind)
        needs_base = limits is not None and limits.needs - unusual_parts(made.config).keys()
        if limits is None or not limits.hold(made.config) or needs_base:
            with pytest.raises(CheckpointError):
                write(place / f"{index}", made, name)
            return
        write(place / f"{index}", made, name)
        found = read_eagle(place / f"{index}")
        added = name == "sglang" and kind == "eagle" and not made.config.fc_bias
        assert found.config == replace(made.config, fc_bias=True if added else made.config.fc_bias)
        tensors = dict(found.tensors)
        if added:
            assert not tensors.pop("fc.bias").any()
        assert tensors.keys() == made.tensors.keys()
        assert all(torch.equal(tensors[key], made.tensors[key]) for key in tensors)
        made = found
    if "draft_columns" in made.tensors:
        assert made.tensors["draft_columns"].tolist() == DRAFTED
