"""`Chat`: a conversation in turns, each of which reads only the new tokens."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Event
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from typing_extensions import override

from speclm.cache import CACHE_NAME
from speclm.cache.kept import KeptCache
from speclm.chat.text_stream import Piece, RoundStreamer
from speclm.config import require_unicode
from speclm.errors import OptionError, PromptError
from speclm.files.atomic import append_line
from speclm.generation.settings import resolve_setting
from speclm.model.spec_model import SpecModel
from speclm.self_check.verdict import Verification
from speclm.stats import SpeculationStats

Message = dict[str, str]
MAX_NEW_TOKENS = 512
_OWN_OPTIONS = ("acceptance", "tree", "engine", "busy")  # that base.generate does not know


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer of one turn.

    Args:
        text: Text without special tokens and without an incomplete last character.
        tokens: New tokens, including the one that ends the answer.
        num_prompt_tokens: Tokens of the whole conversation before the answer.
        num_reused_tokens: How many of these the cache already held.
        finish: "end" when the model ended it, "length" at the bound, "stopped" by `stop`.
        seconds: Wall time, including the prompt.
        speculation: Counters.
        num_marked_rounds: Rounds whose draft tokens are known.
    """

    text: str
    tokens: list[int]
    num_prompt_tokens: int
    num_reused_tokens: int
    finish: Literal["end", "length", "stopped"]
    seconds: float
    speculation: SpeculationStats
    num_marked_rounds: int


@dataclass(frozen=True, slots=True)
class _Turn:
    """A question with its answer, and what the answer was generated with."""

    question: str
    answer: Answer
    prompt: list[int]
    options: dict[str, Any]


