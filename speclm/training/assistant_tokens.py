"""Turns a conversation into tokens and says which of them the assistant wrote."""

import re
from dataclasses import dataclass
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from speclm.errors import DataError, OptionError
from speclm.training.conversations import Conversation, Message

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """A conversation as tokens.

    Args:
        tokens: The rendered conversation.
        loss_mask: 1 at tokens that the assistant wrote, 0 elsewhere.
    """

    tokens: list[int]
    loss_mask: list[int]


def tokenize_conversation(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None
) -> TokenizedRow:
    """Render a conversation with the tokenizer's chat template and mark what the assistant wrote.

    The marks come from the template's ``{% generation %}`` tags. Without tags the conversation is
    rendered up to each assistant turn and through it, and the difference is the turn.

    Args:
        conversation: The row.
        tokenizer: A fast tokenizer with a chat template.
        max_length: Tokens to keep from the start; None for all.

    Raises:
        DataError: If nothing is marked, or without tags the render of a part of the conversation
            is no prefix of the render of the whole.
        OptionError: If the tokenizer is not a fast one or has no chat template.
    """
    template = _chat_template(tokenizer)
    if _GENERATION_TAG.search(template):
        row = _from_tags(conversation, tokenizer)
    else:
        row = _from_renders(conversation, tokenizer)
    kept = TokenizedRow(row.tokens[:max_length], row.loss_mask[:max_length])
    # Heads guess the second token after a hidden state and later ones, so two come before it.
    if not any(kept.loss_mask[2:]):
        raise DataError(_nothing_marked(conversation, row, max_length))
    return kept


def _nothing_marked(conversation: Conversation, row: TokenizedRow, max_length: int | None) -> str:
    if any(row.loss_mask[2:]):
        first = row.loss_mask.index(1, 2)
        return (
            f"{conversation.where}: max_length {max_length} cuts off all assistant tokens, the "
            f"first is number {first + 1} of {len(row.tokens)}; raise max_length or drop the row"
        )
    return (
        f"{conversation.where}: the loss mask of {len(row.tokens)} tokens is all zero, expected "
        "assistant tokens; check that the answer is not empty and that the chat template puts it "
        "between its generation tags"
    )


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
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
    return cast("str", cast("Any", tokenizer).get_chat_template())


def _from_tags(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> TokenizedRow:
    encoded: Any = _apply(
        conversation,
        tokenizer,
        conversation.messages,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return TokenizedRow(list(encoded["input_ids"]), list(encoded["assistant_masks"]))


def _from_renders(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> TokenizedRow:
    text: str = _apply(conversation, tokenizer, conversation.messages, tokenize=False)
    spans = [
        _turn_span(conversation, turn, text, tokenizer)
        for turn, message in enumerate(conversation.messages)
        if message["role"] == "assistant"
    ]
    # Special tokens are in the render already.
    encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    is_written = [0] * (len(text) + 1)
    for start, end in spans:
        is_written[start:end] = [1] * (end - start)
    mask = [int(start < end and is_written[start]) for start, end in encoded["offset_mapping"]]
    return TokenizedRow(list(encoded["input_ids"]), mask)


def _turn_span(
    conversation: Conversation, turn: int, text: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, int]:
    """Return the characters of an assistant turn in the render of the whole conversation."""
    messages = conversation.messages
    if turn == 0:
        raise DataError(
            f"{conversation.where}: the first turn is the assistant's, so that no prompt comes "
            "before it; put a user turn first, or {% generation %} tags into the chat template"
        )
    before: str = _apply(
        conversation, tokenizer, messages[:turn], tokenize=False, add_generation_prompt=True
    )
    through: str = _apply(conversation, tokenizer, messages[: turn + 1], tokenize=False)
    for shorter, longer in ((before, through), (through, text)):
        if not longer.startswith(shorter):
            pairs = zip(shorter, longer, strict=False)
            same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(longer))
            raise DataError(
                f"{conversation.where}: the render up to assistant turn {turn} is no prefix of the "
                f"render that goes on, from {shorter[same : same + 20]!r} at character {same}; put "
                "{% generation %} tags around the assistant's text in the chat template"
            )
    return len(before), len(through)


def _apply(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    **options: Any,
) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except TemplateError as error:
        raise DataError(
            f"{conversation.where}: the chat template refuses the conversation ({error}); drop the "
            "row or change its turns"
        ) from error
