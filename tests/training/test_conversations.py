import json

import pytest

from speclm.errors import DataError, OptionError
from speclm.files.json_lines import JsonLine
from speclm.training.conversations import parse_conversation, read_conversations
from tests.training.alphabet import write_alphabet


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
    (
        '{"messages": [{"role": "assistant", "content": "a"}], "chat_template_kwargs": []}',
        r'expected "chat_template_kwargs".*\[\]',
    ),
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


def test_a_turn_that_calls_tools_or_reasons_needs_no_content():
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
    thought = {"role": "assistant", "reasoning_content": "abc"}
    for turn in (call, {**call, "content": None}, {**thought, "content": None}):
        row = {
            "messages": [turn],
            "tools": None,
            "chat_template_kwargs": {"enable_thinking": False},
        }
        parsed = parse_conversation(JsonLine(json.dumps(row).encode(), "row 7"))
        assert parsed.messages == [turn]
        assert parsed.template_options == {"enable_thinking": False}


def test_missing_and_empty_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl cannot be read"):
        read_conversations(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"empty\.jsonl: no conversations"):
        read_conversations(tmp_path / "empty.jsonl")


def test_limit_below_one_is_refused(tmp_path):
    with pytest.raises(OptionError, match="limit is 0, expected at least 1"):
        read_conversations(write_alphabet(tmp_path / "rows.jsonl"), limit=0)
