import pytest

from speclm.data.schemas import SCHEMAS, RowError, find_schema, known_schemas, tools_of

ASKED = {"role": "user", "content": "q"}
ANSWERED = {"role": "assistant", "content": "a"}
PAIR = [ASKED, ANSWERED]
SYSTEM = {"role": "system", "content": "s"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}

SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
OTHER_NAMES = [{"from": "User", "value": "q"}, {"from": "chatgpt", "value": "a", "html": 1}]
OTHER_ROLES = [{"role": "developer", "content": "s"}, ASKED, {"role": "model", "content": ["a"]}]
REASONED = {**ANSWERED, "reasoning_content": "r"}
LONG = {"role": "user", "content": "q\n\nc"}
ALPACA = {"instruction": "q", "output": "a"}

KNOWN = [
    ("sharegpt", {"conversations": SHAREGPT}, PAIR),
    ("sharegpt", {"conversation": OTHER_NAMES, "system": "s"}, [SYSTEM, *PAIR]),
    ("messages", {"messages": PAIR, "system": ""}, PAIR),
    ("messages", {"conversation": [SYSTEM, *PAIR], "system": "t"}, [SYSTEM, *PAIR]),
    ("messages", {"conversations": PAIR}, PAIR),
    ("messages", {"chosen": PAIR, "rejected": []}, PAIR),
    ("messages", {"prompt": [ASKED], "chosen": [ANSWERED]}, PAIR),
    ("messages", {"prompt": [ASKED], "chosen": PAIR}, PAIR),
    ("messages", {"messages": OTHER_ROLES}, [SYSTEM, *PAIR]),
    ("alpaca", {**ALPACA, "input": ""}, PAIR),
    ("alpaca", {"instruction": "q", "context": "c", "response": "a"}, [LONG, ANSWERED]),
    ("alpaca", {**ALPACA, "history": [["q", "a"]], "system": "s"}, [SYSTEM, *PAIR, *PAIR]),
    ("pairs", {"human": "q", "assistant": "a"}, PAIR),
    ("pairs", {"prompt": "q", "completion": "a"}, PAIR),
    ("pairs", {"system_prompt": "s", "question": "q", "response": "a"}, [SYSTEM, *PAIR]),
    ("pairs", {"question": "q", "answer": "a", "reasoning": "r"}, [ASKED, REASONED]),
    ("pairs", {"prompt": [ASKED], "completion": [ANSWERED]}, PAIR),
    ("pairs", {"conversation": [{"human": "q", "assistant": "a"}] * 2}, [*PAIR, *PAIR]),
]


def test_a_row_becomes_messages_by_its_keys():
    for name, row, messages in KNOWN:
        assert find_schema(row) == name
        assert SCHEMAS[name].messages(row) == messages


def test_text_parts_are_joined_and_other_keys_of_a_turn_are_dropped():
    parts = [{"type": "text", "text": "a"}, "b"]
    turn = {"role": "assistant", "content": parts, "hashed_ip": "1.2.3.4", "tool_calls": None}
    assert SCHEMAS["messages"].messages({"messages": [turn]}) == [
        {"role": "assistant", "content": "ab"}
    ]


CALLING = [
    {"tool_calls": [CALL]},
    {"tool_calls": '[{"name": "f", "arguments": {"x": 1}}]', "content": None},
    {"function_call": {"name": "f", "arguments": '{"x": 1}'}},
    {"tool_calls": [{"name": "f", "parameters": {"x": 1}}], "reasoning": "r", "content": None},
]


def test_tool_calls_and_reasoning_are_kept_in_the_form_of_transformers():
    answer = {"role": "function", "name": "f", "content": "", "tool_call_id": "7"}
    for keys in CALLING:
        turn = {"role": "assistant", "reasoning_content": "r", **keys}
        assert SCHEMAS["messages"].messages({"messages": [turn, answer]}) == [
            {"role": "assistant", "content": None, "reasoning_content": "r", "tool_calls": [CALL]},
            {"role": "tool", "content": "", "name": "f", "tool_call_id": "7"},
        ]


