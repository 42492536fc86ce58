import json

import pytest
import torch
from transformers import AutoTokenizer

from speclm.demo.bundle import assets
from speclm.errors import OptionError, UnknownNameError
from speclm.target import TargetView
from tests.models import build_model

FEW = ("--num-prompts", "2", "--max-new-tokens", "6", "--batch", "2")


@pytest.fixture
def folder(tmp_path, request):
    """A random model of a family, with the bundled tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(assets()["base"])
    model = build_model(request.param, vocab_size=len(tokenizer), max_position_embeddings=512)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("folder", "backend"),
    [("llama", "tree attention"), ("qwen3_next", "chains")],
    indirect=["folder"],
)
def test_verdict_and_outputs_are_shown(run, folder, backend):
    result = run("verify", "--base", str(folder), *FEW)
    assert result.exit_code == 0
    assert backend in result.output
    rows = [
        line.split() for line in result.output.splitlines() if line.startswith(("greedy", "t1"))
    ]
    assert [row[:2] for row in rows] == [
        ["greedy", "1"],
        ["greedy", "2"],
        ["t1.0", "1"],
        ["t1.0", "2"],
    ]
    assert all(row[3] == "yes" and float(row[2]) > 1.5 for row in rows)


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_tokenizer_without_padding_is_given_some(run, folder):
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("pad_token")
    path.write_text(json.dumps(settings))
    few = ("--num-prompts", "2", "--max-new-tokens", "2", "--batch", "2")
    assert run("verify", "--base", str(folder), *few).exit_code == 0


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_wrong_tokens_are_shown_and_end_with_exit_code_1(run, folder, monkeypatch):
    original = TargetView.forward_tree

    def wrong(view, tokens, topology, cache, **options):
        logits = original(view, tokens, topology, cache, **options)
        if logits.shape[1] > 4:  # the self-check's trees are smaller
            logits = torch.roll(logits, 1, dims=2)
        return logits

    monkeypatch.setattr(TargetView, "forward_tree", wrong)
    few = ("--num-prompts", "1", "--max-new-tokens", "6", "--batch", "1")
    result = run("verify", "--base", str(folder), *few)
    assert result.exit_code == 1
    assert "NO, 0/1" in result.output


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("--dtype", "float16"), OptionError, "--dtype is 'float16'.*on the CPU in float32"),
        (("--device", "cuda"), OptionError, "--device is 'cuda', which only says something"),
        (("--device-map", "auto"), OptionError, "--device-map is 'auto'"),
        (("--quantization", "bnb-4bit"), OptionError, "--quantization is 'bnb-4bit'"),
        (("--base", ""), UnknownNameError, "base '' is no folder and no hub id"),
    ],
)
def test_options_that_mean_nothing_for_heads_are_refused(run, arguments, error, words):
    with pytest.raises(error, match=words):
        run("verify", str(assets()["eagle3"]), *arguments)


@pytest.mark.parametrize("option", ["--source", "--heads-revision", "--heads-subfolder"])
def test_options_of_heads_are_refused_without_them(run, option):
    with pytest.raises(OptionError, match=f"{option} is 'x', which only says something with heads"):
        run("verify", option, "x")


def test_unknown_model_is_refused(run):
    with pytest.raises(UnknownNameError, match="--base '' is not a folder or hub id"):
        run("verify", "--base", "")
    with pytest.raises(UnknownNameError, match="is not a folder or hub id"):
        run("verify", "--base", "/no/such/folder")
