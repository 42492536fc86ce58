import json

import pytest

from speclm.bench import (
    Comparison,
    compare,
    make_dialogues,
    plain_decoder,
    speculative_decoder,
    write_answers,
)
from speclm.errors import OptionError
from speclm.files.questions import Question
from speclm.methods.ngram.proposer import NgramProposer

ASKED = tuple([{"role": "user", "content": text}] for text in ("one two three", "four"))


@pytest.fixture
def comparison(tiny_base, tokenizer):
    questions = [Question(81, "writing", "mt_bench", ASKED), Question(161, "qa", "qa", ASKED[:1])]
    options = {"do_sample": False, "max_new_tokens": 12}
    tasks = make_dialogues(questions, tiny_base, tokenizer, options=options)
    ours = speculative_decoder("speclm", tiny_base, NgramProposer(), adaptive=False)
    (found,) = compare(plain_decoder(tiny_base), [ours], tasks, base=tiny_base, num_warmup=0)
    return found


def test_answers_have_the_layout_of_spec_bench(tmp_path, comparison, tokenizer):
    files = write_answers(tmp_path / "new", [("greedy", comparison)], tokenizer)
    assert [file.name for file in files] == ["plain-greedy.jsonl", "speclm-greedy.jsonl"]
    plain, ours = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    for rows in (plain, ours):
        assert [row["question_id"] for row in rows] == [81, 161]
        assert [row["category"] for row in rows] == ["writing", "qa"]
        for row in rows:
            assert list(row) == [
                *("question_id", "category", "answer_id", "model_id", "choices", "tstamp")
            ]
            (choice,) = row["choices"]
            assert list(choice) == [
                *("index", "turns", "decoding_steps", "new_tokens", "wall_time", "accept_lengths")
            ]
            assert len(choice["accept_lengths"]) == sum(choice["decoding_steps"])
    assert [row["model_id"] for row in ours] == ["speclm-greedy"] * 2
    for one, two in zip(plain, ours, strict=True):
        assert one["choices"][0]["turns"] == two["choices"][0]["turns"]
        assert one["choices"][0]["new_tokens"] == two["choices"][0]["new_tokens"]
    lengths = [length for row in ours for length in row["choices"][0]["accept_lengths"]]
    assert sum(lengths) / len(lengths) == pytest.approx(comparison.stats.tau)
    first = plain[0]["choices"][0]
    assert first["decoding_steps"] == [number - 1 for number in first["new_tokens"]]


def test_answers_that_cannot_be_written_are_an_error(tmp_path, comparison, tokenizer):
    with pytest.raises(OptionError, match="no answer to write"):
        write_answers(tmp_path, [("greedy", Comparison("speclm", True, []))], tokenizer)
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="answers cannot be written to"):
        write_answers(tmp_path / "file", [("greedy", comparison)], tokenizer)
