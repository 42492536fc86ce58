"""The forms in which conversations are published, and how each becomes a list of messages."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from speclm.errors import shown
from speclm.files.atomic import load_json

Message = dict[str, Any]
"""A turn: ``role``, ``content``, and, where there are any, the other keys of `_KEPT`."""

Row = Mapping[str, Any]

_KEPT = ("name", "reasoning_content", "thinking", "tool_call_id")
_TURNS = ("messages", "conversations", "conversation", "chosen")
_QUESTIONS = ("prompt", "question", "query", "human", "user", "problem", "input")
_ANSWERS = ("completion", "response", "answer", "assistant", "gpt", "solution", "output")
_ALPACA_INPUTS = ("input", "context")
_ALPACA_ANSWERS = ("output", "response", "answer")
_SYSTEMS = ("system", "system_prompt")
_TOOL_CALL = "function_call"
_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "customer"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "bard", "bing"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
    **dict.fromkeys(("function_response", "tool_response", "tool_result"), "tool"),
    **dict.fromkeys((_TOOL_CALL, "tool_call"), _TOOL_CALL),
}


class RowError(Exception):
    """A row cannot be used.

    Args:
        reason: A key of `speclm.data.report.REASONS`.
        detail: What was found and what was expected.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, slots=True)
class Schema:
    """A form of conversations.

    Args:
        columns: What identifies it, for messages.
        matches: Returns whether the keys of a row are those of this form.
        messages: Returns the messages of a row.
    """

    columns: str
    matches: Callable[[Row], bool]
    messages: Callable[[Row], list[Message]]


def find_schema(row: Row) -> str | None:
    """Return the name of the first schema whose keys a row has; None if there is none."""
    return next((name for name, schema in SCHEMAS.items() if schema.matches(row)), None)


def known_schemas() -> str:
    """Return the schemas with their columns, for messages."""
    return ", ".join(f"{name} ({schema.columns})" for name, schema in SCHEMAS.items())


def tools_of(row: Row) -> list[Any] | None:
    """Return the tools that a conversation may call: a list of descriptions, or its JSON text.

    Raises:
        RowError: If they are anything else.
    """
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _parsed(tools, "tools") if tools.strip() else None
    if tools is not None and not isinstance(tools, list):
        raise RowError("bad_tool_call", f"tools is {shown(tools)}, expected a list")
    return tools or None


def _turn_list(row: Row) -> tuple[str, str] | None:
    """Return the column of turns, and the key of their roles, or "human" for a list of pairs."""
    for column in _TURNS:
        match row.get(column):
            case [{"role": _}, *_]:
                return column, "role"
            case [{"from": _}, *_]:
                return column, "from"
            case [{"human": _, "assistant": _}, *_]:
                return column, "human"
    if "conversations" in row:
        return "conversations", "from"
    return next(((name, "role") for name in ("messages", "conversation") if name in row), None)


def _has_turns(role_key: str) -> Callable[[Row], bool]:
    def matches(row: Row) -> bool:
        found = _turn_list(row)
        return found is not None and found[1] == role_key

    return matches


def _from_turns(role_key: str, text_key: str) -> Callable[[Row], list[Message]]:
    def messages(row: Row) -> list[Message]:
        found = _turn_list(row)
        if found is None or found[1] != role_key:
            raise _missing(row, f"a list of turns with {role_key!r} and {text_key!r}")
        column, prompt = found[0], row.get("prompt")
        turns = _messages(row[column], column, role_key, text_key)
        if column == "chosen" and isinstance(prompt, list):  # preference data
            asked = _messages(prompt, "prompt", role_key, text_key)
            turns = turns if turns[: len(asked)] == asked else [*asked, *turns]
        return [*_system(row, turns), *turns]

    return messages


def _messages(turns: Any, column: str, role_key: str, text_key: str) -> list[Message]:
    if not isinstance(turns, list):
        raise RowError("wrong_type", f"{column!r} is {shown(turns)}, expected a list of turns")
    return [_message(turn, role_key, text_key) for turn in turns]


def _message(turn: Any, role_key: str, text_key: str) -> Message:
    if not isinstance(turn, dict):
        raise RowError("wrong_type", f"a turn is {shown(turn)}, expected an object")
    name = turn.get(role_key)
    role = _ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise RowError("unknown_role", f"{role_key!r} is {shown(name)}, expected {_role_names()}")
    content, calls = turn.get(text_key), None
    if role == _TOOL_CALL:
        role, content, calls = "assistant", None, _tool_calls(content)
    elif len(turn) == 2 and isinstance(content, str):
        return {"role": role, "content": content}
    elif role == "assistant" and (given := turn.get("tool_calls") or turn.get(_TOOL_CALL)):
        calls = _tool_calls(given)
    message: Message = {"role": role, "content": _text(content, text_key, may_lack=bool(calls))}
    for key in _KEPT:
        if turn.get(key) not in (None, ""):
            message[key] = _text(turn[key], key)
    if turn.get("reasoning") not in (None, "") and "reasoning_content" not in message:
        message["reasoning_content"] = _text(turn["reasoning"], "reasoning")
    if calls is not None:
        message["tool_calls"] = calls
    return message


def _text(value: Any, key: str, *, may_lack: bool = False) -> str | None:
    """Return a text, or the text of a list of parts; None if it may lack and does."""
    if isinstance(value, str):
        return value
    if value is None and may_lack:
        return None
    if isinstance(value, list) and value:
        return "".join(_part(part, key) for part in value)
    raise RowError("not_text", f"{key!r} is {shown(value)}, expected a string")


def _part(part: Any, key: str) -> str:
    match part:
        case str(text) | {"type": "text", "text": str(text)}:
            return text
    raise RowError("not_text", f"a part of {key!r} is {shown(part)}, expected text")


