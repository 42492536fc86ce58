import importlib
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from speclm.chat import TextDecoder
from speclm.demo.bundle import assets
from speclm.errors import CheckpointError, OptionError, PromptError, UnknownNameError

generate_module = importlib.import_module("speclm.cli.generate")
SHORT = ("--max-new-tokens", "8")


def test_generate_compares_with_regular_generation(run):
    result = run("generate", "--prompt", "2 + 2?", "--compare", *SHORT)
    assert result.exit_code == 0
    assert "identical: yes" in result.output
    assert "tau" in result.output


def test_generate_joins_proposers_parted_by_commas(run):
    options = ("--prompt", "2 + 2?", "--heads", "ngram,medusa", "--compare")
    result = run("generate", *options, *SHORT)
    assert result.exit_code == 0
    assert "identical: yes" in result.output


def test_generate_drafts_with_layers_of_the_base(run, tmp_path):
    folder = shutil.copytree(assets()["base"], tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    number = 1 + max(int(key.split(".")[2]) for key in tensors if ".layers." in key)
    last, own = f"model.layers.{number - 1}.", f"model.layers.{number}."
    layer = {key.replace(last, own): value.clone() for key, value in tensors.items() if last in key}
    width = len(tensors["model.norm.weight"])
    norms = ("enorm", "hnorm", "shared_head.norm")
    layer |= {f"{own}{norm}.weight": torch.ones(width) for norm in norms}
    layer[f"{own}eh_proj.weight"] = torch.eye(width, 2 * width)
    save_file({**tensors, **layer}, folder / "model.safetensors", metadata={"format": "pt"})
    options = ("--base", str(folder), "--dtype", "float32", "--heads", "mtp", "--compare")
    result = run("generate", "--prompt", "2 + 2?", *options, *SHORT)
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
    def wrong_method(name, base, proposer, tree, engine):
        method = generate_module.plain_decoder(base)
        return replace(method, name=name, generate=lambda call: method.generate(call) + 1)

    monkeypatch.setattr(generate_module, "speculative_decoder", wrong_method)
    result = run("generate", "--prompt", "2 + 2?", "--compare", *SHORT)
    assert result.exit_code == 1
    assert "identical: NO" in result.output


def test_mistakes_are_named(run):
    for arguments, error, message in [
        ((), OptionError, "exactly one of --prompt and --file"),
        (("--prompt", "a", "--file", "b"), OptionError, "exactly one of"),
        (("--file", "/no/such/file"), OptionError, "--file.*cannot be read"),
        (("--prompt", "a", "--base", "/no/such/model"), UnknownNameError, "--base.*not a folder"),
        (("--prompt", "a", "--heads", "ngrm"), UnknownNameError, "did you mean 'ngram'"),
        (("--prompt", "a", "--heads", "medus"), UnknownNameError, "did you mean 'medusa'"),
        (("--prompt", "a", "--heads", "ngram,"), OptionError, "--heads is 'ngram,'"),
        (("--prompt", "a", "--heads", "none,ngram"), OptionError, "drop the 'none'"),
        (("--prompt", "a", "--heads", "mtp"), CheckpointError, "comes without MTP layers"),
        (("--prompt", "\udcff"), OptionError, "prompt 0 is no Unicode text"),
        (("--prompt", "", "--no-chat"), PromptError, "prompt 0 has no tokens"),
    ]:
        with pytest.raises(error, match=message):
            run("generate", *arguments)


@pytest.mark.parametrize("heads", ["ngram", "none", "medusa"])
def test_revision_is_for_heads_on_the_hub(run, heads):
    with pytest.raises(OptionError, match="revision"):
        run("generate", "--prompt", "a", "--heads", heads, "--heads-revision", "v2")


def test_base_whose_tokenizer_cannot_be_read_is_named(run, tmp_path):
    for path in assets()["base"].iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UnknownNameError, match=r"can be loaded \(KeyError"):
        run("generate", "--prompt", "a", "--base", str(tmp_path))


@pytest.mark.parametrize("heads", ["none", "ngram"])
def test_control_characters_of_the_model_do_not_reach_the_terminal(run, monkeypatch, heads):
    class Hostile(TextDecoder):
        def push(self, token):
            return "\x1b[31m" + super().push(token)

    monkeypatch.setattr("speclm.cli._display.TextDecoder", Hostile)
    decode = PreTrainedTokenizerBase.decode
    monkeypatch.setattr(
        PreTrainedTokenizerBase, "decode", lambda *a, **k: "\x9b31m" + decode(*a, **k)
    )
    output = run("generate", "--prompt", "2 + 2?", "--heads", heads, *SHORT).output
    assert "31m" in output
    assert not {"\x1b", "\x9b"} & set(output)


@pytest.mark.parametrize(
    "option", [("--max-new-tokens", "9" * 20), ("--seed", "9" * 30), ("--seed", "-1")]
)
def test_numbers_that_no_tensor_holds_are_refused(run, option):
    assert run("generate", "--prompt", "a", *option).exit_code == 2
