"""Layouts of Medusa heads, typed from their key tables, against plain modules."""

import json
import logging
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from speclm.errors import CheckpointError, SpeclmError
from speclm.methods.medusa.checkpoint import find_medusa, read_medusa
from speclm.methods.medusa.network import MedusaHeads, MedusaHeadsConfig

HIDDEN, VOCAB = 6, 11
TOLERANCE = 1e-5  # float32 sums in another order
A1 = {
    "0.0.linear.weight": (6, 6),
    "0.0.linear.bias": (6,),
    "0.1.weight": (11, 6),
    "1.0.linear.weight": (6, 6),
    "1.0.linear.bias": (6,),
    "1.1.weight": (11, 6),
}
B1 = {
    "0.0.linear.weight": (6, 6),
    "0.0.linear.bias": (6,),
    "1.0.linear.weight": (6, 6),
    "1.0.linear.bias": (6,),
}
A2 = {
    "0.0.linear.weight": (6, 6),
    "0.0.linear.bias": (6,),
    "0.1.linear.weight": (6, 6),
    "0.1.linear.bias": (6,),
    "0.2.weight": (11, 6),
    "1.0.linear.weight": (6, 6),
    "1.0.linear.bias": (6,),
    "1.1.linear.weight": (6, 6),
    "1.1.linear.bias": (6,),
    "1.2.weight": (11, 6),
}
B2 = {
    "0.0.linear.weight": (6, 6),
    "0.0.linear.bias": (6,),
    "0.1.linear.weight": (6, 6),
    "0.1.linear.bias": (6,),
    "1.0.linear.weight": (6, 6),
    "1.0.linear.bias": (6,),
    "1.1.linear.weight": (6, 6),
    "1.1.linear.bias": (6,),
}
VLLM = {  # by the keys of A1
    "0.0.linear.weight": "blocks.0.layers.0.weight",
    "0.0.linear.bias": "blocks.0.layers.0.bias",
    "0.1.weight": "lm_heads.0.weight",
    "1.0.linear.weight": "blocks.1.layers.0.weight",
    "1.0.linear.bias": "blocks.1.layers.0.bias",
    "1.1.weight": "lm_heads.1.weight",
}


