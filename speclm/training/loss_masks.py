"""Render conversations as tokens, and mark those that the assistant wrote."""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from inspect import signature
from itertools import groupby, pairwise
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from speclm.errors import DataError, OptionError, reason_of
from speclm.training.conversations import Conversation, Example

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")

ALL_ZERO = "no token of the assistant is marked"
CUT_OFF = "max_length cuts off the answer"
NO_PROMPT = "the first turn is the assistant's"
OTHER_PROMPT = "the answer does not begin with the generation prompt"
REFUSED = "the chat template refuses it"


class UnusableTurnError(DataError):
    """An assistant turn, or a whole conversation, that heads cannot learn from.

    Args:
        where: File and line.
        reason: One of the reasons of this module, under which turns are counted.
        details: What was found, expected and can be done.
    """

    def __init__(self, where: str, reason: str, details: str) -> None:
        super().__init__(f"{where}: {details}")
        self.reason = reason


@dataclass(frozen=True, slots=True)
class _Turn:
    """An assistant turn as it was rendered when it was generated.

    Args:
        index: Its index among the messages.
        text: The rendering up to its end.
        start: Where its own text starts, after the prompt.
        rendered: Characters of the template's own rendering, which may lack white space of the
            prompt.
    """

    index: int
    text: str
    start: int
    rendered: int


def tokenize_conversation(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    eos_token_ids: Collection[int] = (),
) -> list[Example]:
    """Render a conversation with the tokenizer's chat template and mark the assistant's tokens.

    The marks come from the ``{% generation %}`` tags of the template. A template without tags
    renders the conversation before each assistant turn, with the generation prompt, and after it;
    the difference is the turn. What follows an end-of-sequence token in a turn is not marked,
    since generation stops there.

    Args:
        conversation: The conversation.
        tokenizer: A fast tokenizer with a chat template.
        max_length: Tokens to keep from the start; None for all.
        eos_token_ids: Tokens at which the base stops besides the tokenizer's own, as
            `speclm.target.loading.eos_token_ids` returns them.

    Returns:
        One example; several where the template renders a turn differently once others follow, as
        templates do that drop the reasoning of earlier turns. Each of these ends with a turn as it
        was when it was generated, and marks only the turns that no other example has.

    Raises:
        UnusableTurnError: If a turn cannot be learned, see `mark_turns`.
        OptionError: If the tokenizer is not a fast one or has no chat template.
    """
    examples, unusable = mark_turns(
        conversation, tokenizer, max_length=max_length, eos_token_ids=eos_token_ids
    )
    if unusable:
        raise unusable[0]
    return examples


def mark_turns(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    eos_token_ids: Collection[int] = (),
) -> tuple[list[Example], list[UnusableTurnError]]:
    """Do as `tokenize_conversation`, and return errors instead of raising the first.

    Returns:
        The examples, and what is wrong with the rest: a turn without a token that is marked or
        left by `max_length`; a turn without a prompt, unless the template has tags; a turn whose
        generation prompt is not in the rendered turn; a conversation that the template refuses.
    """
    _require_usable(tokenizer)
    examples: list[Example] = []
    unusable: list[UnusableTurnError] = []
    renderer = _Renderer(conversation, tokenizer, eos_token_ids)
    turns: list[_Turn] = []
    for index, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        try:
            turns.append(renderer.turn(index))
        except UnusableTurnError as error:
            if error.reason == REFUSED:
                return [], [error]
            unusable.append(error)
    for group in _groups(turns):
        tokens, mask = renderer.encode(group)
        if is_trainable(mask[:max_length]):
            examples.append(Example(input_ids=tokens[:max_length], loss_mask=mask[:max_length]))
        else:
            unusable.append(_why_untrainable(conversation, mask, max_length))
    return examples, unusable


def is_trainable(loss_mask: list[int]) -> bool:
    """Return whether heads have a token to draft, the third of a text at the earliest.

    From a hidden state the target itself predicts the next token, and heads those after it.
    """
    return any(loss_mask[2:])


