"""Files from strangers: a result or an error of speclm's own, in time and memory that fit them."""

import json
import random
import struct
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from speclm.errors import CheckpointError, SpeclmError
from speclm.kernels.launch_table import read_table
from speclm.methods.block.checkpoint import build_block, read_block
from speclm.methods.eagle.checkpoint import find_eagle, read_eagle
from speclm.methods.eagle.network import build_eagle
from speclm.methods.medusa.checkpoint import find_medusa, read_medusa
from speclm.model.call import read_tree
from speclm.training.checkpoints import last_complete_checkpoint
from speclm.training.conversations import read_conversations
from tests import block_tables
from tests.eagle_tables import EAGLE1, EAGLE1_CONFIG, EAGLE3, EAGLE3_CONFIG, tensors
from tests.eagle_tables import save as write

MEDUSA = {f"{head}.0.linear.weight": (4, 4) for head in range(2)}
MEDUSA_CONFIG = {"medusa_num_heads": 2, "vocab_size": 9, "speclm": {"choices": [[0], [0, 1]]}}
DEEP = "[" * 5000 + "]" * 5000
HUGE = ("9" * 5000, "9" * 300, "1e999", "-1e999", "NaN", "Infinity", "-1", "0", "true", '"\\ud800"')


def eagle(folder: Path, config: str | None = None, **options) -> Path:
    write(folder, tensors(EAGLE3), **options)
    if config is not None:
        (folder / "config.json").write_text(config)
    return folder


@pytest.mark.parametrize("layer", [300000, 99999, 3, 10**12, "9" * 5000, "٣", "00"])
def test_layers_of_eagle_are_counted_by_their_tensors(tmp_path, layer):
    state = tensors(EAGLE3) | {f"layers.{layer}.input_layernorm.weight": torch.ones(8)}
    with pytest.raises(CheckpointError, match=r"model.safetensors: .*expected.*(again|number)"):
        read_eagle(write(tmp_path, state))


@pytest.mark.parametrize("number", [10**9, 99999, 7, "9" * 5000])
def test_norms_and_heads_are_counted_by_their_tensors(tmp_path, number):
    state = tensors(EAGLE3) | {f"fc_norm.{number}.weight": torch.ones(8)}
    with pytest.raises(CheckpointError, match=r"fc_norm|feature_norms|a key has 5015 characters"):
        read_eagle(write(tmp_path, state))
    keys = (f"{number}.0.linear.weight", f"0.{number}.linear.weight", f"{number}.1.weight")
    for place, key in enumerate(keys):
        folder = tmp_path / str(place)
        folder.mkdir()
        with pytest.raises(CheckpointError, match=r"medusa_lm_head.safetensors: "):
            read_medusa(
                write(
                    folder,
                    tensors(MEDUSA) | {key: torch.ones(4, 4)},
                    name="medusa_lm_head.safetensors",
                    config=MEDUSA_CONFIG,
                )
            )


ODD = (*HUGE, DEEP, "[" * 90 + "]" * 90, "{}", '"x"', "[[1]]", "[{}]", "[1, 2]")
FIELDS = (
    *("vocab_size", "num_attention_heads", "head_dim", "max_position_embeddings", "hidden_act"),
    *("rms_norm_eps", "rope_theta", "sliding_window", "layer_types", "speclm", "eagle_config"),
    *("eagle_aux_hidden_state_layer_ids", "num_aux_hidden_states", "logit_scale"),
    *("base_model_name_or_path", "speculators_config"),
)
ROPE_FIELDS = (
    *(("yarn", name) for name in ("factor", "beta_fast", "mscale", "attention_factor")),
    *(("longrope", name) for name in ("short_factor", "long_factor", "factor")),
    *(("llama3", name) for name in ("low_freq_factor", "original_max_position_embeddings")),
    *(("dynamic", "factor"), ("linear", "rope_theta"), ("linear", "rope_type")),
)
ROPE = {
    "factor": 2.0,
    "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "short_factor": [1.0, 1.0],
    "long_factor": [2.0, 2.0],
}


def read_with(folder: Path, config: dict, value: str) -> None:
    """Read a config in which "@" is some JSON, and build the heads."""
    (folder / "config.json").write_text(json.dumps(config).replace('"@"', value))
    require_result_or_error(lambda: build_eagle(read_eagle(folder)))


def read_configs(folder: Path, *, every: int) -> None:
    eagle(folder)
    for field, value in list(product(FIELDS, ODD))[::every]:
        read_with(folder, {**EAGLE3_CONFIG, field: "@"}, value)
    for (rope_type, field), value in list(product(ROPE_FIELDS, ODD))[::every]:
        rope = {"rope_type": rope_type, **ROPE, field: "@"}
        read_with(folder, {**EAGLE3_CONFIG, "rope_scaling": rope}, value)
    (folder / "model.safetensors").write_bytes(save(tensors(MEDUSA)))
    for field, value in product(("vocab_size", "speclm", "medusa_num_heads"), ODD):
        config = json.dumps({**MEDUSA_CONFIG, field: "@"}).replace('"@"', value)
        (folder / "config.json").write_text(config)
        require_result_or_error(lambda: read_medusa(folder))