def tensors(table, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return {k: torch.randn(shape, generator=generator).to(dtype) for k, shape in table.items()}


def save(folder: Path, state, *, name="medusa_lm_head.safetensors", config=None) -> Path:
    if name.endswith(".pt"):
        torch.save(state, folder / name)
    else:
        save_file(state, folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def plain_logits(state, hidden, lm_head):
    """Run the heads as modules, one after another."""
    heads = []
    for head in range(2):
        x = hidden
        layer = 0
        while (key := f"{head}.{layer}.linear.weight") in state:
            linear = torch.nn.Linear(HIDDEN, HIDDEN, bias=f"{head}.{layer}.linear.bias" in state)
            linear.load_state_dict(
                {"weight": state[key]}
                | (
                    {"bias": state[f"{head}.{layer}.linear.bias"]}
                    if linear.bias is not None
                    else {}
                )
            )
            x = x + F.silu(linear(x))
            layer += 1
        own = state.get(f"{head}.{layer}.weight")
        heads.append(lm_head(x) if own is None else x @ own.T)
    return torch.stack(heads, dim=1)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("table", [A1, A2, B1, B2])
@pytest.mark.parametrize("name", ["medusa_lm_head.pt", "medusa_lm_head.safetensors"])
@torch.no_grad()
def test_logits_are_those_of_plain_modules(tmp_path, table, has_bias, name):
    state = {k: t for k, t in tensors(table).items() if has_bias or "bias" not in k}
    read = read_medusa(save(tmp_path, state, name=name))
    assert (read.num_heads, read.hidden_size) == (2, HIDDEN)
    assert read.num_layers == (2 if table in (A2, B2) else 1)
    assert read.has_bias is has_bias
    assert read.has_own_lm_head is (table in (A1, A2))
    assert read.vocab_size == (VOCAB if read.has_own_lm_head else None)
    assert read.dtype == torch.float32
    assert not read.is_merged
    heads = MedusaHeads(
        MedusaHeadsConfig(
            hidden_size=HIDDEN,
            vocab_size=VOCAB,
            num_heads=2,
            num_layers=read.num_layers,
            has_own_lm_head=read.has_own_lm_head,
            has_bias=has_bias,
        )
    )
    heads.load_state_dict(read.stacked())
    lm_head = torch.nn.Linear(HIDDEN, VOCAB, bias=False)
    hidden = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(1))
    found = heads(hidden, lm_head=lm_head)
    assert torch.allclose(found, plain_logits(state, hidden, lm_head), atol=TOLERANCE)


def test_parts_stand_where_their_keys_say(tmp_path):
    state = tensors(A2, torch.bfloat16)
    read = read_medusa(save(tmp_path, state))
    assert read.dtype == torch.bfloat16
    assert torch.equal(read.parts["0.1.linear.weight"], state["0.1.linear.weight"])
    assert torch.equal(read.parts["1.0.linear.bias"], state["1.0.linear.bias"])
    assert torch.equal(read.parts["1.2.weight"], state["1.2.weight"])


@pytest.mark.parametrize("prefix", ["", "medusa_heads."])
def test_names_of_vllm_are_read(tmp_path, prefix):
    state = tensors(A1)
    renamed = {prefix + VLLM[key]: tensor for key, tensor in state.items()}
    read = read_medusa(save(tmp_path, renamed, name="model.safetensors"))
    assert torch.equal(read.parts["1.0.linear.weight"], state["1.0.linear.weight"])
    assert torch.equal(read.parts["0.1.weight"], state["0.1.weight"])


@pytest.mark.parametrize("is_sharded", [True, False])
def test_merged_model_yields_its_heads_alone(tmp_path, is_sharded):
    state = {f"medusa_head.{key}": tensor for key, tensor in tensors(A1).items()}
    state |= {"model.norm.weight": torch.ones(6), "lm_head.weight": torch.ones(11, 6)}
    if is_sharded:
        weight_map = {}
        for number, keys in enumerate((sorted(state)[:3], sorted(state)[3:])):
            name = f"model-0000{number + 1}-of-00002.safetensors"
            save_file({key: state[key] for key in keys}, tmp_path / name)
            weight_map |= dict.fromkeys(keys, name)
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
    else:
        save(tmp_path, state, name="model.safetensors")
    read = read_medusa(tmp_path)
    assert read.is_merged
    assert torch.equal(read.parts["1.1.weight"], state["medusa_head.1.1.weight"])
    if is_sharded:
        (tmp_path / "model-00001-of-00002.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"file is missing.*index says.*medusa_head"):
            read_medusa(tmp_path)


def merged_state() -> dict[str, torch.Tensor]:
    """Return a tiny Medusa-2 model: the keys of a base, and its heads below ``medusa_head``."""
    return {
        "model.embed_tokens.weight": torch.full((3, 2), 9.0),
        "model.layers.0.self_attn.q_proj.weight": torch.full((2, 2), 8.0),
        "model.norm.weight": torch.tensor([7.0, 7.0]),
        "lm_head.weight": torch.full((3, 2), 6.0),
        "medusa_head.0.0.linear.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        "medusa_head.0.0.linear.bias": torch.tensor([0.5, -0.5]),
        "medusa_head.0.1.weight": torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]]),
        "medusa_head.1.0.linear.weight": torch.tensor([[5.0, 6.0], [7.0, 8.0]]),
        "medusa_head.1.0.linear.bias": torch.tensor([0.25, -0.25]),
        "medusa_head.1.1.weight": torch.tensor([[0.0, 1.0], [1.0, 0.0], [3.0, 3.0]]),
    }


def save_shards(folder: Path) -> None:
    """Write a merged model as two pickles with their index."""
    first = ("model.embed_tokens.weight", "medusa_head.0.0.linear.weight", "medusa_head.1.1.weight")
    state, weight_map = merged_state(), {}
    for number in (1, 2):
        name = f"pytorch_model-0000{number}-of-00002.bin"
        part = {key: tensor for key, tensor in state.items() if (key in first) == (number == 1)}
        torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 172}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("kind", ["archive", "stream", "shards"])
