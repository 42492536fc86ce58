import importlib
from dataclasses import replace

import pytest

from speclm.errors import OptionError, UnknownNameError

generate_module = importlib.import_module("speclm.cli.generate")
SHORT = ("--max-new-tokens", "8")


def test_generate_compares_with_plain_decoding(run):
    result = run("generate", "--prompt", "2 + 2?", "--compare", *SHORT)
    assert result.exit_code == 0
    assert "identical: yes" in result.output
    assert "tau" in result.output


def test_generate_joins_proposers_parted_by_commas(run):
    options = ("--prompt", "2 + 2?", "--heads", "ngram,medusa", "--compare")
    result = run("generate", *options, *SHORT)
    assert result.exit_code == 0
    assert "identical: yes" in result.output


def test_generate_samples_from_a_file_without_chat_template(run, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("SELECT a FROM b WHERE")
    options = ("--temperature", "0.8", "--top-p", "0.9", "--seed", "3", "--heads", "none")
    result = run("generate", "--file", str(file), "--no-chat", "--compare", *options, *SHORT)
    assert result.exit_code == 0
    assert "identical: yes" in result.output


def test_generate_exits_with_1_when_the_output_differs(run, monkeypatch):
    def wrong_arm(name, base, proposer):
        arm = generate_module.plain_arm(base)
        return replace(arm, name=name, generate=lambda call: arm.generate(call) + 1)

    monkeypatch.setattr(generate_module, "speculative_arm", wrong_arm)
    result = run("generate", "--prompt", "2 + 2?", "--compare", *SHORT)
    assert result.exit_code == 1
    assert "identical: NO" in result.output


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((), OptionError, "exactly one of --prompt and --file"),
        (("--prompt", "a", "--file", "b"), OptionError, "exactly one of"),
        (("--file", "/no/such/file"), OptionError, "--file.*cannot be read"),
        (("--prompt", "a", "--dtype", "int3"), OptionError, "--dtype.*float32"),
        (("--prompt", "a", "--base", "/no/such/model"), UnknownNameError, "--base.*not a folder"),
        (("--prompt", "a", "--heads", "ngrm"), UnknownNameError, "did you mean 'ngram'"),
    ],
)
def test_mistakes_are_named(run, arguments, error, message):
    with pytest.raises(error, match=message):
        run("generate", *arguments)


@pytest.mark.parametrize("heads", ["ngram", "none", "medusa"])
def test_revision_is_for_heads_on_the_hub(run, heads):
    with pytest.raises(OptionError, match="revision"):
        run("generate", "--prompt", "a", "--heads", heads, "--heads-revision", "v2")
