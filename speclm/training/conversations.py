"""Reads conversations to train on from JSON lines."""

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from speclm.errors import DataError, OptionError
from speclm.files.json_lines import JsonLine, read_json_lines

Message = dict[str, Any]
"""One turn: ``role`` and ``content``, and whatever else the chat template reads."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row of the training data.

    Args:
        messages: Turns in order; at least one is the assistant's.
        where: File and line, for messages.
    """

    messages: list[Message]
    where: str


def read_conversations(
    path: str | Path, *, limit: int | None = None, seed: int = 0
) -> list[Conversation]:
    """Read conversations from a file with one JSON object a line.

    Args:
        path: Each object has ``messages``, a list of ``{"role": ..., "content": ...}``.
        limit: Conversations to keep, drawn at random and left in the file's order; None for all.
        seed: Decides which are drawn.

    Raises:
        DataError: If the file cannot be read or is empty, or a line is no conversation with an
            assistant turn.
        OptionError: If `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise OptionError(f"limit is {limit!r}, expected at least 1; pass None to keep all rows")
    lines = read_json_lines(path)
    if not lines:
        raise DataError(f'{path}: no rows, expected one {{"messages": [...]}} a line')
    if limit is not None and limit < len(lines):
        kept = sorted(Random(seed).sample(range(len(lines)), limit))
        lines = [lines[index] for index in kept]
    return [parse_conversation(line) for line in lines]


def parse_conversation(line: JsonLine) -> Conversation:
    """Read one line.

    Raises:
        DataError: If it is no conversation, or has no assistant turn.
    """
    messages = line.parse().get("messages")
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise DataError(
            f'{line.where}: expected "messages", a list of objects with the strings "role" and '
            f'"content", found {line.excerpt}'
        )
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(
            f"{line.where}: no turn has the role 'assistant', so there is nothing to learn; drop "
            "the row or add the answer"
        )
    return Conversation(messages, line.where)


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(key), str) for key in ("role", "content")
    )