def test_pickled_merged_model_yields_its_heads_alone(tmp_path, kind):
    if kind == "shards":
        save_shards(tmp_path)
    else:
        file = tmp_path / "pytorch_model.bin"
        torch.save(merged_state(), file, _use_new_zipfile_serialization=kind == "archive")
    torch.save({"state": {}, "step": 3}, tmp_path / "optimizer.pt")
    read = read_medusa(tmp_path)
    assert read.is_merged
    assert (read.num_heads, read.num_layers, read.hidden_size, read.vocab_size) == (2, 1, 2, 3)
    stacked = read.stacked()
    assert stacked["weight"].tolist() == [[[[1, 2], [3, 4]], [[5, 6], [7, 8]]]]
    assert stacked["bias"].tolist() == [[[0.5, -0.5], [0.25, -0.25]]]
    assert stacked["lm_weight"].tolist() == [[[1, 0], [0, 1], [2, 2]], [[0, 1], [1, 0], [3, 3]]]


def test_pickled_models_without_heads_are_none(tmp_path):
    state = {key: t for key, t in merged_state().items() if not key.startswith("medusa")}
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert find_medusa(tmp_path) is None
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "pytorch_model-00001-of-00002.bin")
    assert find_medusa(tmp_path) is None


def test_pickled_shard_that_is_missing_or_damaged_is_named(tmp_path):
    save_shards(tmp_path)
    file = tmp_path / "pytorch_model-00002-of-00002.bin"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.bin.*no tensors can be read"):
        read_medusa(tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"file is missing.*index says.*medusa_head"):
        read_medusa(tmp_path)


def test_counts_come_from_tensors_and_a_wrong_config_is_logged_once(tmp_path, caplog):
    config = {"medusa_num_heads": 5, "medusa_num_layers": 1, "base_model_name_or_path": "org/base"}
    with caplog.at_level(logging.WARNING, logger="speclm"):
        read = read_medusa(save(tmp_path, tensors(A1), config=config))
    assert read.num_heads == 2
    assert read.base_name_or_path == "org/base"
    (record,) = caplog.records
    assert "medusa_num_heads 5 (found 2)" in record.getMessage()


def test_layer_listed_under_several_keys_is_read_as_equal_copies(tmp_path):
    state = tensors(A2)
    for head in "01":
        for part in ("weight", "bias"):
            state[f"{head}.1.linear.{part}"] = state[f"{head}.0.linear.{part}"]
    read = read_medusa(save(tmp_path, state, name="medusa_lm_head.pt"))
    weight = read.stacked()["weight"]
    assert torch.equal(weight[0], weight[1])
    weight[0].zero_()
    assert weight[1].any()


def test_parameters_in_a_pickle_are_read_without_gradients(tmp_path):
    state = {k: torch.nn.Parameter(t) for k, t in tensors(B1).items()}
    parts = read_medusa(save(tmp_path, state, name="x.pt")).parts
    assert not any(part.requires_grad for part in parts.values())


