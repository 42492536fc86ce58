import json
from types import SimpleNamespace

import pytest
from transformers import AutoConfig, AutoTokenizer

from speclm.demo.bundle import assets
from speclm.errors import DataError, OptionError, UnknownNameError
from speclm.methods.ngram.corpus import vocabulary_fingerprint
from speclm.methods.ngram.suffix_index import SuffixIndex

ANSWERS = ["SELECT name FROM singer", "SELECT COUNT(*) FROM singer"]
CHAT = [
    {"role": "user", "content": "Which zebras are there?"},
    {"role": "assistant", "content": ANSWERS[0]},
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": ANSWERS[1]},
]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    lines = [{"messages": CHAT}, {"text": "DELETE everything"}]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def load(path):
    """Return the written index, and a function that says whether a text is in it."""
    config = AutoConfig.from_pretrained(assets()["base"])
    tokenizer = AutoTokenizer.from_pretrained(assets()["base"])
    index = SuffixIndex.load(
        path, vocab_size=config.vocab_size, fingerprint=vocabulary_fingerprint(config)
    )

    def has(text):
        return index.find(tokenizer(text, add_special_tokens=False)["input_ids"]) is not None

    return index, has


def test_index_holds_answers_and_texts_and_no_questions(run, data, tmp_path):
    out = tmp_path / "texts.index"

    result = run("index", "--data", str(data), "--out", str(out))

    assert result.exit_code == 0
    index, has = load(out)
    assert f"{len(index)} tokens of 3 texts" in result.output
    assert all(has(text) for text in (*ANSWERS, "DELETE everything"))
    assert not has("Which zebras are there?")


def test_index_reads_standard_input(run, monkeypatch, data, tmp_path):
    stream = SimpleNamespace(buffer=SimpleNamespace(read=data.read_bytes))
    monkeypatch.setattr("speclm.cli._files.sys", SimpleNamespace(stdin=stream))
    run("index", "--data", "-", "--out", str(tmp_path / "texts.index"))
    assert load(tmp_path / "texts.index")[1](ANSWERS[0])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", r"--data .* is empty"),
        ('{"prompt": "a"}', r'data.jsonl:1: expected "messages".*or "text"'),
        ('{"text": ""}', r"string that is not empty, found .* correct the row"),
        ('{"messages": [{"role": "user", "content": "a"}]}', r"no turn has the role 'assistant'"),
        ("[", r"expected a JSON object"),
    ],
)
def test_lines_that_hold_no_text_are_named(run, data, tmp_path, line, message):
    data.write_text(line)
    with pytest.raises(DataError, match=message):
        run("index", "--data", str(data), "--out", str(tmp_path / "texts.index"))
    assert [path.name for path in tmp_path.iterdir()] == [data.name]


def test_files_and_bases_that_cannot_be_used_are_named(run, monkeypatch, data, tmp_path):
    out = tmp_path / "texts.index"
    with pytest.raises(OptionError, match=r"--out is .* a folder"):
        run("index", "--data", str(data), "--out", str(tmp_path))
    with pytest.raises(UnknownNameError, match=r"--base .* with a tokenizer .* correct it"):
        run("index", "--base", str(tmp_path), "--data", str(data), "--out", str(out))

    def fail(*arguments):
        raise OSError("full")

    monkeypatch.setattr("speclm.methods.ngram.suffix_index.write_file", fail)
    with pytest.raises(OptionError, match=r"--out .* cannot be written \(full\)"):
        run("index", "--data", str(data), "--out", str(out))
