"""The page: its components, what they do, and the server that it runs on."""

import ipaddress
import json
import logging
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import fastapi
import gradio as gr
import uvicorn
from starlette.middleware.trustedhost import TrustedHostMiddleware

from speclm.errors import SpeclmError, reason_of
from speclm.webui.rendering import (
    HINT,
    LEGEND,
    render_error,
    render_figures,
    render_turn,
    render_turns,
)
from speclm.webui.session import Methods, Session
from speclm.webui.turns import Progress, Settings

_log = logging.getLogger("speclm")

_HERE = Path(__file__).parent
_DEFAULT_TREE = "default"
_TREES = (_DEFAULT_TREE, "auto", "4", "8", "16", "32", "64")
_NO_ANSWER = render_figures(Progress())


@dataclass(frozen=True, slots=True)
class Example:
    """A question to begin with.

    Args:
        label: Text of its button.
        question: The user's message.
        system: The system message that it needs.
    """

    label: str
    question: str
    system: str = ""


def build_app(
    methods: Methods, defaults: Settings, *, title: str, examples: Sequence[Example] = ()
) -> fastapi.FastAPI:
    """Return the page as a web application; it loads nothing from other machines.

    Each open page is a conversation of its own. Their answers are generated one after the other.

    Args:
        methods: The methods to choose from.
        defaults: What the settings are at first; ``top_k`` stays as it is.
        title: Heading of the page, such as the name of the base.
        examples: Questions that a button fills in.
    """
    app: fastapi.FastAPI = gr.mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        _Page(methods, defaults).build(title, examples),
        path="/",
        footer_links=[],
        ssr_mode=False,
        show_error=True,
        enable_monitoring=False,
        theme=gr.themes.Base(
            font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ).set(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300"),
        css=(_HERE / "page.css").read_text(encoding="utf-8"),
        head=f"<script>{(_HERE / 'page.js').read_text(encoding='utf-8')}</script>",
    )
    return app


def serve(app: fastapi.FastAPI, listener: socket.socket) -> None:
    """Serve a page until the process is interrupted.

    A server of this machine alone refuses requests for other host names, as a hostile page might
    send them.

    Args:
        app: The page.
        listener: A socket that listens.
    """
    address = listener.getsockname()[0]
    if ipaddress.ip_address(address).is_loopback:
        hosts = ["localhost", "127.0.0.1", f"[{address}]" if ":" in address else address]
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listener])


