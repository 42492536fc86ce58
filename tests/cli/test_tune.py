import json
import shutil

import pytest

from speclm import SpecModel
from speclm.cli.tune import _without_tree
from speclm.demo.bundle import assets, load_prompts
from speclm.errors import OptionError, SpeclmError
from speclm.model.call import normalize_tree

QUICK = ("--num-prompts", "2", "--max-new-tokens", "16", "--threads", "1")


def test_tune_prints_sizes_and_writes_a_tree_that_generate_takes(run, tmp_path):
    path = tmp_path / "tree.json"

    result = run(
        "tune", "--heads", "medusa", *QUICK, "--num-draft-tokens", "4", "--save", str(path)
    )

    assert result.exit_code == 0
    for text in ("batch 1", "tau", "best", "rank 0", "static tree of 4 nodes"):
        assert text in result.output
    assert normalize_tree(str(path)).num_draft_tokens == 4
    record = json.loads(path.read_text())
    assert record["heads"] == "medusa"
    assert (record["tau"] >= 1.0, record["default_tau"] >= 1.0) == (True, True)


def test_tree_is_stored_with_the_heads_that_are_then_loaded_with_it(run, tmp_path):
    heads = tmp_path / "heads"
    shutil.copytree(assets()["medusa"], heads)
    options = ("--num-draft-tokens", "3", "--save", str(heads))

    result = run("tune", "--heads", str(heads), *QUICK, *options)

    assert "rests on 2 calls, expected at least 10" in " ".join(result.output.split())
    assert f"written into {heads}" in " ".join(result.output.split())
    rows = [line.split() for line in result.output.splitlines()]
    taus = {row[0]: float(row[2]) for row in rows if row and row[0] in {"default", "calibrated"}}
    calibration = json.loads((heads / "config.json").read_text())["speclm"]["calibration"]
    assert calibration["tau"] == pytest.approx(taus["calibrated"], abs=0.01)
    assert calibration["default_tau"] == pytest.approx(taus["default"], abs=0.01)
    base = SpecModel.from_pretrained(assets()["base"], heads, dtype="float32").base
    assert len(SpecModel.from_pretrained(base, heads).proposer.config.paths) == 3
    again = _without_tree(heads)  # another calibration is not bound by it
    assert SpecModel.from_pretrained(base, heads, heads_kwargs=again).proposer.config.paths is None


def test_folder_that_cannot_store_a_tree_is_named_before_anything_is_measured(run, tmp_path):
    for name, words in (
        ("draft", r"--save is .* holds a smaller language model.*drop --save"),
        ("medusa", "no JSON can be read"),
    ):
        heads = tmp_path / name
        shutil.copytree(assets()[name], heads)
        if name == "medusa":
            (heads / "config.json").unlink()
        with pytest.raises(SpeclmError, match=words):
            run("tune", "--heads", str(heads), "--save", str(heads), *QUICK)


def test_tune_takes_batches_and_any_proposer(run, tmp_path):
    data = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"messages": chat}) for chat in load_prompts("sql_tune", limit=2)]
    data.write_text("\n".join(lines))

    joined = ("--heads", "ngram,draft")
    result = run("tune", *joined, "--prompts", str(data), "--batch", "1,2", *QUICK)

    assert result.exit_code == 0
    assert "batch 1" in result.output
    assert "batch 2" in result.output
    assert "static tree" not in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--save", "tree.txt"), r"--save.*\*\.json"),
        (("--heads", "medusa", "--save", "."), r"--save is '\.'.*folder of --heads"),
        (("--heads", "none"), "--heads is 'none'"),
        (("--batch", "0"), "--batch has '0'"),
        (("--heads", "ngram,draft", "--save", "tree.json"), r"CombinedProposer does not rank"),
        (("--save", "no/such/tree.json"), r"--save is .* make .* first"),
    ],
)
def test_options_that_make_no_sense_are_named(run, options, message):
    with pytest.raises(OptionError, match=message):
        run("tune", *QUICK, *options)


def test_prompts_that_end_at_once_teach_nothing(run, tmp_path):
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "1 2 3 1 2 3 1 2 3"}')

    with pytest.raises(OptionError, match=r"nothing was drafted.*prompts"):
        run("tune", "--heads", "ngram", "--prompts", str(data), *QUICK)