def _tool_calls(found: Any) -> list[Any]:
    """Return tool calls in the form of Transformers: each a function with a name and arguments."""
    found = _parsed(found, "tool_calls")
    calls = found if isinstance(found, list) else [found]
    if not calls:
        raise RowError("bad_tool_call", "a turn has an empty list of tool calls")
    return [_tool_call(call) for call in calls]


def _tool_call(call: Any) -> dict[str, Any]:
    match call:
        case {"function": {"name": str()} as function}:
            pass
        case {"name": str()} as function:
            call = {key: call[key] for key in ("id",) if key in call}
        case _:
            raise RowError("bad_tool_call", f"a tool call is {shown(call)}, expected its name")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        arguments = _parsed(arguments, "arguments") if arguments.strip() else {}
    if not isinstance(arguments, dict | None):
        raise RowError("bad_tool_call", f"arguments are {shown(arguments)}, expected an object")
    named = {"name": function["name"], "arguments": arguments or {}}
    return {**call, "type": "function", "function": named}


def _parsed(text: Any, key: str) -> Any:
    """Return the value of JSON in a string, and anything else as it is."""
    if not isinstance(text, str):
        return text
    try:
        return load_json(text)
    except ValueError as error:
        problem = f"{key!r} is {shown(text)}, expected JSON ({error})"
        raise RowError("bad_tool_call", problem) from error


def _is_alpaca(row: Row) -> bool:
    return "instruction" in row and _first(row, _ALPACA_ANSWERS) is not None


def _from_alpaca(row: Row) -> list[Message]:
    answer = _first(row, _ALPACA_ANSWERS)
    if "instruction" not in row or answer is None:
        raise _missing(row, "'instruction' and 'output'")
    asked = [row["instruction"]]
    asked += [row[key] for key in _ALPACA_INPUTS if row.get(key) not in (None, "")]
    question = "\n\n".join(str(_text(each, "instruction or input")) for each in asked)
    pair = _pair(question, row[answer], ("instruction", answer), row)
    return [*_system(row, []), *_history(row.get("history")), *pair]


def _history(history: Any) -> list[Message]:
    messages: list[Message] = []
    if not isinstance(history, list | None):
        raise RowError("wrong_type", f"'history' is {shown(history)}, expected a list")
    for earlier in history or []:
        if not isinstance(earlier, list) or len(earlier) != 2:
            raise RowError(
                "wrong_type", f"'history' has {shown(earlier)}, expected a question and an answer"
            )
        messages += _pair(earlier[0], earlier[1], ("history", "history"), {})
    return messages


def _is_pair(row: Row) -> bool:
    has_both = _first(row, _QUESTIONS) is not None and _first(row, _ANSWERS) is not None
    return has_both or _has_turns("human")(row)


def _from_pair(row: Row) -> list[Message]:
    found = _turn_list(row)
    if found is not None and found[1] == "human":
        turns = _pairs(row[found[0]], found[0])
        return [*_system(row, turns), *turns]
    question, answer = _first(row, _QUESTIONS), _first(row, _ANSWERS)
    if question is None or answer is None:
        raise _missing(row, f"one of {', '.join(_QUESTIONS)} and one of {', '.join(_ANSWERS)}")
    if isinstance(row[question], list) and isinstance(row[answer], list):
        asked = _messages(row[question], question, "role", "content")
        return [*asked, *_messages(row[answer], answer, "role", "content")]
    return [*_system(row, []), *_pair(row[question], row[answer], (question, answer), row)]


def _pairs(pairs: list[Any], column: str) -> list[Message]:
    messages: list[Message] = []
    for pair in pairs:
        if not isinstance(pair, dict) or not {"human", "assistant"} <= {*pair}:
            raise RowError(
                "wrong_type", f"{column!r} has {shown(pair)}, expected 'human' and 'assistant'"
            )
        messages += _pair(pair["human"], pair["assistant"], ("human", "assistant"), pair)
    return messages


def _pair(asked: Any, answered: Any, keys: tuple[str, str], row: Row) -> list[Message]:
    kept = ("reasoning_content", "reasoning", "tool_calls")
    answer = {key: row[key] for key in kept if key in row}
    answer |= {"role": "assistant", keys[1]: answered}
    return [
        {"role": "user", "content": _text(asked, keys[0])},
        _message(answer, "role", keys[1]),
    ]


def _system(row: Row, turns: list[Message]) -> list[Message]:
    """Return the system turn of a column of its own, unless the turns begin with one."""
    column = _first(row, _SYSTEMS)
    has_one = bool(turns) and turns[0]["role"] == "system"
    if column is None or has_one or row[column] in (None, ""):
        return []
    return [{"role": "system", "content": _text(row[column], column)}]


def _first(row: Row, keys: Iterable[str]) -> str | None:
    return next((key for key in keys if key in row), None)


def _missing(row: Row, expected: str) -> RowError:
    return RowError("missing_column", f"the keys are {shown(list(row))}, expected {expected}")


def _role_names() -> str:
    return ", ".join(_ROLES)


SCHEMAS: dict[str, Schema] = {
    "messages": Schema(
        "messages, conversation or chosen: a list of role and content",
        _has_turns("role"),
        _from_turns("role", "content"),
    ),
    "sharegpt": Schema(
        "conversations: a list of from and value", _has_turns("from"), _from_turns("from", "value")
    ),
    "alpaca": Schema("instruction, input and output", _is_alpaca, _from_alpaca),
    "pairs": Schema(
        "prompt and completion, question and answer, human and assistant", _is_pair, _from_pair
    ),
}
"""The schemas by name, in the order in which they are tried."""