def test_numbers_of_configs_are_computed_with_or_refused(tmp_path):
    read_configs(tmp_path, every=7)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_all_numbers_of_configs_are_computed_with_or_refused(tmp_path):
    read_configs(tmp_path, every=1)


BLOCK_FIELDS = (
    *(
        "vocab_size",
        "num_attention_heads",
        "head_dim",
        "block_size",
        "mask_token_id",
        "layer_types",
    ),
    *("target_layer_ids", "num_target_layers", "dflash_config", "markov_rank", "is_causal"),
    *("sliding_window", "draft_vocab_size", "markov_head_type", "architectures", "hidden_act"),
    *("speculators_config", "speculators_model_type", "quantization_config", "use_swa", "speclm"),
)


def test_configs_of_block_heads_give_heads_or_an_error(tmp_path):
    table = {k: s for k, s in block_tables.DSPARK.items() if "layers" not in k or "layers.0" in k}
    block_tables.save(tmp_path, block_tables.tensors(table))
    for field, value in list(product(BLOCK_FIELDS, ODD))[::5]:
        config = json.dumps({**block_tables.DEEPSPEC_CONFIG, field: "@"}).replace('"@"', value)
        (tmp_path / "config.json").write_text(config)
        require_result_or_error(lambda: build_block(read_block(tmp_path)))


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"rope_type": ["yarn"]}, r"rope_type is \['yarn'\]"),
        ({"rope_type": "yarn", "factor": "2"}, r"cannot be computed with"),
        ({"rope_type": "linear", "factor": 0}, r"cannot be computed|not finite"),
        ({"rope_type": "linear", "factor": float("inf")}, r"factor.* is inf, expected a finite"),
        ({**ROPE, "rope_type": "longrope", "long_factor": [1.0]}, r"long_factor.*2 finite numbers"),
    ],
)
def test_rotations_that_cannot_be_computed_are_refused(tmp_path, rope, words):
    with pytest.raises(CheckpointError, match=words):
        read_eagle(eagle(tmp_path, json.dumps({**EAGLE3_CONFIG, "rope_scaling": rope})))


def test_two_layer_ids_for_three_hidden_states_are_named(tmp_path):
    words = r"24 values, 3 hidden states 8 wide, and eagle_aux.*layer_ids.*is \[2, 5\], 2 of them"
    for change in ({}, {"embed_tokens.weight": (20, 8)}):
        state = tensors({**EAGLE3, **change})
        config = {**EAGLE3_CONFIG, "eagle_aux_hidden_state_layer_ids": [2, 5]}
        with pytest.raises(CheckpointError, match=words):
            read_eagle(write(tmp_path, state, config=config))


@pytest.mark.parametrize(
    "choices",
    [
        *("[[" + "0," * 99 + "0]]", "[[" + "9" * 300 + "]]", "[[-1]]", "[1e999]", "[[NaN]]"),
        *(
            "[" + "1," * 999 + "1]",
            "[" + "9" * 300 + "]",
            "{}",
            '"x"',
            "[true]",
            "[[]]",
            "[]",
            DEEP,
        ),
    ],
)
def test_trees_in_files_are_read_or_refused(tmp_path, choices):
    (tmp_path / "tree.json").write_text(choices)
    with pytest.raises(SpeclmError):
        read_tree(tmp_path / "tree.json")
    with pytest.raises(CheckpointError):
        read_eagle(
            eagle(
                tmp_path,
                json.dumps({**EAGLE3_CONFIG, "speclm": {"choices": "@"}}).replace('"@"', choices),
            )
        )


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.zeros(1).expand(10**6, 10**6), r"bytes, expected at most"),
        (torch.zeros(2**40, 8, device="meta"), r"expected plain numbers"),
        (torch.eye(8).to_sparse(), r"expected plain numbers"),
        (torch.eye(8, dtype=torch.complex64), r"key|complex64"),
        (torch.eye(8).to(torch.float8_e4m3fn), r"float8"),
        (torch.eye(8).bool(), r"bool"),
    ],
)
def test_tensors_are_plain_and_as_large_as_their_file(tmp_path, tensor, words):
    state = tensors(EAGLE3) | {"midlayer.self_attn.v_proj.weight": tensor}
    with pytest.raises(CheckpointError, match=words):
        read_eagle(write(tmp_path, state, name="pytorch_model.bin"))


def test_many_keys_of_one_storage_are_refused(tmp_path):
    one = torch.zeros(64, 64)
    state = {f"{head}.0.linear.weight": one for head in range(64)}
    with pytest.raises(CheckpointError, match=r"64 tensors name .* bytes"):
        read_medusa(write(tmp_path, state, name="medusa_lm_head.pt", config=None))


