"""Conversations whose answers are generated anew, turn by turn, and what is asked for them."""

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from speclm.config import require_count, require_in_range, require_size, require_unicode
from speclm.errors import DataError, shown
from speclm.files.json_lines import JsonLine

Message = dict[str, Any]
"""One turn: ``role``, ``content``, and anything else that the row has."""

_MAX_INT = 2**31 - 1
_INSTRUCTING = frozenset({"system", "developer"})
_REMEDY = "correct the row, or let speclm data convert do it"


class Drop(StrEnum):
    """Why a row is dropped."""

    EMPTY = "empty answer"
    CUT = "answer cut at its maximum length"
    FILTERED = "answer withheld by the server's filter"
    CALLED = "tool call where there was an answer"
    NO_QUESTION = "nothing to answer"
    TOO_LONG = "longer than the model reads"
    REFUSED = "refused by the chat template or the server"


@dataclass(frozen=True, slots=True)
class DistillSettings:
    """How answers are generated; `deciding` returns what decides the rows.

    Args:
        system: Text of a system message for conversations without one; None adds none.
        max_new_tokens: Maximum tokens of an answer.
        temperature: 0 decodes greedily.
        top_p: Top-p of sampling.
        top_k: Top-k of sampling; 0 for no limit.
        seed: Seed of sampling. That of a call derives from it, the rows' ids and the turn.
        batch_size: Conversations that the model answers together.
        keep_cut: Whether to keep a conversation whose answer reached `max_new_tokens`; it ends
            with that answer. By default it is dropped, as heads would learn to end there.
    """

    system: str | None = None
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    batch_size: int = 8
    keep_cut: bool = False

    def __post_init__(self) -> None:
        require_count("max_new_tokens", self.max_new_tokens, low=1, high=_MAX_INT)
        require_in_range("temperature", self.temperature, low=0.0, high=math.inf)
        require_in_range("top_p", self.top_p, low=0.0, high=1.0)
        require_count("top_k", self.top_k, low=0, high=_MAX_INT)
        require_count("seed", self.seed, low=0, high=_MAX_INT)
        require_size("batch_size", self.batch_size)
        if self.system is not None:
            require_unicode("system", self.system)

    @property
    def is_sampled(self) -> bool:
        """Whether answers are sampled."""
        return self.temperature > 0.0

    def deciding(self, *, together: bool, num_shards: int) -> dict[str, Any]:
        """Return the settings that decide which rows are written where, ready for JSON.

        Greedy answers depend on no option of sampling, and on the batch only by rounding. Sampled
        ones depend on the batch if a model draws for all of its rows. Shards are made of batches.

        Args:
            together: Whether a model answers all rows of a batch in one call.
            num_shards: Number of shards.
        """
        unused = [] if self.is_sampled else ["top_p", "top_k", "seed"]
        if num_shards == 1 and not (together and self.is_sampled):
            unused.append("batch_size")
        return {name: value for name, value in asdict(self).items() if name not in unused}

    def seed_of(self, turn: int, ids: Iterable[str]) -> int:
        """Return the seed of a call: 31 bits, equal for equal rows on every machine.

        Args:
            turn: Number of answers that the conversations have had.
            ids: Ids of the rows that the call answers, in order.
        """
        key = json.dumps([self.seed, turn, *ids])
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") & _MAX_INT


@dataclass(frozen=True, slots=True)
class NumberedRow:
    """A conversation of the data.

    Args:
        position: Number of rows before it.
        id: Its own id, or one that is derived from its content and position.
        content: The object in the file, with ``messages``.
        where: File and line, for messages.
    """

    position: int
    id: str
    content: dict[str, Any]
    where: str


def parse_row(line: JsonLine, position: int) -> NumberedRow:
    """Parse a line of the data.

    Raises:
        DataError: If it is not a conversation with text as content, its id is neither a text nor a
            whole number, or what its chat template reads has another type.
    """
    content = line.parse()
    messages = content.get("messages")
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise DataError(
            f'{line.where}: expected "messages", a list of objects with the strings "role" and '
            f'"content" (turns with "tool_calls" or "reasoning_content" may lack content), found '
            f"{line.excerpt}; {_REMEDY}"
        )
    for key, kind, words in (
        ("tools", list, "a list of functions"),
        ("chat_template_kwargs", dict, "an object"),
    ):
        if not isinstance(content.get(key), kind | None):
            raise DataError(
                f'{line.where}: expected "{key}" to be {words}, found {shown(content[key])}; '
                "correct or drop it"
            )
    given = content.get("id")
    if given is not None and (isinstance(given, bool) or not isinstance(given, str | int)):
        raise DataError(
            f'{line.where}: expected "id" to be a string or a whole number, found {given!r}; drop '
            "it, and one is derived from the content"
        )
    name = _derive_id(messages, position) if given is None else str(given)
    return NumberedRow(position, name, content, line.where)


