"""Reads prompts from files of JSON lines."""

from pathlib import Path
from typing import Any

from speclm.errors import DataError
from speclm.files.json_lines import JsonLine, read_json_lines

Prompt = str | list[dict[str, str]]


def read_prompts(option: str, path: Path) -> list[Prompt]:
    """Read prompts; a conversation loses its final assistant turn.

    Args:
        option: That the file was given with, for messages.
        path: The file.

    Raises:
        DataError: If the file cannot be read, has no prompt, or a line is none.
    """
    lines = read_json_lines(path)
    if not lines:
        raise DataError(f"{option} {str(path)!r} is empty, expected one JSON object a line")
    return [_parse(line) for line in lines]


def _parse(line: JsonLine) -> Prompt:
    match line.parse():
        case {"messages": [*messages]} if all(map(_is_message, messages)):
            is_answered = bool(messages) and messages[-1]["role"] == "assistant"
            if asked := messages[:-1] if is_answered else messages:
                return asked
            raise DataError(
                f"{line.where}: no message that asks for an answer, found {line.excerpt}; drop the "
                "row or add one"
            )
        case {"prompt": str(text)} if text:
            return text
        case {"prompt": ""}:
            raise DataError(f"{line.where}: the prompt is empty; drop the row or fill it in")
    raise DataError(
        f'{line.where}: expected "prompt", a string, or "messages", a list of objects with a '
        f'"role", found {line.excerpt}; correct the row'
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str)
