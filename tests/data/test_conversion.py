import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speclm.data import convert
from speclm.errors import DataError, OptionError
from speclm.training.conversations import read_conversations
from speclm.training.loss_masks import tokenize_conversation
from tests.training.alphabet import WORDS, word_tokenizer

PAIR = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
DEEP = '{"name": "f", "arguments": ' + '{"x": ' * 98 + "1" + "}" * 99
CALLS = (
    "{% if tools %}<system>{{ tools[0]['name'] }}{% endif %}"
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['reasoning_content'] }}{% if m['tool_calls'] %}"
    "{{ m['tool_calls'][0]['function']['name'] }}{% else %}{{ m['content'] }}{% endif %}<end>"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


def sharegpt(*texts, **keys):
    """Return turns that alternate between human and gpt."""
    roles = ("human", "gpt")
    turns = [{"from": roles[at % 2], "value": text} for at, text in enumerate(texts)]
    return {"conversations": turns, **keys}


@pytest.fixture
def write(tmp_path):
    def write_rows(*rows, name="chats.jsonl"):
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        text = "\n".join(lines) if name.endswith("jsonl") else "[" + ",\n".join(lines) + "]"
        path.write_text(text, encoding="utf-8", errors="surrogateescape")
        return path

    return write_rows


@pytest.fixture
def out(tmp_path):
    return tmp_path / "messages.jsonl"


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_files_of_all_forms_become_one_file_of_messages(write, out):
    sources = [
        write(sharegpt("q", "好\u2028\x01"), name="chats.json"),
        write({"id": 7, "instruction": "q", "output": "a"}),
        write({"messages": PAIR, "id": "x"}, {"prompt": "q", "completion": "a"}, name="b.jsonl"),
    ]
    report = convert(sources, str(out))
    assert (report.num_rows, report.num_kept, report.num_dropped, report.outcomes) == (4, 4, 0, ())
    assert report.schemas == {"alpaca": 1, "messages": 1, "pairs": 1, "sharegpt": 1}
    written = lines(out)
    assert [row["messages"] for row in written[1:]] == [PAIR] * 3
    assert written[0]["messages"][1] == {"role": "assistant", "content": "好\u2028\x01"}
    assert [row["id"] for row in written[1:3]] == ["7", "x"]
    first = out.read_bytes()
    assert "好".encode() in first
    convert(sources, out, overwrite=True)
    assert out.read_bytes() == first


@given(st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), min_size=1, max_size=3))
def test_every_text_is_written_as_the_json_module_does(tmp_path_factory, pairs):
    folder = tmp_path_factory.mktemp("texts")
    rows = [sharegpt(f"q{asked}", f"a{answered}") for asked, answered in pairs]
    (folder / "chats.json").write_text(json.dumps(rows))
    convert(folder / "chats.json", folder / "out.jsonl")
    for line, (asked, answered) in zip(
        (folder / "out.jsonl").read_text("utf-8").split("\n"), pairs, strict=False
    ):
        messages = [
            {"role": "user", "content": f"q{asked}"},
            {"role": "assistant", "content": f"a{answered}"},
        ]
        row = {"id": json.loads(line)["id"], "messages": messages}
        assert line == json.dumps(row, ensure_ascii=False)