def _is_message(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    text, calls = value.get("content"), value.get("tool_calls")
    has_more = (isinstance(calls, list) and bool(calls)) or value.get("reasoning_content")
    return isinstance(text, str) or (text is None and bool(has_more))


def _derive_id(messages: list[Message], position: int) -> str:
    canonical = json.dumps([position, messages], sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Answer:
    """What was generated for one turn.

    Args:
        text: The answer, without special tokens.
        num_tokens: Its tokens, 0 if a server does not count them.
        is_cut: Whether it reached the maximum length.
        reasoning: Reasoning that a server returns apart from the answer.
    """

    text: str
    num_tokens: int
    is_cut: bool = False
    reasoning: str | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """A row that needs no more work.

    Args:
        position: That of the row in the data.
        row: What is written; None if the row is dropped.
        num_tokens: Tokens generated for it.
        dropped: Why it is dropped; None if it is not.
        detail: What a chat template or a server said about it.
    """

    position: int
    row: dict[str, Any] | None
    num_tokens: int
    dropped: str | None = None
    detail: str = ""


class Dialogue:
    """A row while its answers are generated, the first one first.

    An assistant turn is generated anew, given the turns before it as they are now, unless it has
    tool calls, whose results follow, or nothing was asked before it. A conversation that ends with
    a question, or with a tool's result, is answered. All other turns are kept.
    """

    def __init__(self, row: NumberedRow, settings: DistillSettings) -> None:
        """Begin with the first question."""
        self.row, self._settings = row, settings
        self.num_answers = self._num_tokens = 0
        self._dropped: Drop | None = None
        self._detail = ""
        self._is_cut = False
        self._written: list[Message] = []
        self._rest: deque[Message] = deque(row.content["messages"])
        if settings.system is not None and self._rest[0]["role"] not in _INSTRUCTING:
            self._rest.appendleft({"role": "system", "content": settings.system})
        self._is_open = self._advance()
        if not self._is_open:
            self.drop(Drop.NO_QUESTION)

    @property
    def is_open(self) -> bool:
        """Whether a turn is to be answered."""
        return self._is_open

    @property
    def tools(self) -> list[Any] | None:
        """Functions that the assistant may call, for chat templates."""
        return self.row.content.get("tools") or None

    @property
    def template_options(self) -> dict[str, Any]:
        """Further values for the chat template, such as ``enable_thinking``."""
        return self.row.content.get("chat_template_kwargs") or {}

    @property
    def messages(self) -> list[Message]:
        """The turns before the answer."""
        return self._written

    def take(self, answer: Answer) -> None:
        """Add an answer, and go on to the next question."""
        self.num_answers += 1
        self._num_tokens += answer.num_tokens
        if not answer.text.strip():
            self.drop(Drop.EMPTY)
            return
        if answer.is_cut and not self._settings.keep_cut:
            self.drop(Drop.CUT)
            return
        message: Message = {"role": "assistant", "content": answer.text}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        self._written.append(message)
        self._is_cut = answer.is_cut
        self._is_open = not answer.is_cut and self._advance()

    def drop(self, reason: Drop, detail: str = "") -> None:
        """Drop the row, and say why."""
        self._is_open, self._dropped, self._detail = False, reason, detail

    def finish(self) -> Finished:
        """Return the row with its answers, or why it is dropped."""
        position, num_tokens = self.row.position, self._num_tokens
        if self._dropped is not None:
            return Finished(position, None, num_tokens, str(self._dropped), self._detail)
        row = {"id": self.row.id} | self.row.content  # the id comes first
        row |= {
            "id": self.row.id,
            "messages": self._written,
            "finish_reason": "length" if self._is_cut else "stop",
        }
        return Finished(position, row, num_tokens)

    def _advance(self) -> bool:
        """Take over turns up to the next answer; return whether there is one."""
        is_asked = any(_asks(message) for message in self._written)
        while self._rest:
            message = self._rest[0]
            if is_asked and message["role"] == "assistant" and not message.get("tool_calls"):
                self._rest.popleft()
                return True
            is_asked = is_asked or _asks(message)
            self._written.append(self._rest.popleft())
        return _asks(self._written[-1])


def _asks(message: Message) -> bool:
    return message["role"] != "assistant" and message["role"] not in _INSTRUCTING


class AnswerSource(ABC):
    """What answers: a model in this process, or a server."""

    @property
    @abstractmethod
    def tau(self) -> float | None:
        """Tokens per target forward, prefill excluded; None if there are no counters."""

    @property
    @abstractmethod
    def answers_together(self) -> bool:
        """Whether an answer depends on the other rows of its batch."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return, ready for JSON, what its answers depend on apart from the settings."""

    @abstractmethod
    def answer(
        self, batches: Iterable[list[NumberedRow]], settings: DistillSettings
    ) -> Iterator[list[Finished]]:
        """Answer rows; yield those that are finished, in any order.

        Args:
            batches: Rows of similar lengths, which a model answers together.
            settings: How answers are generated.

        Raises:
            ServerError: If a server cannot be reached or refuses all requests, or if rows failed
                again and again; every other row has been yielded then.
        """
