"""Read conversations, render them as tokens and mark those that the assistant wrote."""

import re
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, TypedDict, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from speclm.errors import DataError, OptionError, reason_of, shown
from speclm.files.json_lines import JsonLine, read_json_lines

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")

Message = dict[str, Any]
"""One turn: ``role``, ``content``, and anything else that the chat template reads."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """One line of the training data.

    Args:
        messages: Turns in order; at least one is the assistant's.
        where: File and line, for messages.
        tools: Descriptions of the functions that the assistant may call, for the chat template.
    """

    messages: list[Message]
    where: str
    tools: list[Any] | None = None


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
            have ``tools``, a list of functions. Turns with ``tool_calls`` need no content.
        limit: Conversations to keep, drawn at random and left in the file's order; None for all.
        seed: Decides which are drawn.

    Raises:
        DataError: If the file cannot be read or is empty, or a line is not a conversation
            with an assistant turn.
        OptionError: If `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise OptionError(f"limit is {limit!r}, expected at least 1; pass None to keep all")
    lines = read_json_lines(path)
    if not lines:
        raise DataError(f'{path}: no conversations, expected one {{"messages": [...]}} a line')
    if limit is not None and limit < len(lines):
        kept = sorted(Random(seed).sample(range(len(lines)), limit))
        lines = [lines[index] for index in kept]
    return [parse_conversation(line) for line in lines]


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
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(
            f"{line.where}: no turn has the role 'assistant', so there is nothing to learn; drop "
            "the line or add the answer"
        )
    return Conversation(messages, line.where, tools or None)


def _is_message(value: object) -> bool:
    match value:
        case {"role": str(), "content": str()}:
            return True
        case {"role": "assistant", "tool_calls": [_, *_], **rest}:
            return rest.get("content") is None
    return False


def tokenize_conversation(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None
) -> Example:
    """Render a conversation with the tokenizer's chat template and mark the assistant's tokens.

    The marks come from the ``{% generation %}`` tags of the template. A template without tags
    renders the conversation up to and including each assistant turn; the difference is the turn.

    Args:
        conversation: The conversation.
        tokenizer: A fast tokenizer with a chat template.
        max_length: Tokens to keep from the start; None for all.

    Raises:
        DataError: If no token is marked, or, without tags, if the beginning of the conversation
            does not render to a prefix of the whole.
        OptionError: If the tokenizer is not a fast one or has no chat template.
    """
    _require_usable(tokenizer)
    if _GENERATION_TAG.search(cast("Any", tokenizer).get_chat_template()):
        encoded = _apply(
            conversation, tokenizer, return_dict=True, return_assistant_tokens_mask=True
        )
        tokens, mask = list(encoded["input_ids"]), list(encoded["assistant_masks"])
    else:
        tokens, mask = _compare_renders(conversation, tokenizer)
    if not is_trainable(mask[:max_length]):
        raise DataError(f"{conversation.where}: {_why_untrainable(mask, max_length)}")
    return Example(input_ids=tokens[:max_length], loss_mask=mask[:max_length])


def is_trainable(loss_mask: list[int]) -> bool:
    """Return whether heads have a token to draft, the third of a text at the earliest.

    From a hidden state the target itself predicts the next token, and heads those after it.
    """
    return any(loss_mask[2:])


def _why_untrainable(mask: list[int], max_length: int | None) -> str:
    if is_trainable(mask):
        return (
            f"max_length {max_length} cuts off all assistant tokens, the first is number "
            f"{mask.index(1, 2) + 1} of {len(mask)}; raise max_length or drop the example"
        )
    return (
        f"the loss mask of {len(mask)} tokens is all zero, expected assistant tokens; check that "
        "the answer is not empty and that the chat template puts it between its generation tags"
    )


def _require_usable(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.is_fast:
        raise OptionError(
            f"tokenizer {type(tokenizer).__name__} does not say which characters a token covers; "
            "load the fast one with AutoTokenizer"
        )
    if tokenizer.chat_template is None:
        raise OptionError(
            f"tokenizer {tokenizer.name_or_path!r} has no chat template; set "
            "tokenizer.chat_template to the one that prompts will be rendered with"
        )


def _compare_renders(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Return tokens and loss mask, from renderings up to each assistant turn."""
    text: str = _apply(conversation, tokenizer, tokenize=False)
    is_written = [0] * (len(text) + 1)
    for turn, message in enumerate(conversation.messages):
        if message["role"] == "assistant":
            start, end = _turn_span(conversation, turn, text, tokenizer)
            is_written[start:end] = [1] * (end - start)
    # The rendering contains the special tokens already.
    encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = [int(start < end and is_written[start]) for start, end in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), mask


def _turn_span(
    conversation: Conversation, turn: int, text: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, int]:
    """Return the character span of an assistant turn in the rendering of the whole conversation."""
    if turn == 0:
        raise DataError(
            f"{conversation.where}: the first turn is the assistant's and has no prompt before it; "
            "put a user turn first, or {% generation %} tags into the chat template"
        )
    before: str = _apply(
        conversation, tokenizer, num_turns=turn, tokenize=False, add_generation_prompt=True
    )
    through: str = _apply(conversation, tokenizer, num_turns=turn + 1, tokenize=False)
    for shorter, longer in ((before, through), (through, text)):
        if not longer.startswith(shorter):
            pairs = zip(shorter, longer, strict=False)
            same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(longer))
            raise DataError(
                f"{conversation.where}: the render up to assistant turn {turn} is no prefix of the "
                f"longer render, from {shorter[same : same + 20]!r} at character {same}; put "
                "{% generation %} tags around the assistant's text in the chat template"
            )
    return len(before), len(through)


def _apply(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_turns: int | None = None,
    **options: Any,
) -> Any:
    """Render the first turns of a conversation; None renders all."""
    turns = conversation.messages[:num_turns]
    try:
        return tokenizer.apply_chat_template(turns, tools=conversation.tools, **options)
    except Exception as error:  # a template is a program, and may for example add None to a text
        problem = str(error) if isinstance(error, TemplateError) else reason_of(error)
        raise DataError(
            f"{conversation.where}: the chat template refuses the conversation ({problem}); drop "
            "the example or change its turns"
        ) from error