def marked_excerpts(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return the text of the first and of the last marked tokens of an example, to look at.

    Returns:
        Up to eight tokens from the start of the first marked turn, and as many from the end of the
        last one.
    """
    runs = [
        [token for _, token in run]
        for is_marked, run in groupby(
            zip(example["loss_mask"], example["input_ids"], strict=True), key=lambda pair: pair[0]
        )
        if is_marked
    ]
    decode: Any = tokenizer.decode
    return decode(runs[0][:8]), decode(runs[-1][-8:])


def _groups(turns: list[_Turn]) -> Iterator[list[_Turn]]:
    """Yield runs of turns of which each rendering begins with the one before."""
    group: list[_Turn] = []
    for turn in turns:
        if group and not turn.text.startswith(group[-1].text):
            yield group
            group = []
        group.append(turn)
    if group:
        yield group


def _why_untrainable(
    conversation: Conversation, mask: list[int], max_length: int | None
) -> UnusableTurnError:
    if is_trainable(mask):
        return UnusableTurnError(
            conversation.where,
            CUT_OFF,
            f"max_length {max_length} cuts off all assistant tokens, the first is number "
            f"{mask.index(1, 2) + 1} of {len(mask)}; raise max_length or drop the example",
        )
    return UnusableTurnError(
        conversation.where,
        ALL_ZERO,
        f"the loss mask of {len(mask)} tokens is all zero, expected assistant tokens; check that "
        "the answer is not empty and that the chat template puts it between its generation tags",
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


class _Renderer:
    """Renders the beginnings of one conversation."""

    def __init__(
        self,
        conversation: Conversation,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: Collection[int],
    ) -> None:
        self._conversation, self._tokenizer = conversation, tokenizer
        self._ends: Collection[Any] = {*eos_token_ids, tokenizer.eos_token_id}
        template = cast("Any", tokenizer).get_chat_template(tools=conversation.tools)
        self._is_tagged = bool(_GENERATION_TAG.search(template))

    def turn(self, index: int) -> _Turn:
        """Return an assistant turn with everything before it, as when it was generated."""
        through: str = self._apply(index + 1, tokenize=False)
        if index == 0:
            if self._is_tagged:
                return _Turn(index, through, 0, len(through))
            raise self._unusable(
                NO_PROMPT,
                "the first turn is the assistant's and has no prompt before it; put a user turn "
                "first, or {% generation %} tags into the chat template",
            )
        before: str = self._apply(index, tokenize=False, add_generation_prompt=True)
        if through.startswith(before):
            return _Turn(index, through, len(before), len(through))
        # A template that trims white space where a turn follows: generation saw it.
        trimmed = before.rstrip()
        if through.startswith(trimmed):
            answer = through[len(trimmed) :].lstrip()
            return _Turn(index, before + answer, len(before), len(through))
        pairs = enumerate(zip(before, through, strict=False))
        same = next(
            (i for i, (one, other) in pairs if one != other), min(len(before), len(through))
        )
        raise self._unusable(
            OTHER_PROMPT,
            f"assistant turn {index} is generated after {before[same : same + 30]!r}, and its "
            f"rendering has {through[same : same + 30]!r} there, at character {same}; give the "
            "turn the reasoning that its generation prompt begins, or use a chat template that "
            "renders both in the same way",
        )

    def encode(self, group: list[_Turn]) -> tuple[list[int], list[int]]:
        """Return tokens and loss mask of the last turn of a group; the mask has all its turns."""
        last = group[-1]
        tokens, spans = self._tokenize(last.text, [turn.start for turn in group])
        counts = self._tagged(last) if self._is_tagged else [1] * len(last.text)
        is_written = [0] * len(last.text)
        for turn in group:
            part = slice(turn.start, len(turn.text))
            is_written[part] = counts[part]
        mask = [
            int(start < end and (is_written[start] or is_written[end - 1])) for start, end in spans
        ]
        return tokens, _until_end(tokens, mask, ends=self._ends)

    def _tagged(self, turn: _Turn) -> list[int]:
        """Return for each character of a rendering whether it lies between generation tags."""
        encoded = self._apply(
            turn.index + 1,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        marks = [0] * turn.rendered
        pairs = zip(encoded["assistant_masks"], encoded["offset_mapping"], strict=True)
        for start, end in (span for is_marked, span in pairs if is_marked):
            marks[start:end] = [1] * (end - start)
        own = turn.rendered - (len(turn.text) - turn.start)  # where the answer starts in it
        prompt = [*marks[:own], *[0] * turn.start][: turn.start]
        return prompt + marks[own:]

    def _tokenize(self, text: str, starts: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """Return tokens of a rendering and their spans, split where answers start if that works.

        A prompt is tokenized without its answer. Where one token covers the end of a prompt and the
        start of the answer, as a space and a word, generation sees other tokens.
        """
        tokens, spans = self._encode(text)
        crossed = [at for at in starts if any(start < at < end for start, end in spans)]
        if not crossed:
            return tokens, spans
        split_tokens: list[int] = []
        split_spans: list[tuple[int, int]] = []
        for first, last in pairwise([0, *crossed, len(text)]):
            part, inside = self._encode(text[first:last])
            split_tokens += part
            split_spans += [(first + start, first + end) for start, end in inside]
        # Some tokenizers put a space before whatever they are given; the word then counts whole.
        decode: Any = self._tokenizer.decode
        if decode(split_tokens) != decode(tokens):
            return tokens, spans
        return split_tokens, split_spans

    def _encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encode: Any = self._tokenizer
        # The rendering contains the special tokens already.
        found = encode(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(found["input_ids"]), list(found["offset_mapping"])

    def _apply(self, num_turns: int, **options: Any) -> Any:
        """Render the first turns."""
        messages = self._conversation.messages[:num_turns]
        tools: Any = self._conversation.tools
        wanted = self._conversation.template_options or {}
        apply = self._tokenizer.apply_chat_template
        if taken := sorted(wanted.keys() & signature(apply).parameters.keys()):
            raise self._unusable(
                REFUSED,
                f"chat_template_kwargs has {taken[0]!r}, which apply_chat_template takes itself; "
                "drop it",
            )
        try:
            return apply(messages, tools=tools, **options, **wanted)
        except (
            Exception
        ) as error:  # a template is a program, and may for example add None to a text
            problem = str(error) if isinstance(error, TemplateError) else reason_of(error)
            raise self._unusable(
                REFUSED,
                f"the chat template refuses the conversation ({problem}); drop the example or "
                "change its turns",
            ) from error

    def _unusable(self, reason: str, details: str) -> UnusableTurnError:
        return UnusableTurnError(self._conversation.where, reason, details)


def _until_end(tokens: list[int], mask: list[int], *, ends: Collection[Any]) -> list[int]:
    """Return a mask without what follows an end-of-sequence token in each turn."""
    kept, is_open = [], True
    for token, is_marked in zip(tokens, mask, strict=True):
        kept.append(int(is_marked and is_open))
        is_open = not is_marked or (is_open and token not in ends)
    return kept