@pytest.mark.parametrize("kind", ["U8", "F8_E8M0", "F4", "BOOL", "I64", "C64", "nothing"])
def test_safetensors_of_odd_types_are_refused(tmp_path, kind):
    data = save(tensors(MEDUSA))
    size = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + size].replace(b'"F32"', json.dumps(kind).encode())
    body = data[8 + size :]
    file = tmp_path / "medusa_lm_head.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + body)
    with pytest.raises(CheckpointError, match=r"medusa_lm_head|: "):
        read_medusa(tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        '{"weight_map": {"0.0.linear.weight": "a\\u0000b"}}',
        '{"weight_map": {"0.0.linear.weight": "' + "a" * 5000 + '.safetensors"}}',
        '{"weight_map": {"0.0.linear.weight": "\\ud800"}}',
        '{"weight_map": {"\\ud800": "a.safetensors"}}',
        '{"weight_map": {"0.0.linear.weight": ".."}}',
        '{"weight_map": {"0.0.linear.weight": ""}}',
        '{"weight_map": {"0.0.linear.weight": "."}}',
        DEEP,
    ],
)
def test_an_index_that_names_no_file_is_refused(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"index|missing|read"):
        read_medusa(tmp_path)


def require_result_or_error(read) -> bool:
    """Fail unless it returns, or raises one of speclm's own errors; return whether it returned."""
    try:
        read()
    except SpeclmError as error:
        message = str(error)
    else:
        return True
    assert "\n" not in message
    assert len(message) < 2000
    return False


SEEDS = 60


def files_of_strangers(folder: Path) -> dict[Path, object]:
    """Return one good file of each kind, and what reads it."""
    makers = {
        "eagle1": (EAGLE1, EAGLE1_CONFIG, "model.safetensors"),
        "eagle3": (EAGLE3, EAGLE3_CONFIG, "model.safetensors"),
        "pickled": (EAGLE1, EAGLE1_CONFIG, "pytorch_model.bin"),
        "medusa": (MEDUSA, MEDUSA_CONFIG, "medusa_lm_head.safetensors"),
        "medusa_pickled": (MEDUSA, MEDUSA_CONFIG, "medusa_lm_head.pt"),
    }
    found: dict[Path, object] = {}
    for kind, (table, config, name) in makers.items():
        place = folder / kind
        place.mkdir()
        write(place, tensors(table), name=name, config=config)

        def read(place=place):
            for find, load in ((find_medusa, read_medusa), (find_eagle, read_eagle)):
                if find(place):
                    load(place)

        found |= {place / name: read, place / "config.json": read}
    index = folder / "medusa" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(MEDUSA, "a.safetensors")}))
    found[index] = lambda: find_medusa(folder / "medusa")
    row = {"max_rows": 16, "max_key_bytes": 256, "is_float32": False, "block_rows": 16}
    row |= {"block_keys": 64, "num_warps": 4, "num_stages": 4, "programs": 2, "min_tiles": 2}
    texts = {
        "tree.json": ({"tree": [[0], [0, 0]]}, read_tree),
        "sizes.json": ({"sm_90": [{**row, "fixed_tiles": 16}]}, lambda path: read_table(str(path))),
        "rows.jsonl": (
            {"messages": [{"role": "assistant", "content": "a\u2028"}]},
            read_conversations,
        ),
        "checkpoint-2/trainer_state.json": (
            {"global_step": 2, "epoch": 0.5},
            lambda path: last_complete_checkpoint(path.parents[1]),
        ),
    }
    for name, (content, read) in texts.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
        found[path] = lambda path=path, read=read: read(path)
    return found


def damaged(data: bytes, seed: int) -> bytes:
    """Return other bytes: cut off, with bits flipped, or with other words in them."""
    draw = random.Random(seed)
    content = bytearray(data)
    odd = [
        word.encode() for word in (*HUGE, "[" * 300, "{}", "null", '"\\u0000"', "10", ":", "\xff")
    ]
    match seed % 4:
        case 0:
            return bytes(content[: draw.randrange(len(content))])
        case 1:
            for _ in range(draw.randint(1, 4)):
                content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        case 2:  # in the text of headers and JSON
            place = draw.randrange(min(len(content), 1500))
            content[place : place + draw.randint(0, 8)] = draw.choice(odd)
        case _:  # a number becomes another
            places = [i for i, byte in enumerate(content[:3000]) if 48 <= byte <= 57] or [0]
            place = draw.choice(places)
            content[place : place + 1] = draw.choice(odd)
    return bytes(content)


def fuzz(folder: Path, seeds: range) -> int:
    good = files_of_strangers(folder)
    num_read = 0
    for path, read in good.items():
        assert require_result_or_error(read), path
        data = path.read_bytes()
        for seed in seeds:
            path.write_bytes(damaged(data, seed))
            num_read += require_result_or_error(read)
        path.write_bytes(data)
    return num_read


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_read_or_refused(tmp_path):
    assert fuzz(tmp_path, range(12)) > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_files_damaged_in_many_ways_are_read_or_refused(tmp_path):
    fuzz(tmp_path, range(12, 600))
