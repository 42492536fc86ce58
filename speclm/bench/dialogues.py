"""Questions of several turns, answered turn by turn with the cache kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from speclm.bench.decoders import Answer, Call, Decoder, Outcome, encode_prompt
from speclm.cache import CACHE_NAME
from speclm.cache.kept import KeptCache
from speclm.files.questions import Prompt, Question
from speclm.target.loading import eos_token_ids


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A question, asked turn by turn.

    Every turn continues what was answered before, with the cache of that answer, up to where the
    chat template renders it differently. Where a cache cannot be cropped, or the method cannot go
    on with it, the whole conversation is read again. Where the model has no positions left for an
    answer, the question ends.

    Args:
        question: The question.
        model: Gives device, positions and end-of-sequence tokens.
        tokenizer: The model's tokenizer.
        options: Arguments of ``generate``.
        seed: Seed of every turn.
    """

    question: Question
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    options: Mapping[str, Any]
    seed: int = 0

    @property
    def num_rows(self) -> int:
        """Rows of a batch: one."""
        return 1

    def answered_by(self, decoder: Decoder) -> list[Answer]:
        """Return the answers of a method, one for each turn that there is room for.

        Raises:
            OptionError: If a text is not valid Unicode, or there is no chat template.
            PromptError: If a prompt has no tokens, or the chat template refuses the conversation.
        """
        kept, found = KeptCache(), list[Answer]()
        conversation: Prompt = []
        for turn in range(len(self.question.turns)):
            conversation = self._extended(conversation, turn)
            prompt = encode_prompt(self.question.name, conversation, self.tokenizer)
            room = room_after(len(prompt), self.model)
            if room is not None and room < 1:
                break
            call = self._call(prompt, room)
            outcome = self._run(decoder, call, prompt, kept)
            found.append(Answer(call, outcome, self.question, turn))
            if not isinstance(conversation, str):
                text = decode(outcome.tokens[0], self.tokenizer)
                conversation = [*conversation, {"role": "assistant", "content": text}]
        return found

    def _extended(self, conversation: Prompt, turn: int) -> Prompt:
        if turn == 0:
            return self.question.first_prompt(has_template=bool(self.tokenizer.chat_template))
        return [*conversation, *self.question.turns[turn]]

    def _call(self, prompt: list[int], room: int | None) -> Call:
        options = dict(self.options)
        if room is not None and options.get("max_new_tokens", room) > room:
            options["max_new_tokens"] = room
        input_ids = torch.tensor([prompt], dtype=torch.long, device=self.model.device)
        mask = torch.ones_like(input_ids)
        return Call(input_ids, mask, options, self.seed, eos_token_ids(self.model))

    def _run(self, decoder: Decoder, call: Call, prompt: list[int], kept: KeptCache) -> Outcome:
        if len(self.question.turns) == 1 or not decoder.keeps_cache:
            return decoder.run(call)
        extra: dict[str, Any] = {"return_dict_in_generate": True}
        cache = kept.take(prompt)
        if cache is not None:
            extra[CACHE_NAME] = cache
        asked = replace(call, options={**call.options, **extra})
        outcome, cache = decoder.run_with_cache(asked)
        if cache is not None and cache.is_croppable:
            kept.keep(cache, [*prompt, *outcome.tokens[0]])
        return outcome


def make_dialogues(
    questions: Sequence[Question],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    options: Mapping[str, Any],
    seed: int = 0,
) -> list[Dialogue]:
    """Return questions as tasks; arguments as of `make_calls`.

    The seed of the first question is incremented by one for each further question.
    """
    return [
        Dialogue(question, model, tokenizer, options, seed + index)
        for index, question in enumerate(questions)
    ]


def without_room(
    questions: Sequence[Question], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[int, int]:
    """Return the questions whose first prompt leaves no position for an answer.

    Returns:
        The tokens of the prompt by the index of the question.

    Raises:
        OptionError: If a text is not valid Unicode, or there is no chat template.
        PromptError: If a prompt has no tokens, or the chat template refuses it.
    """
    has_template = bool(tokenizer.chat_template)
    found = {}
    for index, question in enumerate(questions):
        first = question.first_prompt(has_template=has_template)
        length = len(encode_prompt(question.name, first, tokenizer))
        room = room_after(length, model)
        if room is not None and room < 1:
            found[index] = length
    return found


def room_after(num_tokens: int, model: PreTrainedModel) -> int | None:
    """Return the positions that a prompt leaves for its answer; None if there is no bound."""
    positions = num_positions(model)
    return None if positions is None else positions - num_tokens


def num_positions(model: PreTrainedModel) -> int | None:
    """Return the number of positions of a model, as its config says; None if it has no bound."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if found is None else int(found)


def decode(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of an answer, without special tokens."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))
