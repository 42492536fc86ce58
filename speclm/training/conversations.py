"""Read conversations from files of JSON lines."""

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, TypedDict

from speclm.errors import DataError, OptionError, shown
from speclm.files.json_lines import JsonLine, read_json_lines

Message = dict[str, Any]
"""One turn: ``role``, ``content``, and anything else that the chat template reads."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """One line of the training data.

    Args:
        messages: Turns in order; at least one is the assistant's.
        where: File and line, for messages.
        tools: Descriptions of the functions that the assistant may call, for the chat template.
        template_options: Further values for the chat template, such as ``enable_thinking``; None
            for none.
    """

    messages: list[Message]
    where: str
    tools: list[Any] | None = None
    template_options: dict[str, Any] | None = None


class Example(TypedDict):
    """A conversation as tokens, and a mask of equal length: 1 where the assistant wrote."""

    input_ids: list[int]
    loss_mask: list[int]


def read_conversations(
    path: str | Path, *, limit: int | None = None, seed: int = 0
) -> list[Conversation]:
    """Read conversations from a file with one JSON object per line.

    Args:
        path: Each object has ``messages``, a list of ``{"role": ..., "content": ...}``, and may
            have ``tools``, a list of functions, and ``chat_template_kwargs``, an object. Turns with
            ``tool_calls`` or ``reasoning_content`` need no content.
        limit: Conversations to keep, drawn at random and left in the file's order; None for all.
        seed: Decides which are drawn.

    Raises:
        DataError: If the file cannot be read or is empty, or a line is not a conversation
            with an assistant turn.
        OptionError: If `limit` is below 1.
    """
    return [parse_conversation(line) for line in draw_lines(path, limit=limit, seed=seed)]


def draw_lines(path: str | Path, *, limit: int | None, seed: int) -> list[JsonLine]:
    """Return lines of a file, as `read_conversations` draws them."""
    if limit is not None and limit < 1:
        raise OptionError(f"limit is {limit!r}, expected at least 1; pass None to keep all")
    lines = read_json_lines(path)
    if not lines:
        raise DataError(f'{path}: no conversations, expected one {{"messages": [...]}} a line')
    if limit is not None and limit < len(lines):
        kept = sorted(Random(seed).sample(range(len(lines)), limit))
        lines = [lines[index] for index in kept]
    return lines


def parse_conversation(line: JsonLine) -> Conversation:
    """Parse one line of a data file.

    Raises:
        DataError: If it is not a conversation, or has no assistant turn.
    """
    parsed = line.parse()
    messages, tools = parsed.get("messages"), parsed.get("tools")
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise DataError(
            f'{line.where}: expected "messages", a list of objects with the strings "role" and '
            f'"content", of which turns with "tool_calls" need only "role", found {line.excerpt}; '
            "correct the line, or convert the file with speclm data convert"
        )
    if not isinstance(tools, list | None):
        raise DataError(
            f'{line.where}: expected "tools", a list of functions, found {shown(tools)}; correct '
            "or drop them"
        )
    options = parsed.get("chat_template_kwargs")
    if not isinstance(options, dict | None):
        raise DataError(
            f'{line.where}: expected "chat_template_kwargs", an object, found {shown(options)}; '
            "correct or drop it"
        )
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(
            f"{line.where}: no turn has the role 'assistant', so there is nothing to learn; drop "
            "the line or add the answer"
        )
    return Conversation(messages, line.where, tools or None, options or None)


def _is_message(value: object) -> bool:
    match value:
        case {"role": str(), "content": str()}:
            return True
        case {"role": "assistant", "tool_calls": [_, *_], **rest}:
            return rest.get("content") is None
        case {"role": "assistant", "reasoning_content": str(), **rest}:
            return rest.get("content") is None
    return False
