import importlib
import json

import pytest

from speclm.errors import OptionError

bench_module = importlib.import_module("speclm.cli.bench")

PROMPTS = [
    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]},
    {"prompt": "SELECT a FROM"},
]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, PROMPTS)) + "\n\n")
    return path


def test_bench_prints_a_table_and_appends_records(run, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    options = ("--batch", "1,2", "--max-new-tokens", "4", "--threads", "1", "--prompt-lookup")
    result = run(
        "bench", "--prompts", str(prompts), *options, "--heads", "ngram", "--out", str(out)
    )
    assert result.exit_code == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(records) == 6  # prompt lookup takes one prompt at a time
    assert all(record["num_identical"] == record["n"] for record in records[::2])
    assert "prompt_lookup" in result.output


def test_a_conversation_loses_its_answer(prompts):
    assert bench_module.read_prompts(prompts) == [
        [{"role": "user", "content": "2 + 2?"}],
        "SELECT a FROM",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("not json", ":1: expected a JSON object"),
        ('{"text": "a"}', 'expected "messages" or "prompt"'),
    ],
)
def test_bad_prompt_files_are_named_with_the_line(tmp_path, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(OptionError, match=message):
        bench_module.read_prompts(path)


def test_missing_prompt_file_is_named(tmp_path):
    with pytest.raises(OptionError, match="cannot be read"):
        bench_module.read_prompts(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--batch", "0"), "--batch has '0'"), (("--settings", "t9"), "setting 't9' is not known")],
)
def test_bad_options_are_named(run, prompts, options, message):
    with pytest.raises(OptionError, match=message):
        run("bench", "--prompts", str(prompts), *options)