OUTCOMES = [
    ("nonsense", "broken_json", True),
    ("[1]", "not_an_object", True),
    ({"text": "a"}, "unknown_schema", True),
    ({"conversations": "a"}, "wrong_type", True),
    (sharegpt("q", 3), "not_text", True),
    ('{"prompt": "q", "completion": "\udcff"}', "not_utf8", True),
    ('{"prompt": "q\\ud800", "completion": "a"}', "not_utf8", True),
    ('{"prompt": "q", "completion": "a", "id": "\\ud800"}', "not_utf8", True),
    ({"messages": [{"role": "narrator", "content": "a"}]}, "unknown_role", True),
    ({"prompt": "q", "completion": "a", "tools": "f"}, "bad_tool_call", True),
    (f'{{"prompt": "q", "completion": "a", "tool_calls": {DEEP}}}', "bad_tool_call", True),
    ('{"prompt": "q", "completion": "a", "tools": [NaN]}', "bad_tool_call", True),
    (sharegpt("q"), "no_answer", True),
    (sharegpt("", "a"), "empty_turn", True),
    (sharegpt("q", "a", "", "a"), "cut_empty_turn", False),
    (sharegpt("q", "a", "q"), "unanswered_end", False),
    ({"messages": [*PAIR, PAIR[1]]}, "cut_role_order", False),
    ({"messages": [PAIR[0], *PAIR]}, "role_order", True),
    ({"messages": [PAIR[1], *PAIR]}, "leading_turns", False),
    ({"messages": [{"role": "system", "content": ""}, *PAIR]}, "empty_system", False),
]


def test_rows_that_are_dropped_or_repaired_are_counted_with_their_place(write, out):
    good = sharegpt("q", "a")
    source = write(good, *(row for row, _, _ in OUTCOMES), good)
    report = convert(source, out)
    kept = 2 + sum(not is_dropped for _, _, is_dropped in OUTCOMES)
    assert (report.num_rows, report.num_kept) == (len(OUTCOMES) + 2, kept)
    assert report.num_repaired == kept - 2
    assert [row["messages"] for row in lines(out)] == [PAIR] * kept
    found = {(each.reason, each.is_dropped): each for each in report.outcomes}
    assert set(found) == {(reason, is_dropped) for _, reason, is_dropped in OUTCOMES}
    reasons = [reason for _, reason, _ in OUTCOMES]
    for (reason, _), each in found.items():
        assert each.count == reasons.count(reason)
        assert each.where == f"{source}:{reasons.index(reason) + 2}"
        assert each.excerpt
    assert found["not_text", True].detail == "'value' is 3, expected a string"


def test_strict_makes_a_row_that_cannot_be_used_an_error(write, out):
    for row, reason, is_dropped in OUTCOMES:
        source = write(sharegpt("q", "a"), row)
        if is_dropped:
            with pytest.raises(DataError, match=r"chats\.jsonl:2: .*, found .*correct or drop"):
                convert(source, out, strict=True)
        else:
            convert(source, out, strict=True, overwrite=True)
            out.unlink()
        assert not out.exists(), reason


def test_repeated_conversations_are_dropped_on_request(write, out):
    rows = [sharegpt("q", "a", id=at) for at in range(3)]
    source = write(*rows, sharegpt("q", "b", id=0), name="chats.json")
    assert convert(source, out).num_kept == 4
    ids = [row["id"] for row in lines(out)]
    assert ids[:3] == ["0", "1", "2"]
    assert len(set(ids)) == 4
    report = convert(source, out, deduplicate=True, overwrite=True)
    assert [row["id"] for row in lines(out)] == ["0", ids[3]]
    (duplicates,) = report.outcomes
    assert (duplicates.reason, duplicates.count) == ("duplicate", 2)
    assert duplicates.where == f"{source}, row 2"


def test_ids_and_order_do_not_depend_on_batches(monkeypatch, write, out):
    rows = [sharegpt("q", f"a{at % 5}", id=at % 7) for at in range(30)]
    source = write(*rows, name="chats.json")
    convert(source, out)
    expected = out.read_bytes()
    monkeypatch.setattr("speclm.data.conversion._BATCH_ROWS", 4)
    convert(source, out, overwrite=True)
    assert out.read_bytes() == expected
    assert len({row["id"] for row in lines(out)}) == 30