def test_calls_of_sharegpt_become_tool_calls_with_their_ids():
    value = '[{"id": "7", "name": "f", "arguments": {}}]'
    turns = [{"from": "function_call", "value": value}, {"from": "observation", "value": "3"}]
    assert SCHEMAS["sharegpt"].messages({"conversations": turns}) == [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "7", "type": "function", "function": {"name": "f", "arguments": {}}}
            ],
        },
        {"role": "tool", "content": "3"},
    ]


def test_tools_may_be_json_in_a_string():
    found = [tools_of({"tools": tools}) for tools in (None, "", [], '[{"name": "f"}]')]
    assert found == [None, None, None, [{"name": "f"}]]


def turn(**keys):
    return {"messages": [{"role": "assistant", "content": "a", **keys}]}


BROKEN = [
    ("messages", {"messages": "x"}, "wrong_type", "'messages' is 'x', expected a list"),
    ("messages", {"messages": [*PAIR, 3]}, "wrong_type", "a turn is 3, expected an object"),
    ("messages", turn(role="narrator"), "unknown_role", "'role' is 'narrator', expected sys"),
    ("messages", turn(role=["user"]), "unknown_role", "'role' is \\['user'\\]"),
    ("messages", turn(content=3), "not_text", "'content' is 3, expected a string"),
    ("messages", turn(content=None), "not_text", "'content' is None"),
    ("messages", turn(role="user", content=None, tool_calls=[CALL]), "not_text", "is None"),
    ("messages", turn(content=[{"type": "image"}]), "not_text", "a part of 'content' is"),
    ("messages", turn(name=3), "not_text", "'name' is 3"),
    ("messages", turn(tool_calls=[3]), "bad_tool_call", "a tool call is 3, expected its name"),
    ("messages", turn(tool_calls="[]"), "bad_tool_call", "an empty list"),
    (
        "messages",
        turn(tool_calls=[{"name": "f", "arguments": "nonsense"}]),
        "bad_tool_call",
        "'arguments' is 'nonsense', expected JSON",
    ),
    (
        "messages",
        turn(tool_calls=[{"name": "f", "arguments": [1]}]),
        "bad_tool_call",
        "arguments are \\[1\\], expected an object",
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "function_call", "value": "f()"}]},
        "bad_tool_call",
        "expected JSON",
    ),
    ("sharegpt", {"messages": PAIR}, "missing_column", "a list of turns with 'from'"),
    ("alpaca", {"question": "q"}, "missing_column", "expected 'instruction' and 'output'"),
    ("pairs", {"question": "q"}, "missing_column", "expected one of prompt"),
    ("pairs", {"question": 1, "answer": "a"}, "not_text", "'question' is 1"),
    ("pairs", {"question": "q", "answer": 42}, "not_text", "'answer' is 42"),
    (
        "pairs",
        {"conversation": [{"human": "q", "assistant": "a"}, {"human": "q"}]},
        "wrong_type",
        "expected 'human' and 'assistant'",
    ),
    ("alpaca", {**ALPACA, "history": 3}, "wrong_type", "'history' is"),
    ("alpaca", {**ALPACA, "history": [3]}, "wrong_type", "has 3"),
]


def test_rows_that_break_their_schema_say_how():
    for name, row, reason, detail in BROKEN:
        with pytest.raises(RowError, match=detail) as raised:
            SCHEMAS[name].messages(row)
        assert raised.value.reason == reason


def test_tools_that_are_no_list_are_named():
    for tools in (3, "nonsense", {}, '{"name": "f"}'):
        with pytest.raises(RowError, match="tools") as raised:
            tools_of({"tools": tools})
        assert raised.value.reason == "bad_tool_call"


def test_keys_of_no_schema_are_not_taken_for_one():
    assert find_schema({"text": "a", "chosen": "b"}) is None
    assert find_schema({"conversations": []}) == "sharegpt"
    assert SCHEMAS["sharegpt"].messages({"conversations": []}) == []
    assert all(name in known_schemas() for name in SCHEMAS)
