import dataclasses
import json
from pathlib import Path

import pytest

from speclm.cli import _training
from speclm.cli._config_file import MAX_BYTES, read_mapping
from speclm.errors import OptionError

ROOT = Path(__file__).parents[2]
START = "data: d.jsonl\nout: heads\n"


@pytest.fixture
def options(run, tmp_path, monkeypatch):
    """Return the options that a command trains with, given the text of its file."""
    monkeypatch.chdir(tmp_path)

    def parse(text, *flags, recipe="medusa", name="train.yaml"):
        found = []
        monkeypatch.setattr(_training, "train", lambda *given: found.extend(given[2:]))
        Path(name).write_text(text)
        result = run("train", recipe, "--config", name, *flags)
        assert result.exit_code == 0, result.output
        own, shared = map(dataclasses.asdict, found)
        return own | shared

    return parse


def test_options_of_the_command_line_take_precedence_over_those_of_the_file(options):
    text = START + (
        "num-heads: 2\nown_lm_head: true\nepochs: 3\nlearning-rate: 1e-2\npatience: null\n"
        "report-to: none\ntraining-args:\n  max_steps: 4\n  bf16: true\n  fsdp_config: {a: [1]}\n"
    )
    flags = ("--num-heads", "3", "--out", "others", "--training-arg", "max_steps=2")
    found = options(text, *flags)
    expected = {"num_heads": 3, "own_lm_head": True, "decay": 0.8, "patience": None}
    expected |= {"data": Path("d.jsonl"), "out": Path("others"), "epochs": 3.0}
    expected |= {"learning_rate": 0.01, "report_to": "none"}
    assert expected.items() <= found.items()
    settings = _training.parse_settings(found["training_arg"])
    assert settings == {"max_steps": 2, "bf16": True, "fsdp_config": {"a": [1]}}


def test_json_is_read_as_yaml_is(options):
    values = {"data": "d.jsonl", "out": "heads", "noise": 0.5, "training_args": {"bf16": True}}
    found = options(json.dumps(values, indent="\t"), recipe="eagle", name="train.json")
    assert (found["noise"], found["training_arg"]) == (0.5, ["bf16=true"])
    assert found["learning_rate"] == 1e-4  # the recipe's own


def test_example_is_valid_and_that_of_the_documentation(options):
    text = (ROOT / "examples" / "train.yaml").read_text()
    found = options(text, recipe="eagle3")
    assert (found["learning_rate"], found["draft_vocab_size"], found["patience"]) == (5e-3, 1024, 2)
    assert found["training_arg"] == ["warmup_steps=0.05", "logging_steps=5"]
    assert text in (ROOT / "docs" / "training.md").read_text()


def test_yaml_has_the_values_of_its_core_schema(tmp_path):
    text = (
        "a: [1e-3, .5, 1., -.inf, 012, 0x1F, true, ~]\n"
        "b: {no: off, time: 1:30, day: 2020-01-01, big: 1_000, number: '3'}\nc: |\n  text\nd:\n"
    )
    (tmp_path / "a").write_text("\ufeff" + text, encoding="utf-8")
    assert read_mapping(tmp_path / "a") == {
        "a": [1e-3, 0.5, 1.0, -float("inf"), 12, 31, True, None],
        "b": {"no": "off", "time": "1:30", "day": "2020-01-01", "big": "1_000", "number": "3"},
        "c": "text\n",
        "d": None,
    }


REFUSED = [
    ("", "it holds None, expected options such as `batch-size: 8`"),
    ("- a", r"it holds \['a'\]"),
    ("a: b: c", "line 1: mapping values are not allowed here"),
    ("a: 1\n\x01", "ReaderError: unacceptable character #x0001"),
    (r'a: "\U80000000"', "cannot be parsed"),
    (r'a: "\uD800"', "surrogates not allowed"),
    ("a: " + "9" * 5000, "cannot be parsed"),
    ("a: &x [1]\nb: *x", "line 1: found an anchor, alias or tag, expected the value itself"),
    ("\na: !!str 1", "line 2: found an anchor, alias or tag"),
    ("seed: 1\nseed: 2", "'seed' occurs twice"),
    ("a: 1\n---\nb: 2", "it has several documents"),
    ("1: 2", "line 1: 1 is a key, expected a text"),
    ("[" * 200, "line 1: it is nested deeper than 100 levels"),
    ("a: 1\n" + "#" * MAX_BYTES, "it has more than 1048576 bytes"),
    ("batch-size: 1\nbatch_size: 2", "'batch_size' occurs twice, once with - and once with _"),
    ("recipe: eagle3", "recipe is 'eagle3', expected 'medusa'; run the other recipe"),
    ("learning-rte: 1", "unknown option 'learning-rte'; did you mean 'learning-rate'"),
    ("training-arg: 1", "unknown option 'training-arg'; did you mean 'training-args'"),
    ("config: a", "unknown option 'config'"),
    ("noise: 1", "'noise'; it is one of eagle and not of medusa"),
    ("warmup_steps: 1", "it is a field of TrainingArguments, write 'warmup_steps' below"),
    ("training-args: [bf16=true]", "training_args is .*, expected a mapping"),
    ("training-args: {learning_rate: 1}", "write 'learning-rate' above training_args"),
    ("epochs: three", "epochs is 'three', expected a number"),
    ("epochs:", "epochs is None, expected a number"),
    ("epochs: 1" + "0" * 400, "too large"),
    ("batch-size: 8.0", "batch-size is 8.0, expected a whole number"),
    ("batch-size: true", "batch-size is True, expected a whole number"),
    ("batch-size: 0", "batch-size is 0, expected at least 1; correct it"),
    ("seed: 2147483648", "expected at least 0 and at most 2147483647"),
    ("resume: yes", "resume is 'yes', expected true or false"),
    ("revision: 12", "revision is 12, expected a text, in quotes"),
    ('out: "a\\0"', "expected a path"),
]


def test_files_that_cannot_be_honoured_are_named_with_what_to_correct(options):
    for text, words in REFUSED:
        with pytest.raises(OptionError, match=f"(?s)--config 'train.yaml': .*(?:{words})"):
            options(text)
    for text, words in [('{"a": 1, "a": 2}', "'a' occurs twice"), ("[" * 10**5, "deeply|deeper")]:
        with pytest.raises(OptionError, match=words):
            options(text, name="train.json")
    Path("folder").mkdir()
    for name in ("missing.yaml", "folder"):
        with pytest.raises(OptionError, match=f"{name}': it cannot be read .* name a file"):
            options("", "--config", name)
