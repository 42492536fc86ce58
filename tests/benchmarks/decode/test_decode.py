import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from benchmarks.decode import decode as script
from benchmarks.inflation.shapes import InflatedShape
from speclm.bench import read_records
from speclm.demo.bundle import assets
from speclm.methods.block.checkpoint import block_checkpoint, write_block
from speclm.methods.block.config import BlockConfig
from speclm.methods.block.network import BlockHeads
from speclm.methods.medusa.network import MedusaHeads, MedusaHeadsConfig
from speclm.methods.medusa.proposer import MedusaProposer
from tests.benchmarks.eagle_folders import write_eagle_folders

ROOT = Path(__file__).parents[3]
TINY = InflatedShape(
    hidden_size=320,
    intermediate_size=832,
    num_layers=9,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    vocab_size=5000,
    is_tied=False,
)


@pytest.fixture
def decode(monkeypatch):
    monkeypatch.setattr(script, "SHAPES", {"tiny": TINY})
    return script


@pytest.fixture
def medusa_asset(decode, monkeypatch):
    """Let the asset of Medusa heads be one of fresh heads."""
    load = decode.load_proposer

    def load_fresh(heads, base, **options):
        if heads != Path("medusa"):
            return load(heads, base, **options)
        config = MedusaHeadsConfig(hidden_size=256, vocab_size=4096, has_own_lm_head=True)
        fresh = MedusaHeads(config, dtype=base.dtype)
        fresh.init_weights_(base.lm_head.weight)
        return MedusaProposer(fresh, target=base, tree=[2, 1])

    monkeypatch.setattr(decode, "load_proposer", load_fresh)
    monkeypatch.setattr(decode, "assets", lambda: {**assets(), "medusa": Path("medusa")})


def run(decode, monkeypatch, path, *arguments):
    fixed = ["--set", "sql", "--n", "1", "--settings", "greedy", "--batch", "1", "--threads", "1"]
    command = ["decode.py", *fixed, "--max-new-tokens", "12", "--out", str(path), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    decode.main()
    return {record["settings"]["method"]: record for record in read_records(path)}


@pytest.mark.usefixtures("medusa_asset")
def test_shape_inflates_every_method_and_is_recorded(decode, monkeypatch, tmp_path):
    methods = ("draft", "ngram+medusa")
    small = run(decode, monkeypatch, tmp_path / "small", "--methods", ",".join(methods))
    wide = run(
        decode, monkeypatch, tmp_path / "wide", "--methods", ",".join(methods), "--shape", "tiny"
    )
    assert tuple(wide) == tuple(small) == methods
    heads = 2 * (TINY.hidden_size + 1 + TINY.vocab_size) * TINY.hidden_size  # depth 2
    for name, record in wide.items():
        settings = record["settings"]
        assert (settings["shape"], settings["is_inflated"]) == ("tiny", True)
        assert "shape" not in small[name]["settings"]
        assert record["num_identical"] == 1
        assert record["tau"] == small[name]["tau"]
        read = dict(settings["bytes_read"])
        assert read.pop("base") == 4 * (TINY.num_weights_read + TINY.vocab_size)  # and the bias
        if "medusa" in name:
            assert read.pop("medusa") == 4 * heads
        if name == "draft":
            assert 0 < read.pop("draft") < settings["bytes_read"]["base"]
        assert read == {}
    assert wide["ngram+medusa"]["tau"] > 1


def test_eagle_heads_of_a_folder_are_measured_as_they_are_and_inflated(
    decode, monkeypatch, tmp_path
):
    heads = write_eagle_folders(tmp_path / "heads")
    options = ["--heads", str(heads), "--methods"]
    small = run(decode, monkeypatch, tmp_path / "small", *options, "eagle,eagle3")
    assert tuple(small) == ("eagle", "eagle3")
    wide = run(decode, monkeypatch, tmp_path / "wide", *options, "eagle3", "--shape", "tiny")
    record = wide["eagle3"]
    assert record["num_identical"] == 1
    assert record["tau"] == small["eagle3"]["tau"]
    read = record["settings"]["bytes_read"]
    assert read.keys() == {"base", "eagle3"}
    assert 0 < read["eagle3"] < read["base"]


def test_block_heads_of_a_folder_are_measured_as_they_are_and_inflated(
    decode, monkeypatch, tmp_path
):
    config = BlockConfig.from_model_config(
        AutoConfig.from_pretrained(assets()["base"]), kind="dspark", block_size=4
    )
    heads = BlockHeads(config)
    heads.init_weights_(generator=torch.Generator().manual_seed(0))
    write_block(tmp_path / "heads" / "block", block_checkpoint(heads))
    options = ["--heads", str(tmp_path / "heads"), "--methods", "block"]
    small = run(decode, monkeypatch, tmp_path / "small", *options)
    wide = run(decode, monkeypatch, tmp_path / "wide", *options, "--shape", "tiny")
    record = wide["block"]
    assert record["num_identical"] == 1
    assert record["tau"] == small["block"]["tau"]
    read = record["settings"]["bytes_read"]
    assert read.keys() == {"base", "block"}
    assert 0 < read["block"] < read["base"]


def test_tree_and_engine_are_passed_on_and_recorded(decode, monkeypatch, tmp_path):
    passed = []
    make = decode.speculative_decoder

    def speculative_decoder(name, base, heads, **options):
        passed.append(options)
        return make(name, base, heads, **options)

    monkeypatch.setattr(decode, "speculative_decoder", speculative_decoder)
    options = ("--methods", "draft", "--tree", "auto", "--engine", "eager")
    records = run(decode, monkeypatch, tmp_path / "auto", *options)
    assert records["draft"]["settings"]["tree"] == "auto"
    assert records["draft"]["settings"]["engine"] == "eager"
    assert passed == [{"tree": "auto", "engine": "eager"}]


def test_shapes_that_are_not_known_are_refused(decode, capsys):
    with pytest.raises(SystemExit):
        decode.parse_arguments(["--shape", "7b"])
    assert "tiny" in capsys.readouterr().err