class Chat:
    """A conversation with a model; the cache is kept between turns.

    If the chat template renders earlier turns differently than before, the cache is kept up to the
    first difference. An error during an answer leaves the turns as they were before the question.

    Example:
        ```python
        chat = Chat(model, tokenizer, options={"max_new_tokens": 64})
        answer = chat.ask("How many singers are there?", on_piece=lambda p: print(p.text, end=""))
        ```
    """

    def __init__(
        self,
        spec: SpecModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin a conversation.

        Args:
            spec: The model.
            tokenizer: The base's, with a chat template.
            system: Text of the system message; None for no system message.
            options: Arguments of ``generate``; ``max_new_tokens`` defaults to `MAX_NEW_TOKENS`.

        Raises:
            OptionError: If the tokenizer has no chat template.
        """
        if not tokenizer.chat_template:
            raise OptionError(
                "the tokenizer has no chat template; take a model that was tuned to chat, or set "
                "tokenizer.chat_template"
            )
        self.spec = spec
        self.system = system
        self._tokenizer = tokenizer
        self._options = {"max_new_tokens": MAX_NEW_TOKENS, **(options or {})}
        self._turns: list[_Turn] = []
        self._kept = KeptCache()
        self._stopping = Event()
        self._can_mark = True

    @property
    def messages(self) -> list[Message]:
        """All messages, as chat templates take them."""
        found = [] if self.system is None else [_message("system", self.system)]
        for turn in self._turns:
            found += [_message("user", turn.question), _message("assistant", turn.answer.text)]
        return found

    @property
    def answers(self) -> list[Answer]:
        """The answers so far."""
        return [turn.answer for turn in self._turns]

    @property
    def speculation(self) -> SpeculationStats:
        """Counters of all answers together."""
        return SpeculationStats.merge(answer.speculation for answer in self.answers)

    def ask(
        self,
        text: str,
        *,
        on_piece: Callable[[Piece], object] = lambda _: None,
        marks_drafted: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> Answer:
        """Answer a question.

        Args:
            text: The user's message.
            on_piece: Receives the text while it is generated.
            marks_drafted: Whether to mark drafted pieces; text then comes one round at a time.
            options: Arguments of ``generate`` for this answer, which override those of the
                conversation.

        Raises:
            OptionError: If a message is not Unicode text.
            PromptError: If the conversation is too long for the model, or the chat template
                refuses it.
        """
        prompt = self._render([*self.messages, _message("user", text)])
        merged = {**self._options, **(options or {})}
        merged["max_new_tokens"] = self._bound_new_tokens(len(prompt), merged["max_new_tokens"])
        cache = self._kept.take(prompt)
        answer, output = self._generate(
            self.spec.generate,
            prompt,
            cache,
            merged,
            on_piece,
            lambda: marks_drafted and self._can_mark and not self._is_plain(),
        )
        speculation = self.spec.last_speculation
        assert speculation is not None, "a call has just ended"
        answer = replace(answer, speculation=speculation)
        cache = output.get(CACHE_NAME)
        if cache is not None and self._can_read_on(cache):
            self._kept.keep(cache, output.sequences[0].tolist())
        if marks_drafted and not self._is_plain():
            self._can_mark = answer.num_marked_rounds > 0
        self._turns.append(_Turn(text, answer, prompt, merged))
        return answer

    def answer_regularly(self, *, on_piece: Callable[[Piece], object] = lambda _: None) -> Answer:
        """Answer the last question again with ``base.generate``, for a comparison.

        The conversation stays as it is. As many tokens of the prompt are read as for the answer,
        where the cache can be cropped; `Answer.num_reused_tokens` says so. Give the random
        generator the same seed as before the answer.

        Raises:
            OptionError: If there is no answer yet.
        """
        if not self._turns:
            raise OptionError("there is no answer to compare with; ask something first")
        turn = self._turns[-1]
        options = {name: turn.options[name] for name in turn.options if name not in _OWN_OPTIONS}
        cache = self._kept.copy(turn.answer.num_reused_tokens)
        base: Any = self.spec.base
        generate = partial(type(base).generate, base)  # the base itself may be patched
        answer, _ = self._generate(generate, turn.prompt, cache, options, on_piece, lambda: False)
        return answer

    def stop(self) -> None:
        """End the answer that is being generated; for signal handlers and other threads.

        What has been generated stays in the conversation.
        """
        self._stopping.set()

    def undo(self) -> bool:
        """Drop the last question and its answer; return whether there was one."""
        if self._turns:
            self._turns.pop()
            return True
        return False

    def reset(self) -> None:
        """Drop all turns; the system message stays."""
        self._turns.clear()

    def save(self, path: str | Path) -> None:
        """Append the conversation to a file of JSON lines, as one row with ``messages``.

        The write is atomic: after an error the file is as before.

        Raises:
            OptionError: If there is no turn yet, or the file cannot be written.
        """
        if not self._turns:
            raise OptionError("there is no turn to save yet; ask something first")
        row = json.dumps({"messages": self.messages}, ensure_ascii=False)
        try:
            append_line(Path(path), row)
        except (OSError, ValueError) as error:  # ValueError: a null byte in the name
            raise OptionError(
                f"{str(path)!r} cannot be written ({error}); name a file in a folder that exists"
            ) from error

    def _render(self, messages: list[Message]) -> list[int]:
        from jinja2 import TemplateError

        for message in messages:
            require_unicode(f"a message of the {message['role']}", message["content"])
        try:
            text: Any = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=True, tokenize=False
            )
        except TemplateError as error:
            raise PromptError(
                f"the chat template refuses a conversation of {_roles(messages)} ({error}); some "
                "know no system message: drop it"
            ) from error
        # The template writes the special tokens itself.
        encoded = self._tokenizer(text, add_special_tokens=False, verbose=False)
        return list(encoded["input_ids"])

    def _bound_new_tokens(self, num_prompt_tokens: int, wanted: int) -> int:
        """Return the maximum length of an answer, and check that there is room for one."""
        text_config = self.spec.config.get_text_config()
        positions = getattr(text_config, "max_position_embeddings", None)
        if positions is None:
            return wanted
        if num_prompt_tokens >= positions:
            raise PromptError(
                f"the conversation has {num_prompt_tokens} tokens, and the model has "
                f"{positions} positions; begin anew with /reset, or drop turns with /undo (in "
                "Python: reset() and undo(), on the web page: New conversation)"
            )
        return min(wanted, int(positions) - num_prompt_tokens)

    def _end_tokens(self, options: Mapping[str, Any]) -> frozenset[int]:
        found = resolve_setting("eos_token_id", options, self.spec.generation_config)
        if found is None:
            return frozenset()
        return frozenset(
            torch.as_tensor(found, dtype=torch.long, device="cpu").reshape(-1).tolist()
        )

    def _is_plain(self) -> bool:
        speculation = self.spec.last_speculation
        return speculation is None or bool(speculation.fallbacks)

    def _generate(
        self,
        generate: Callable[..., Any],
        prompt: list[int],
        cache: Cache | None,
        options: Mapping[str, Any],
        on_piece: Callable[[Piece], object],
        marks_drafted: Callable[[], bool],
    ) -> tuple[Answer, Any]:
        """Return the answer, without counters, and the output of a function like ``generate``."""
        ends = self._end_tokens(options)
        pieces: list[str] = []

        def show(piece: Piece) -> None:
            pieces.append(piece.text)
            on_piece(piece)

        streamer = RoundStreamer(self._tokenizer, show, marks_drafted=marks_drafted, skipped=ends)
        self._stopping.clear()
        num_reused = 0 if cache is None else int(cache.get_seq_length())
        input_ids = torch.tensor([prompt], device=self.spec.device, dtype=torch.long)
        arguments = {
            **options,
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "streamer": streamer,
            "stopping_criteria": StoppingCriteriaList([_Requested(self._stopping)]),
            "return_dict_in_generate": True,
        }
        if cache is not None:
            arguments[CACHE_NAME] = cache
        start = perf_counter()
        output = generate(**arguments)
        seconds = perf_counter() - start
        tokens: list[int] = output.sequences[0, len(prompt) :].tolist()
        answer = Answer(
            text="".join(pieces),
            tokens=tokens,
            num_prompt_tokens=len(prompt),
            num_reused_tokens=num_reused,
            finish=self._finish(tokens, ends, options["max_new_tokens"]),
            seconds=seconds,
            speculation=SpeculationStats(),
            num_marked_rounds=streamer.num_rounds,
        )
        return answer, output

    def _can_read_on(self, cache: Cache) -> bool:
        """Return whether a later prompt may continue from a cache."""
        if cache.is_croppable:
            return True
        # Recurrent states cannot be cropped. A prompt may continue from them if the self-check
        # found that the model reads several tokens at once correctly. Attention layers have to
        # count the tokens.
        has_slots = any(isinstance(layer, CacheLayerMixin) for layer in cache.layers)
        return has_slots and self.spec.self_check.verification is Verification.CHAINS

    def _finish(
        self, tokens: list[int], ends: frozenset[int], max_new_tokens: int
    ) -> Literal["end", "length", "stopped"]:
        if tokens and tokens[-1] in ends:
            return "end"
        if self._stopping.is_set():
            return "stopped"
        return "length" if len(tokens) >= max_new_tokens else "end"


class _Requested(StoppingCriteria):
    """Ends an answer once the event is set."""

    def __init__(self, stopping: Event) -> None:
        self._stopping = stopping

    @override
    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        is_set = self._stopping.is_set()
        return torch.full((input_ids.shape[0],), is_set, device=input_ids.device, dtype=torch.bool)


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _roles(messages: list[Message]) -> str:
    return ", ".join(dict.fromkeys(message["role"] for message in messages))