class Evil:
    """Would create a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["medusa_lm_head.pt", "pytorch_model.bin"])
@pytest.mark.parametrize("is_zip", [True, False])
def test_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path, is_zip, name):
    sign = tmp_path / "executed"
    file = tmp_path / name
    state = {**tensors(B1), "2.0.linear.weight": Evil(sign)}
    if is_zip:
        torch.save(state, file)
    else:
        file.write_bytes(pickle.dumps(state["2.0.linear.weight"], protocol=2))
    with pytest.raises(CheckpointError, match=rf"{name}.*would run code.*safetensors"):
        read_medusa(tmp_path)
    assert not sign.exists()


@pytest.mark.parametrize("name", ["medusa_lm_head.pt", "medusa_lm_head.safetensors"])
def test_truncated_file_is_named(tmp_path, name):
    file = save(tmp_path, tensors(A1), name=name) / name
    for length in (0, 5, len(file.read_bytes()) - 40):
        file.write_bytes(file.read_bytes()[:length] if length < 40 else b"")
        with pytest.raises(CheckpointError, match=rf"{name}.*no tensors can be read"):
            read_medusa(tmp_path)
    save(tmp_path, tensors(A1), name=name)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=rf"{name}.*no tensors can be read"):
        read_medusa(tmp_path)


@pytest.mark.parametrize("key", [*A2])
def test_every_missing_key_is_an_error(tmp_path, key):
    state = tensors(A2)
    del state[key]
    with pytest.raises(CheckpointError, match=r"is missing.*download|layers are missing|expected"):
        read_medusa(save(tmp_path, state))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"extra.weight": (2,)}, r"found key 'extra.weight'.*remove it"),
        ({"token_map": (2,)}, r"found key 'token_map'"),
        ({"medusa_head.0.0.bias": (6,)}, r"found key 'medusa_head.0.0.bias'"),
        (
            {"1.0.linear.weight": (5, 6)},
            r"'1.0.linear.weight' has shape \[5, 6\], expected \[6, 6\]",
        ),
        ({"1.0.linear.weight": (36,)}, r"'1.0.linear.weight' has shape \[36\]"),
        ({"0.0.linear.bias": (5,), "1.0.linear.bias": (5,)}, r"bias' is 5 wide, expected 6"),
        ({"0.1.weight": (11, 5), "1.1.weight": (11, 5)}, r"'0.1.weight' is 5 wide, expected 6"),
        ({"1.1.weight": (12, 6)}, r"'1.1.weight' has shape \[12, 6\], expected \[11, 6\]"),
        ({"0.0.linear.weight": (6, 5), "1.0.linear.weight": (6, 5)}, r"\[6, 5\].*square"),
        ({"lm_heads.1.weight": (11, 6)}, r"'1.1.weight' and 'lm_heads.1.weight'.*same tensor"),
        ({"3.0.linear.weight": (6, 6)}, r"'2.0.linear.weight' is missing, found parts of 4"),
    ],
)
def test_wrong_keys_and_shapes_name_file_key_and_remedy(tmp_path, change, words):
    with pytest.raises(CheckpointError, match=words) as caught:
        read_medusa(save(tmp_path, tensors({**A1, **change})))
    assert isinstance(caught.value, SpeclmError)
    assert "medusa_lm_head.safetensors" in str(caught.value)


def test_tensors_of_several_dtypes_are_refused(tmp_path):
    state = tensors(A1)
    state["1.1.weight"] = state["1.1.weight"].half()
    with pytest.raises(CheckpointError, match=r"torch.float16.*torch.float32.*one floating dtype"):
        read_medusa(save(tmp_path, state))


def test_pickle_of_something_else_and_folders_without_heads_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no file has the keys of Medusa heads"):
        read_medusa(tmp_path)
    torch.save([1, 2], tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"found a list, expected a state dict"):
        read_medusa(tmp_path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", r"config.json: no JSON"),
        ("[]", r"config.json: found a list"),
        ('{"vocab_size": "x"}', r"vocab_size is 'x', expected int"),
        ('{"speclm": {"choices": [[1, 0]]}}', r"speclm.choices is no tree.*hangs in the air"),
        ('{"speclm": {"choices": 3}}', r"speclm.choices is no tree"),
    ],
)
def test_config_that_cannot_be_meant_is_refused(tmp_path, config, words):
    save(tmp_path, tensors(B1))
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=words):
        read_medusa(tmp_path)


@pytest.mark.parametrize(
    "index", ['{"weight_map": []}', '{"weight_map": {"a": "../b"}}', '{"weight_map": {"a": 1}}']
)
def test_index_that_leads_elsewhere_is_refused(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"index.json: weight_map.*next to the index"):
        find_medusa(tmp_path)


def test_keys_decide_and_not_the_file_name(tmp_path):
    save(tmp_path, {"model.layers.0.mlp.weight": torch.ones(2)}, name="medusa_lm_head.safetensors")
    assert find_medusa(tmp_path) is None
    save(tmp_path, tensors(B1), name="other.safetensors")
    assert find_medusa(tmp_path).path.name == "other.safetensors"