def test_rows_of_no_known_schema_are_an_error_with_the_keys(monkeypatch, write, out):
    monkeypatch.setattr("speclm.data.conversion._PROBED_ROWS", 3)
    words = r"chats\.jsonl:1: the keys are 'text', 'n', expected those of .*sharegpt \(conversati"
    for rows in ([{"text": "a", "n": 1}], [{"text": "a", "n": 1}] * 4 + [sharegpt("q", "a")]):
        with pytest.raises(DataError, match=words):
            convert(write(*rows), out)
    with pytest.raises(DataError, match=r"under 'conversations'.*jq"):
        convert(write({"conversations": [sharegpt("q", "a")]}), out, strict=True)
    with pytest.raises(DataError, match=r"the keys are 'data' \(the rows are .* under 'data'.*jq"):
        convert(write({"data": [sharegpt("q", "a")]}), out)
    report = convert(write("nonsense", {"text": "a"}, {}, sharegpt("q", "a")), out)
    assert report.num_kept == 1


def test_a_schema_that_is_named_is_that_of_all_rows(write, out):
    both = {"messages": PAIR, "prompt": "p", "completion": "c"}
    convert(write(both), out, schema="pairs")
    assert [turn["content"] for turn in lines(out)[0]["messages"]] == ["p", "c"]
    with pytest.raises(DataError, match=r"none of 1 rows can be kept: 1 because the keys do not"):
        convert(write(sharegpt("q", "a")), out, schema="alpaca", overwrite=True)
    with pytest.raises(OptionError, match=r"schema is 'sharegtp', .*did you mean 'sharegpt'"):
        convert(write(both), out, schema="sharegtp")


def test_no_row_that_can_be_kept_is_an_error_that_leaves_the_old_file(write, out, tmp_path):
    out.write_text("old")
    source = write("{", ' "conversations": []', "}")
    with pytest.raises(DataError, match=r"none of 3 rows .*: 3 because the line is not JSON, the "):
        convert(source, out, overwrite=True)
    with pytest.raises(DataError, match=r"chats\.json, line 2: "):
        convert(write(sharegpt("q", "a"), "{", name="chats.json"), out, overwrite=True)
    assert out.read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {out.name, "chats.jsonl", "chats.json"}


def test_outputs_that_cannot_be_written_are_named(write, out, tmp_path):
    source = write(sharegpt("q", "a"))
    with pytest.raises(OptionError, match="no file to convert is named"):
        convert([], out)
    (tmp_path / "link.jsonl").symlink_to(source)
    for same in (source, tmp_path / "link.jsonl"):
        with pytest.raises(OptionError, match="is also a source; name another"):
            convert(source, same, overwrite=True)
    with pytest.raises(OptionError, match="is a folder or a device"):
        convert(source, tmp_path, overwrite=True)
    with pytest.raises(OptionError, match=r"cannot be written .*No such file"):
        convert(source, tmp_path / "none" / "a.jsonl")
    with pytest.raises(OptionError, match="has a null byte"):
        convert(source, "a\0b")
    with pytest.raises(OptionError, match="cannot be looked at"):
        convert(source, "a" * 999)
    with pytest.raises(DataError, match=r"none\.json cannot be read"):
        convert([source, tmp_path / "none.json"], out)
    assert not out.exists()
    out.write_text("old")
    with pytest.raises(OptionError, match=r"exists; name another file, or pass --overwrite"):
        convert(source, out)
    assert out.read_text() == "old"


def test_tools_and_reasoning_are_trained_on(write, out):
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {}}', "reasoning": "b"},
        {"from": "observation", "value": "o"},
        {"from": "gpt", "value": "a", "reasoning_content": "c"},
    ]
    tools = '[{"name": "t"}]'
    convert(write({"conversations": turns, "tools": tools}), out)
    (conversation,) = read_conversations(out)
    (row,) = tokenize_conversation(conversation, word_tokenizer(CALLS))
    words = "<system> t <user> q <assistant> b f <end> <end> o <assistant> c a <end>"
    assert [WORDS[token] for token in row["input_ids"]] == words.split()
    trained = [WORDS[t] for t, m in zip(row["input_ids"], row["loss_mask"], strict=True) if m]
    assert trained == ["b", "f", "<end>", "c", "a", "<end>"]
