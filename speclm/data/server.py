"""Answers from a server with OpenAI's interface, such as vLLM, SGLang or llama.cpp."""

import http.client
import ipaddress
import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import islice
from queue import SimpleQueue
from random import Random
from threading import Event, Thread
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, ProxyHandler, Request, build_opener

from typing_extensions import override

from speclm.config import require_count, require_positive
from speclm.data.dialogues import (
    Answer,
    AnswerSource,
    Dialogue,
    DistillSettings,
    Drop,
    Finished,
    NumberedRow,
)
from speclm.errors import OptionError, ServerError, reason_of, shown
from speclm.files.atomic import load_json

MAX_CONCURRENCY = 1024
"""Maximum requests at a time; each has a thread."""

_MAX_WAIT = 300.0  # seconds before a request is sent again, whatever a server asks for
_LONGEST_BACKOFF = 60.0
_PASSING = frozenset({408, 409, 425, 429})  # and all of 500 and above
_ABOUT_THE_ROW = frozenset({400, 413, 422})
_PATIENCE = 4  # rows that may fail one after the other, if fewer are in flight


class _PassingError(Exception):
    """A request failed in a way that may pass; `wait` is how long the server asks to wait."""

    def __init__(self, reason: str, *, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class _RefusedError(Exception):
    """The server refuses this conversation, whenever it is sent."""


@dataclass(frozen=True, slots=True)
class _Failed:
    """A row without an outcome; `is_final` if no other row would have one either."""

    row: NumberedRow
    error: Exception
    reason: str
    is_final: bool


class ServerSource(AnswerSource):
    """Answers from a server, several conversations at a time.

    Requests that fail in a way that may pass are sent again, at growing intervals or when the
    server says: too many requests, errors of the server, connections that fail, and answers that
    are cut off. Redirects are not followed, so that the key reaches no other server.

    Example:
        ```python
        source = ServerSource("http://localhost:8000/v1", "org/model", concurrency=64)
        ```
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        concurrency: int = 8,
        timeout: float = 600.0,
        retries: int = 6,
        backoff: float = 1.0,
    ) -> None:
        """Describe the server; it is reached when the first row is answered.

        Args:
            url: Address up to and with ``/v1``.
            model: The server's name of the model.
            api_key: Sent as a bearer token; None sends none.
            concurrency: Requests at a time.
            timeout: Seconds to wait for any part of an answer.
            retries: How often a request is sent again.
            backoff: Seconds before it is sent again for the first time; doubled each time.

        Raises:
            OptionError: If the address is none of HTTP, or a number is out of range.
        """
        _require_address(url)
        require_count("concurrency", concurrency, low=1, high=MAX_CONCURRENCY)
        require_positive("timeout", timeout)
        require_count("retries", retries, low=0, high=100)
        require_positive("backoff", backoff)
        self.model = model
        self._url = f"{url.rstrip('/')}/chat/completions"
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {_require_key(api_key)}"
        self._concurrency, self._timeout = concurrency, timeout
        self._retries, self._backoff = retries, backoff
        self._opener = _opener(url)
        self._random = Random(0)  # spreads requests that are sent again

    @property
    @override
    def tau(self) -> float | None:
        return None

    @property
    @override
    def answers_together(self) -> bool:
        return False

    @override
    def identity(self) -> dict[str, Any]:
        return {"server_model": self.model}  # its address may change

    @override
    def answer(
        self, batches: Iterable[list[NumberedRow]], settings: DistillSettings
    ) -> Iterator[list[Finished]]:
        rows = (row for batch in batches for row in batch)
        todo: SimpleQueue[NumberedRow | None] = SimpleQueue()
        outcomes: SimpleQueue[Finished | _Failed] = SimpleQueue()
        stopping = Event()

        def work() -> None:
            while (row := todo.get()) is not None and not stopping.is_set():
                outcomes.put(self._answer_row(row, settings, stopping))

        num_running = 0
        for row in islice(rows, self._concurrency):
            todo.put(row)
            Thread(target=work, daemon=True).start()  # a request in flight must not delay the end
            num_running += 1
        try:
            yield from self._collect(rows, num_running, todo=todo, outcomes=outcomes)
        finally:
            stopping.set()
            for _ in range(self._concurrency):
                todo.put(None)

    def _collect(
        self,
        rows: Iterator[NumberedRow],
        num_running: int,
        *,
        todo: SimpleQueue[NumberedRow | None],
        outcomes: SimpleQueue[Finished | _Failed],
    ) -> Iterator[list[Finished]]:
        """Yield finished rows as they come, and hand out a new one for each."""
        failures: list[_Failed] = []
        num_in_succession = 0
        while num_running:
            outcome = outcomes.get()
            if (following := next(rows, None)) is None:
                num_running -= 1
            else:
                todo.put(following)
            if isinstance(outcome, Finished):
                num_in_succession = 0
                yield [outcome]
                continue
            failures.append(outcome)
            num_in_succession += 1
            if outcome.is_final or num_in_succession >= max(self._concurrency, _PATIENCE):
                break
        if failures:
            first = next((failed for failed in failures if failed.is_final), failures[0])
            raise ServerError(
                f"{len(failures)} rows have no answer from {self._url!r}, such as "
                f"{first.row.where}: {first.reason}; all others so far are kept: correct the cause "
                "or wait, and run the same command again"
            ) from first.error

    def _answer_row(
        self, row: NumberedRow, settings: DistillSettings, stopping: Event
    ) -> Finished | _Failed:
        dialogue = Dialogue(row, settings)
        try:
            while dialogue.is_open:
                answer = self._ask(dialogue, settings, stopping)
                if isinstance(answer, Drop):
                    dialogue.drop(answer)
                else:
                    dialogue.take(answer)
        except _RefusedError as refused:
            dialogue.drop(Drop.REFUSED, str(refused))
        except _PassingError as failed:
            return _Failed(row, failed, str(failed), is_final=False)
        except ServerError as error:
            return _Failed(row, error, str(error), is_final=True)
        except Exception as error:  # noqa: BLE001 - raised by the thread that waits for it
            return _Failed(row, error, reason_of(error), is_final=True)
        return dialogue.finish()

    def _ask(self, dialogue: Dialogue, settings: DistillSettings, stopping: Event) -> Answer | Drop:
        """Return the answer to one turn; send the request again while that may help."""
        body = json.dumps(self._request(dialogue, settings)).encode()
        wait = self._backoff
        for attempt in range(self._retries + 1):
            try:
                return self._post(body)
            except _PassingError as failed:
                if attempt == self._retries:
                    raise
                pause = (
                    wait * self._random.uniform(0.5, 1.0) if failed.wait is None else failed.wait
                )
                if stopping.wait(min(pause, _MAX_WAIT)):
                    raise
                wait = min(2 * wait, _LONGEST_BACKOFF)
        raise AssertionError("the last attempt returns or raises")

    def _request(self, dialogue: Dialogue, settings: DistillSettings) -> dict[str, Any]:
        request: dict[str, Any] = {
            "model": self.model,
            "messages": dialogue.messages,
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
        }
        if dialogue.tools:
            request["tools"] = dialogue.tools
        if dialogue.template_options:
            request["chat_template_kwargs"] = dialogue.template_options  # of vLLM and SGLang
        if settings.is_sampled:
            request["seed"] = settings.seed_of(dialogue.num_answers, [dialogue.row.id])
            request["top_p"] = settings.top_p
            if settings.top_k:
                request["top_k"] = settings.top_k  # of vLLM, SGLang and llama.cpp
        return request

    def _post(self, body: bytes) -> Answer | Drop:
        """Send a request once.

        Raises:
            _PassingError: If it may be answered when it is sent again.
            _RefusedError: If it may not, and others may.
            ServerError: If no request may be answered.
        """
        request = Request(self._url, data=body, headers=self._headers, method="POST")
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                content: bytes = response.read()
        except HTTPError as error:
            raise _explain(error) from error
        except (OSError, http.client.HTTPException) as error:
            raise _PassingError(reason_of(error)) from error
        return _parse(content)


def _explain(error: HTTPError) -> Exception:
    """Return what the status of an answer means."""
    text = ""
    with suppress(OSError, http.client.HTTPException):
        text = " ".join(error.read(2000).decode(errors="replace").split())[:300]
    reason = f"HTTP {error.code} {error.reason}: {text}"
    if error.code in _PASSING or error.code >= 500:
        return _PassingError(reason, wait=_retry_after(error.headers.get("Retry-After")))
    if error.code in _ABOUT_THE_ROW:
        return _RefusedError(reason)
    return ServerError(f"{reason}; check address, model and key")


def _retry_after(value: str | None) -> float | None:
    """Return the seconds that a header asks to wait: a number, or a date."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    with suppress(ValueError, TypeError):  # TypeError: a date without a zone
        return max((parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds(), 0.0)
    return None


def _parse(content: bytes) -> Answer | Drop:
    """Return the answer in a response."""
    found: Any = None
    with suppress(ValueError):
        found = load_json(content.decode())
    match found:
        case {"choices": [{"message": {**message}, **choice}, *_]}:
            finish = choice.get("finish_reason")
        case _:
            raise _PassingError(
                f"expected a completion with choices, found {shown(content[:80])}, an answer that "
                "is cut off or none"
            )
    if finish == "content_filter":
        return Drop.FILTERED
    if message.get("tool_calls"):
        return Drop.CALLED
    text = message.get("content")
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    usage = found.get("usage")
    counted = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return Answer(
        text=text if isinstance(text, str) else "",
        num_tokens=counted if isinstance(counted, int) else 0,
        is_cut=finish == "length",
        reasoning=reasoning if isinstance(reasoning, str) else None,
    )


class _NoRedirects(HTTPRedirectHandler):
    """Lets redirects be errors."""

    @override
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _opener(url: str) -> OpenerDirector:
    """Return what sends requests; a server on this machine is never asked through a proxy."""
    handlers: list[Any] = [_NoRedirects()]
    if _is_local(urlsplit(url).hostname or ""):
        handlers.append(ProxyHandler({}))
    return build_opener(*handlers)


def _is_local(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _require_address(url: str) -> None:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:  # brackets that do not match, or a port that is no number
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise OptionError(
            f"the server's address is {url!r}, expected one such as http://localhost:8000/v1"
        )
    if parts.query or parts.fragment or parts.username:
        raise OptionError(
            f"the server's address is {parts.scheme}://{parts.hostname} with a query, a fragment "
            "or a user name, expected none; a key is passed by itself"
        )


def _require_key(key: str) -> str:
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise OptionError(
            f"the key of the server has {len(key)} characters, expected printable ASCII without "
            "spaces; check the variable that holds it"
        )
    return key
