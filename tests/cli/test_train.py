import subprocess
import sys
from pathlib import Path

import pytest

from speclm.errors import OptionError
from tests.training.alphabet import TAGGED, tiny_base, word_tokenizer, write_alphabet

ROOT = Path(__file__).parents[2]


@pytest.fixture
def options(tmp_path):
    base = tmp_path / "base"
    tiny_base().save_pretrained(base)
    word_tokenizer(TAGGED).save_pretrained(base)
    data = write_alphabet(tmp_path / "rows.jsonl")
    return {
        "--base": base,
        "--data": data,
        "--out": tmp_path / "heads",
        "--num-heads": 2,
        "--batch-size": 4,
    }


@pytest.fixture
def train(run, options):
    def run_train(*flags, **changes):
        named = {**options, **{f"--{k.replace('_', '-')}": v for k, v in changes.items()}}
        words = [str(word) for pair in named.items() for word in pair]
        settings = ("use_cpu=true", "logging_steps=1")
        words += [word for setting in settings for word in ("--training-arg", setting)]
        return run("train", "medusa", *words, *flags)

    return run_train


def test_heads_are_trained_and_their_figures_printed(train, options, capfd):
    result = train("--own-lm-head", epochs=1, eval_data=options["--data"], limit=8)
    assert result.exit_code == 0
    assert "estimated tau" in result.output
    assert "top-3" in result.output
    assert any(options["--out"].glob("*.safetensors"))
    assert any(options["--out"].glob("checkpoint-2"))


def test_resume_goes_on_where_a_training_ended(train, options):
    train("--training-arg", "max_steps=2")
    result = train("--resume", "--training-arg", "max_steps=3")
    assert "step 3" in result.output
    assert any(options["--out"].glob("checkpoint-3"))


def test_folder_of_another_training_is_not_overwritten(train, options):
    (options["--out"] / "checkpoint-2").mkdir(parents=True)
    with pytest.raises(OptionError, match="holds checkpoints of another training; pass --resume"):
        train()


@pytest.mark.parametrize(
    ("flag", "message"),
    [("max_step=2", "did you mean 'max_steps'"), ("max_steps", "expected key=value")],
)
def test_bad_training_arguments_are_named(train, flag, message):
    with pytest.raises(OptionError, match=message):
        train("--training-arg", flag)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"learning_rate": "nan"}, "--learning-rate is nan, expected a finite number above 0"),
        ({"learning_rate": "inf"}, "--learning-rate is inf"),
        ({"learning_rate": "-0.1"}, "--learning-rate is -0.1"),
        ({"epochs": "0"}, "--epochs is 0.0, expected a finite number above 0"),
        ({"epochs": "nan"}, "--epochs is nan"),
        ({"num_heads": "0"}, "--num-heads is 0, expected 1 to 64"),
        ({"num_layers": "0"}, "--num-layers is 0, expected 1 to"),
        ({"seed": "-1"}, "--seed is -1, expected 0 to"),
        ({"decay": "nan"}, "decay is nan, expected 0.0 to 1.0"),
        ({"soft_weight": "2"}, "soft_weight is 2.0, expected 0.0 to 1.0"),
    ],
)
def test_numbers_that_no_training_can_have_are_named_before_anything_is_loaded(
    train, options, change, words, monkeypatch
):
    def load(*_: object, **__: object) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr("speclm.cli._training.load", load)
    with pytest.raises(OptionError, match=words):
        train(**change)
    assert not options["--out"].exists()


def test_help_shows_the_options(run):
    result = run("train", "medusa", "--help")
    assert result.exit_code == 0
    assert "--own-lm-head" in result.output


def test_command_line_loads_the_training_code_only_to_train():
    script = "import sys, speclm.cli; print('speclm.training' in sys.modules)"
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("setting", "words"),
    [("bf16=maybe", "bf16 is 'maybe', expected true or false"), ("report_to=wandbb", "'wandb'")],
)
def test_settings_that_mean_nothing_are_named_before_anything_is_loaded(
    train, monkeypatch, setting, words
):
    monkeypatch.setattr("speclm.cli._training.load", None)
    with pytest.raises(OptionError, match=words):
        train("--training-arg", setting)


def test_setting_that_the_trainer_refuses_is_named(train):
    with pytest.raises(OptionError, match=r"cannot begin with .*'adam_beta1=-3'.*Invalid beta"):
        train("--training-arg", "adam_beta1=-3")


def test_folder_that_cannot_be_written_to_is_named_before_anything_is_loaded(
    train, tmp_path, monkeypatch
):
    monkeypatch.setattr("speclm.cli._training.load", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match=r"--out '.*/file/heads' cannot be written to"):
        train(out=tmp_path / "file" / "heads")
