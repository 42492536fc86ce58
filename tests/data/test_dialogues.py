import json
import re

import pytest

from speclm.data.dialogues import Answer, Dialogue, DistillSettings, Drop, parse_row
from speclm.errors import DataError, OptionError
from speclm.files.json_lines import JsonLine

USER = {"role": "user", "content": "q"}
OLD = {"role": "assistant", "content": "old", "reasoning_content": "thought"}
SYSTEM = {"role": "system", "content": "s"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
RESULT = {"role": "tool", "content": "42"}


def line(content):
    text = content if isinstance(content, str) else json.dumps(content)
    return JsonLine(text.encode(), "f:7")


def answered(messages, *answers, settings=None, **keys):
    """Return what the questions were, and the finished row."""
    dialogue = Dialogue(
        parse_row(line({"messages": messages, **keys}), 3), settings or DistillSettings()
    )
    asked, given = [], iter(answers)
    while dialogue.is_open:
        asked.append(list(dialogue.messages))
        found = next(given)
        dialogue.take(found if isinstance(found, Answer) else Answer(found, 2))
    assert next(given, None) is None
    return asked, dialogue.finish()


def new(text, **keys):
    return {"role": "assistant", "content": text, **keys}


def test_every_answer_is_asked_for_given_the_new_ones_before_it():
    asked, finished = answered([USER, OLD, USER, OLD], "a", "b", id="x", topic="maths")
    assert asked == [[USER], [USER, new("a"), USER]]
    assert finished.row == {
        "id": "x",
        "messages": [USER, new("a"), USER, new("b")],
        "topic": "maths",
        "finish_reason": "stop",
    }
    assert next(iter(finished.row)) == "id"
    assert (finished.position, finished.num_tokens) == (3, 4)


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([USER], [USER, new("a")]),  # a question without an answer gets one
        ([USER, OLD, USER], [USER, new("a"), USER, new("b")]),
        ([OLD, USER, OLD], [OLD, USER, new("a")]),  # a greeting answers nothing
        ([USER, CALL, RESULT, OLD], [USER, CALL, RESULT, new("a")]),
        ([USER, {"role": "assistant", "reasoning_content": "t"}], [USER, new("a")]),
        ([USER, CALL, RESULT], [USER, CALL, RESULT, new("a")]),
    ],
)
def test_turns_that_answer_nothing_or_call_tools_are_kept(messages, expected):
    answers = [each["content"] for each in expected if each["content"] in ("a", "b")]
    assert answered(messages, *answers)[1].row["messages"] == expected


def test_system_message_is_added_only_where_there_is_none():
    settings = DistillSettings(system="be brief")
    _, finished = answered([USER], "a", settings=settings)
    assert finished.row["messages"][0] == {"role": "system", "content": "be brief"}
    for first in (SYSTEM, {"role": "developer", "content": "d"}):
        _, finished = answered([first, USER], "a", settings=settings)
        assert finished.row["messages"] == [first, USER, new("a")]


def test_reasoning_of_a_server_is_kept_next_to_the_answer():
    _, finished = answered([USER, OLD], Answer("a", 1, reasoning="because"))
    assert finished.row["messages"][1] == new("a", reasoning_content="because")


def test_a_cut_answer_drops_the_row_or_ends_it():
    cut = Answer("a", 5, is_cut=True)
    messages = [USER, OLD, USER, OLD]
    _, finished = answered(messages, cut)
    assert (finished.row, finished.dropped, finished.num_tokens) == (None, str(Drop.CUT), 5)
    _, finished = answered(messages, cut, settings=DistillSettings(keep_cut=True))
    assert finished.row["messages"] == [USER, new("a")]
    assert finished.row["finish_reason"] == "length"


def test_rows_with_an_empty_answer_or_nothing_to_answer_are_dropped():
    assert answered([USER, OLD, USER, OLD], "a", " \n")[1].dropped == str(Drop.EMPTY)
    assert answered([SYSTEM, OLD])[1].dropped == str(Drop.NO_QUESTION)


def test_derived_ids_depend_on_content_and_position_only():
    def name(messages, position, **keys):
        return parse_row(line({**keys, "messages": messages}), position).id

    assert name([USER], 0) == name([dict(reversed(USER.items()))], 0, topic="x")
    assert len({name([USER], 0), name([USER], 1), name([OLD], 0)}) == 3
    assert (name([USER], 0, id="own"), name([USER], 0, id=12)) == ("own", "12")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("[1]", "f:7: expected a JSON object"),
        ({"prompt": "q"}, 'f:7: expected "messages", .*speclm data convert'),
        ({"messages": []}, 'expected "messages"'),
        ({"messages": [USER, "text"]}, 'expected "messages"'),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 'expected "messages"'),
        ({"messages": [{"role": "assistant", "tool_calls": []}]}, 'expected "messages"'),
        ({"messages": [USER], "id": 1.5}, 'f:7: expected "id" to be .*found 1.5; drop it'),
        ({"messages": [USER], "chat_template_kwargs": [1]}, "to be an object, found"),
        ({"messages": [USER], "tools": "t"}, "f:7: expected \"tools\" to be a list .*found 't'"),
    ],
)
def test_rows_that_cannot_be_used_are_named(row, message):
    with pytest.raises(DataError, match=message):
        parse_row(line(row), 0)


def test_seeds_depend_on_seed_turn_and_rows():
    settings = DistillSettings(seed=1)
    seeds = [
        settings.seed_of(0, ["a", "b"]),
        settings.seed_of(0, ["b", "a"]),
        settings.seed_of(1, ["a", "b"]),
        DistillSettings(seed=2).seed_of(0, ["a", "b"]),
        settings.seed_of(0, ["a"]),
    ]
    assert len(set(seeds)) == 5
    assert seeds[0] == settings.seed_of(0, iter(["a", "b"])) == 100539300
    assert all(0 <= seed < 2**31 for seed in seeds)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 1.1),
        ("top_k", -1),
        ("seed", -1),
        ("batch_size", 0),
        ("system", "\ud800"),
    ],
)
def test_settings_out_of_range_are_named(option, value):
    with pytest.raises(OptionError, match=re.escape(option)):
        DistillSettings(**{option: value})