class _Page:
    """The components, and the conversations of those who have the page open."""

    def __init__(self, methods: Methods, defaults: Settings) -> None:
        self._methods, self._defaults = methods, defaults
        self._sessions: dict[str, Session] = {}

    def build(self, title: str, examples: Sequence[Example]) -> gr.Blocks:
        """Return the page."""
        page: gr.Blocks
        with gr.Blocks(analytics_enabled=False, title=f"speclm: {title}") as page:
            gr.HTML(f"<h1>speclm: {escape(title)}</h1>")
            with gr.Row():
                with gr.Column(scale=3, min_width=320):
                    self._add_talk(examples)
                with gr.Column(scale=1, min_width=260):
                    self.figures = _html(_NO_ANSWER)
                    self._add_settings()
            self._connect()
            page.unload(self.forget)
        return page

    def ask(self, values: Mapping[Any, Any], request: gr.Request) -> Iterator[dict[Any, Any]]:
        """Answer the question in the box."""
        session, question = self._session(request), values[self.question] or ""
        present = "" if session.turns else HINT
        before: dict[Any, Any] = {
            self.past: render_turns(session.turns),
            self.present: present,
            self.alert: "",
        }
        started: dict[Any, Any] = {
            self.question: "",
            self.send: _enabled(yes=False),
            self.stop: _enabled(yes=True),
        }
        ended = {self.send: _enabled(yes=True), self.stop: _enabled(yes=False)}
        try:
            settings = self._settings(values)
            for number, turn in enumerate(session.ask(question, settings)):
                first = {**before, **started} if number == 0 else {}
                figures = render_figures(turn.progress)
                yield {**first, self.present: render_turn(turn), self.figures: figures}
        except SpeclmError as error:
            yield {**before, **ended, self.alert: render_error(str(error)), self.question: question}
        except Exception as error:  # noqa: BLE001 - shown on the page, which stays up
            _log.exception("the page's answer has failed")
            message = f"the answer has failed ({reason_of(error)}); the log has the details"
            yield {**before, **ended, self.alert: render_error(message), self.question: question}
        else:
            yield ended

    def stop_answer(self, request: gr.Request) -> None:
        """Stop the answer."""
        self._session(request).stop()

    def reset(self, request: gr.Request) -> dict[Any, Any]:
        """Begin a new conversation."""
        try:
            self._session(request).reset()
        except SpeclmError as error:
            return {self.alert: render_error(str(error))}
        return {self.past: "", self.present: HINT, self.alert: "", self.figures: _NO_ANSWER}

    def export(self, request: gr.Request) -> dict[Any, Any]:
        """Return the conversation as JSON."""
        try:
            found = self._session(request).export()
        except SpeclmError as error:
            return {self.exported: "", self.alert: render_error(str(error))}
        return {self.exported: json.dumps(found, ensure_ascii=False, indent=1), self.alert: ""}

    def forget(self, request: gr.Request) -> None:
        """Drop the conversation of a page that was closed."""
        session = self._sessions.pop(str(request.session_hash), None)
        if session is not None:
            session.stop()

    def _session(self, request: gr.Request) -> Session:
        key = str(request.session_hash)
        if key not in self._sessions:
            self._sessions[key] = Session(self._methods)
        return self._sessions[key]

    def _settings(self, values: Mapping[Any, Any]) -> Settings:
        tree = values[self.tree]
        return replace(
            self._defaults,
            method=values[self.method],
            system=values[self.system] or "",
            temperature=values[self.temperature],
            top_p=values[self.top_p],
            max_new_tokens=values[self.max_new_tokens],
            tree=None if tree == _DEFAULT_TREE else int(tree) if tree.isdigit() else tree,
            seed=values[self.seed],
            compares=values[self.compares],
        )

    def _add_talk(self, examples: Sequence[Example]) -> None:
        _html(LEGEND)
        with gr.Column(elem_id="talk"):
            self.past, self.present = _html(""), _html(HINT)
        self.alert = _html("")
        self.question = gr.Textbox(
            label="Message",
            info="Enter sends, Shift+Enter begins a line, Escape stops an answer.",
            lines=1,
            max_lines=8,
            autofocus=True,
            elem_id="question",
        )
        with gr.Row():
            self.send = gr.Button("Send", variant="primary", elem_id="send", min_width=90)
            self.stop = gr.Button("Stop", interactive=False, elem_id="stop", min_width=90)
            self.new = gr.Button("New conversation", elem_id="new", min_width=150)
            self.save = gr.Button("Export", elem_id="export", min_width=90)
        self.exported = gr.Textbox(visible=False)
        self.examples = []
        if examples:
            with gr.Row():
                self.examples = [
                    (gr.Button(example.label, size="sm", min_width=150), example)
                    for example in examples
                ]

    def _add_settings(self) -> None:
        defaults = self._defaults
        self.compares = gr.Checkbox(
            defaults.compares, label="Compare with regular generation", elem_id="compare"
        )
        self.method = gr.Dropdown(self._methods.names, value=defaults.method, label="Method")
        tree = _DEFAULT_TREE if defaults.tree is None else str(defaults.tree)
        self.tree = gr.Dropdown(
            list(dict.fromkeys([*_TREES, tree])), value=tree, label="Draft tokens per round"
        )
        self.temperature = gr.Slider(
            0,
            max(2.0, defaults.temperature),
            value=defaults.temperature,
            step=0.05,
            label="Temperature (0 is greedy)",
        )
        self.top_p = gr.Slider(0, 1, value=defaults.top_p, step=0.01, label="Top-p")
        self.max_new_tokens = gr.Number(
            defaults.max_new_tokens, precision=0, label="Maximum new tokens", elem_id="max-tokens"
        )
        self.seed = gr.Number(defaults.seed, precision=0, label="Seed")
        self.system = gr.Textbox(defaults.system, label="System message", lines=2, max_lines=6)

    def _connect(self) -> None:
        settings = {self.compares, self.method, self.tree, self.temperature, self.top_p}
        settings |= {self.max_new_tokens, self.seed, self.system}
        texts = [self.past, self.present, self.alert, self.figures]
        gr.on(
            [self.question.submit, self.send.click],
            self.ask,
            inputs={self.question, *settings},
            outputs=[*texts, self.question, self.send, self.stop],
            trigger_mode="once",
            show_progress="hidden",
            concurrency_limit=None,
            api_name="ask",
        )
        self.stop.click(self.stop_answer, queue=False, api_name="stop")
        self.new.click(
            self.reset, outputs=texts, queue=False, show_progress="hidden", api_name="reset"
        )
        self.save.click(
            self.export,
            outputs=[self.alert, self.exported],
            queue=False,
            show_progress="hidden",
            api_name="export",
        ).then(None, inputs=self.exported, js=_DOWNLOAD)
        for button, example in self.examples:
            button.click(
                lambda example=example: (example.system, example.question),
                outputs=[self.system, self.question],
                api_visibility="private",
            )


_DOWNLOAD = """(text) => {
  if (!text) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = "conversation.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}"""


def _html(value: str) -> gr.HTML:
    return gr.HTML(value, elem_classes="speclm", apply_default_css=False)


def _enabled(*, yes: bool) -> Any:
    return gr.update(interactive=yes)
