"""Block heads in the layouts of other software, by tables typed from what that software reads."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from speclm.errors import CheckpointError
from speclm.methods.block.checkpoint import block_checkpoint as of_unknown_base
from speclm.methods.block.checkpoint import read_block
from speclm.methods.block.checkpoint_formats import BLOCK_FORMATS, HOLDS, unusual_parts
from speclm.methods.registry import registered_methods
from speclm.model.exporting import detect_formats, write_format
from tests.methods.block.block_heads import MARKOV, make_heads
from tests.methods.block.test_checkpoint import SAVED, heads

FORMATS = {each.name: each for each in BLOCK_FORMATS}
METHOD = registered_methods()["block"]


def write(folder, checkpoint, name):
    source = {"name": None, "format": "speclm"}
    return write_format(folder, checkpoint, FORMATS[name], method=METHOD, base=None, source=source)


def block_checkpoint(made):
    return replace(of_unknown_base(made), num_target_layers=12)


@pytest.mark.parametrize("name", ["dflash", "specforge"])
def test_zlab_and_specforge_are_told_how_many_layers_the_base_has(tmp_path, name):
    with pytest.raises(
        CheckpointError, match=f"'{name}' needs the number of layers.*pass the base"
    ):
        write(tmp_path / "out", of_unknown_base(heads("DFlash")), name)
    write(tmp_path / "speclm", block_checkpoint(heads("DFlash")), "speclm")
    write(tmp_path / name, read_block(tmp_path / "speclm"), name)
    assert config_of(tmp_path / name)["num_target_layers"] == 12


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("case", SAVED)
def test_heads_come_back_from_every_format_that_can_hold_them(tmp_path, case):
    made = block_checkpoint(heads(case))
    parts, found = unusual_parts(made.config), made
    for name in FORMATS:
        if not parts <= HOLDS[name]:
            with pytest.raises(CheckpointError, match=f"format '{name}' cannot hold"):
                write(tmp_path / name, made, name)
            assert not (tmp_path / name).exists()
            continue
        write(tmp_path / name, found, name)  # each from the one before it
        assert FORMATS[name] in detect_formats(tmp_path / name, METHOD)
        found = read_block(tmp_path / name)
        assert found.config == made.config
        assert found.tensors.keys() == made.tensors.keys()
        assert all(torch.equal(found.tensors[key], made.tensors[key]) for key in made.tensors)


def test_specforge_gets_the_values_of_dspark_where_it_reads_them(tmp_path):
    made = make_heads(**MARKOV, is_causal=(False, False)).to(torch.bfloat16)
    write(tmp_path / "out", block_checkpoint(made), "specforge")
    config = config_of(tmp_path / "out")
    assert config["architectures"] == ["DSparkDraftModel"]
    nested = config["dflash_config"]
    assert (nested["projector_type"], nested["markov_rank"]) == ("dspark", 3)
    assert not {"markov_rank", "target_layer_ids", "mask_token_id"} & config.keys()


def test_speculators_counts_hidden_states_where_others_count_layers(tmp_path):
    made = block_checkpoint(heads("DFlash"))
    for name in ("vllm", "speculators"):
        write(tmp_path / name, made, name)
    ids = config_of(tmp_path / "vllm")["dflash_config"]["target_layer_ids"]
    config = config_of(tmp_path / "speculators")
    assert config["aux_hidden_state_layer_ids"] == [i + 1 for i in ids]
    assert config["speculators_config"]["algorithm"] == "dflash"
    assert config["sample_from_anchor"] is False
    assert config["sliding_window_non_causal"] is True
    assert "model_type" not in config
    keys = load_file(tmp_path / "speculators/model.safetensors").keys()
    assert keys == load_file(tmp_path / "vllm/model.safetensors").keys()


def test_commands_draft_as_many_tokens_as_a_block_has(tmp_path):
    for case, method, algorithm in (("DSpark", "dspark", "DSPARK"), ("DFlash", "dflash", "DFLASH")):
        made = block_checkpoint(heads(case))
        (vllm,) = write(tmp_path / f"{case}-vllm", made, "vllm").engines
        assert f'"method": "{method}"' in vllm.command
        assert f'"num_speculative_tokens": {made.config.num_drafts}' in vllm.command
        sglang = write(tmp_path / f"{case}-sglang", made, "sglang").engines[0]
        assert f"--speculative-algorithm {algorithm}" in sglang.command


# What the loaders and masks of vLLM 0.33, SGLang 0.5.23, SpecForge 0.2.0 and speculators 0.9.0 do.
REFUSED = {
    "gated": ({**MARKOV, "markov": "gated"}, {"vllm"}),
    "recurrent": ({**MARKOV, "markov": "rnn"}, {"vllm"}),
    "no Markov head": ({"has_confidence": True}, {"vllm", "sglang"}),
    "gelu": ({**MARKOV, "hidden_act": "gelu"}, {"vllm", "sglang", "specforge"}),
    "embeddings": ({**MARKOV, "feature_layers": (0, 2)}, {"sglang", "specforge"}),
    "open windows": ({**MARKOV, "windows": (9, 9)}, {"specforge", "speculators"}),
    "causal windows": (
        {**MARKOV, "windows": (9, 9), "is_causal": (True, True)},
        {"speculators"},
    ),
    "last layer": (
        {**MARKOV, "feature_layers": (2, 6)},
        {"vllm", "sglang", "specforge", "speculators"},
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_formats_refuse_what_their_software_misreads(tmp_path, case):
    changes, refused = REFUSED[case]
    config = make_heads(**{"is_causal": (False, False), **changes}).config
    parts = unusual_parts(config, num_target_layers=6)
    serving = {"vllm", "sglang", "specforge", "speculators"}
    assert {name for name in serving if not parts <= HOLDS[name]} == refused


def test_no_engine_is_named_that_cannot_load_the_heads(tmp_path):
    gated = block_checkpoint(make_heads(**{**MARKOV, "markov": "gated"}).to(torch.bfloat16))
    assert [each.name for each in write(tmp_path / "a", gated, "dspark").engines] == ["SGLang"]
    own = {"has_own_lm_head": True, "has_own_embeddings": True}
    heads_of_none = block_checkpoint(make_heads(**{**MARKOV, "markov": "rnn", **own}).float())
    assert write(tmp_path / "b", heads_of_none, "dspark").engines == ()


@pytest.mark.parametrize(("count", "mode"), [(2, "gqa"), (4, "mha")])
def test_specforge_is_told_whether_key_heads_are_shared(tmp_path, count, mode):
    changes = {**MARKOV, "is_causal": (False, False), "num_kv_heads": count}
    made = block_checkpoint(make_heads(**changes).to(torch.bfloat16))
    write(tmp_path / "out", made, "specforge")
    assert config_of(tmp_path / "out")["dflash_config"]["attention_mode"] == mode
