"""A server with OpenAI's interface that answers as a test says."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any


@dataclass
class Reply:
    """What is sent back: status, headers and body, of which `cut` bytes are left out."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: int = 0


def completion(content: str | None, *, finish: str = "stop", tokens: int = 3, **message) -> Reply:
    """Return the reply with an answer."""
    choice = {"message": {"role": "assistant", "content": content, **message}}
    choice["finish_reason"] = finish
    return Reply({"choices": [choice], "usage": {"completion_tokens": tokens}})


class AnsweringServer:
    """Keeps requests, and what they are answered with."""

    def __init__(self, reply: Callable[[dict[str, Any]], Reply]) -> None:
        self.reply, self.lock = reply, Lock()
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.url = ""

    def take(self, request: dict[str, Any], headers: dict[str, str]) -> Reply:
        with self.lock:
            self.requests.append(request)
            self.headers.append(headers)
        return self.reply(request)


@contextmanager
def serving(reply: Callable[[dict[str, Any]], Reply]) -> Iterator[AnsweringServer]:
    """Run a server until the block ends; a reply of None ends the connection without an answer."""
    server = AnsweringServer(reply)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            found = server.take(
                {**json.loads(content), "path": self.path}, dict(self.headers.items())
            )
            if found is None:
                return
            body = found.body if isinstance(found.body, bytes) else json.dumps(found.body).encode()
            self.send_response(found.status)
            for name, value in {"Content-Length": str(len(body)), **found.headers}.items():
                self.send_header(name, value)
            with suppress(ConnectionError):  # who asked may have left
                self.end_headers()
                self.wfile.write(body[: len(body) - found.cut])

        def log_message(self, *_: Any) -> None:
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{listener.server_port}/v1"
    thread = Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()
