import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speclm.errors import DataError, OptionError
from speclm.files.json_lines import JsonLine
from speclm.training.conversations import (
    parse_conversation,
    read_conversations,
    tokenize_conversation,
)
from tests.training.alphabet import (
    TAGGED,
    UNTAGGED,
    WORDS,
    conversation,
    word_tokenizer,
    write_alphabet,
)

SHIFTING = "{{ messages | length }}" + UNTAGGED  # what comes later changes what comes first
REFUSING = "{{ raise_exception('roles must alternate') }}"
TEMPLATES = {"tagged": TAGGED, "untagged": UNTAGGED}


def test_rows_keep_file_order_and_know_their_line(tmp_path):
    path = write_alphabet(tmp_path / "rows.jsonl", num_rows=3)
    path.write_text("\n" + path.read_text())
    rows = read_conversations(path)
    assert [row.messages[0]["content"] for row in rows] == ["a", "b", "c"]
    assert [row.where for row in rows] == [f"{path}:{line}" for line in (2, 3, 4)]


def test_line_separators_inside_a_string_stay_in_it(tmp_path):
    path = tmp_path / "rows.jsonl"
    messages = [{"role": "assistant", "content": "a\u2028b\x85c"}]
    path.write_text(json.dumps({"messages": messages}, ensure_ascii=False), "utf-8")
    assert [row.messages for row in read_conversations(path)] == [messages]


def test_limit_draws_rows_by_seed_in_file_order(tmp_path):
    path = write_alphabet(tmp_path / "rows.jsonl")
    draws = [read_conversations(path, limit=4, seed=seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    contents = [row.messages[0]["content"] for row in draws[2]]
    assert contents == sorted(contents)
    assert len(contents) == 4
    assert len(read_conversations(path, limit=99)) == 12


BAD_LINES = [
    ("nonsense", "row 7: expected a JSON object"),
    ("{}", 'expected "messages"'),
    ("[" * 10**5, "7: .*nested too deeply"),
    ('{"a": ' + "9" * 5000 + "}", "7: .*digits"),
    ('{"messages": [{"role": "assistant", "content": "\\ud800"}]}', "7: .*surrogates"),
    ('{"messages": "hello"}', 'expected "messages"'),
    ('{"messages": [{"role": "user"}]}', 'strings "role" and "content".*speclm data convert'),
    ('{"messages": [{"role": "assistant", "content": null, "tool_calls": []}]}', 'and "content"'),
    ('{"messages": [{"role": "assistant", "content": 3, "tool_calls": [1]}]}', 'and "content"'),
    ('{"messages": [{"role": "assistant", "content": "a"}], "tools": {}}', r'expected "tools".*{}'),
    ('{"messages": []}', "no turn has the role 'assistant'"),
    (
        json.dumps({"messages": [{"role": "user", "content": "a"}]}),
        "row 7: no turn has the role 'assistant'.*drop the line",
    ),
]


def test_bad_lines_are_named():
    for line, message in BAD_LINES:
        with pytest.raises(DataError, match=message):
            parse_conversation(JsonLine(line.encode(), "row 7"))


def test_a_turn_that_calls_tools_needs_no_content():
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
    for turn in (call, {**call, "content": None}):
        line = JsonLine(json.dumps({"messages": [turn], "tools": None}).encode(), "row 7")
        assert parse_conversation(line).messages == [turn]


def test_missing_and_empty_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl cannot be read"):
        read_conversations(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"empty\.jsonl: no conversations"):
        read_conversations(tmp_path / "empty.jsonl")


def test_limit_below_one_is_refused(tmp_path):
    with pytest.raises(OptionError, match="limit is 0, expected at least 1"):
        read_conversations(write_alphabet(tmp_path / "rows.jsonl"), limit=0)


@pytest.fixture(params=TEMPLATES.values(), ids=TEMPLATES.keys())
def tokenizer(request):
    return word_tokenizer(request.param)


def words(example):
    return [WORDS[token] for token in example["input_ids"]]


def test_mask_covers_answers_and_the_ends_of_their_turns(tokenizer):
    row = tokenize_conversation(conversation("ab", "cd", "e", "f"), tokenizer)
    expected = "<user> a b <end> <assistant> c d <end> <user> e <end> <assistant> f <end>"
    assert words(row) == expected.split()
    assert row["loss_mask"] == [0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1]


@given(st.lists(st.text("abc", min_size=1, max_size=4), min_size=2, max_size=6))
def test_render_boundaries_say_what_tags_say(turns):
    row = conversation(*turns)
    results = [tokenize_conversation(row, word_tokenizer(t)) for t in TEMPLATES.values()]
    assert results[0] == results[1]


def test_max_length_cuts_the_end_off(tokenizer):
    row = tokenize_conversation(conversation("ab", "cd"), tokenizer, max_length=6)
    assert (len(row["input_ids"]), sum(row["loss_mask"])) == (6, 1)


def test_row_that_max_length_leaves_without_answer_is_named(tokenizer):
    with pytest.raises(DataError, match=r"row 1: max_length 5 cuts off .* number 6 of 8; raise"):
        tokenize_conversation(conversation("ab", "cd"), tokenizer, max_length=5)


def test_all_zero_mask_is_an_error_that_names_the_row():
    untouched = UNTAGGED + "{% generation %}{% endgeneration %}"
    with pytest.raises(DataError, match="row 1: the loss mask of 8 tokens is all zero"):
        tokenize_conversation(conversation("ab", "cd"), word_tokenizer(untouched))


def test_unstable_render_is_an_error_that_names_the_row_and_the_remedy():
    with pytest.raises(DataError, match=r"row 1: the render up to assistant turn 1.*generation"):
        tokenize_conversation(conversation("a", "b", "c", "d"), word_tokenizer(SHIFTING))


def test_assistant_turn_without_prompt_needs_tags():
    row = conversation("", "abc")
    row.messages.pop(0)
    assert sum(tokenize_conversation(row, word_tokenizer(TAGGED))["loss_mask"]) == 4
    with pytest.raises(DataError, match="row 1: the first turn is the assistant's"):
        tokenize_conversation(row, word_tokenizer(UNTAGGED))


def test_template_that_refuses_a_row_names_it():
    with pytest.raises(DataError, match=r"row 1: the chat template refuses .*roles must alternate"):
        tokenize_conversation(conversation("a", "b"), word_tokenizer(REFUSING))
    with pytest.raises(DataError, match=r"row 1: the chat template refuses .*TypeError: can only"):
        tokenize_conversation(conversation("a", "b"), word_tokenizer("{{ messages + 1 }}"))


def test_tokenizer_without_template_is_refused():
    with pytest.raises(OptionError, match=r"has no chat template; set tokenizer\.chat_template"):
        tokenize_conversation(conversation("a", "b"), word_tokenizer(None))


def test_slow_tokenizer_is_refused(monkeypatch, tokenizer):
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: False))
    with pytest.raises(OptionError, match="does not say which characters"):
        tokenize_conversation(conversation("a", "b"), tokenizer)
