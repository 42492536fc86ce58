"""What a browser sends and receives; tests/webui/browser.py has a real one."""

import asyncio
import inspect
import json
import re
import signal
import warnings
from contextlib import contextmanager
from threading import Thread, Timer
from unittest.mock import Mock

import httpx
import pytest

from speclm.cli.webui import listen
from speclm.webui import Methods
from tests.byte_tokenizer import byte_tokenizer
from tests.webui.models import settings, tiny_methods

# Gradio warns of its own use of others; with coverage or shape checks its server is slow.
pytestmark = [pytest.mark.untraced, pytest.mark.filterwarnings("ignore")]

QUESTION = "abcabcabc"
DONE = re.compile(r'<p class="note">\d+ tokens, \d+ tokens/s')
TITLE = "<script>bad()</script> *a*"
SECONDS = 20.0


class Browser:
    """What a browser sends for one open page, and what comes back."""

    def __init__(self, address, name):
        self.client = httpx.Client(base_url=address, timeout=SECONDS)
        self.name = name

    def post(self, way, action, *values):
        body = {"data": list(values), "session_hash": self.name}
        return self.client.post(f"/gradio_api/{way}/{action}", json=body).json()

    def updates(self, path):
        """Yield the values of the outputs at each update."""
        with self.client.stream("GET", path) as reply:
            for line in reply.iter_lines():
                if line.startswith("event: error"):
                    raise AssertionError(line)
                if line.startswith("data: ") and (data := json.loads(line[6:])) is not None:
                    yield data

    def do(self, action):
        return "".join(text for text in self.post("run", action)["data"] if isinstance(text, str))

    def ask(self, question, **options):
        found = {
            "compares": False,
            "method": "ngram",
            "tree": "default",
            "temperature": 0,
            "top_p": 1,
            "max_new_tokens": 24,
            "seed": 0,
            "system": "",
        }
        event = self.post("call", "ask", question, *{**found, **options}.values())
        return f"/gradio_api/call/ask/{event['event_id']}"


def texts(updates):
    """Return the texts of each update that has any, all outputs together."""
    joined = ("".join(part for part in update if isinstance(part, str)) for update in updates)
    return [text for text in joined if text]


@pytest.fixture(scope="module")
def page():
    """Return the module of the page, which imports Gradio."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from speclm.webui import page

    make, loops = asyncio.new_event_loop, []

    def new_event_loop():
        loops.append(make())
        return loops[-1]

    ask = inspect.unwrap(page._Page.ask)  # Gradio sees a generator only without shape checks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page._Page, "ask", ask)
        patch.setattr(asyncio, "new_event_loop", new_event_loop)
        yield page
    for loop in loops:  # Gradio leaves its own open, of which a later test would be warned
        loop.close()
    asyncio.set_event_loop(None)


@pytest.fixture(scope="module")
def address(page):
    """Serve a page of the tiny model, whose method "broken" does not load."""

    def fail():
        raise MemoryError("full")

    tiny = tiny_methods()
    loaders = {name: lambda name=name: tiny.load(name) for name in tiny.names}
    methods = Methods({**loaders, "broken": fail}, byte_tokenizer())
    examples = [page.Example("Letters", "abc", "be brief")]
    servers = []

    class Server(page.uvicorn.Server):
        def __init__(self, config):
            super().__init__(config)
            servers.append(self)

    with (
        pytest.MonkeyPatch.context() as patch,
        listen("127.0.0.1", 0) as listener,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        patch.setattr(page.uvicorn, "Server", Server)
        app = page.build_app(methods, settings(temperature=5.0), title=TITLE, examples=examples)
        thread = Thread(target=page.serve, args=(app, listener), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        servers[0].should_exit = True
        thread.join(SECONDS)
        assert not thread.is_alive()


@contextmanager
def opened(address, name):
    browser = Browser(address, name)
    with browser.client:
        yield browser


@pytest.fixture
def browser(address, request):
    with opened(address, request.node.name) as found:
        yield found


def test_the_page_has_its_components_and_fetches_nothing_from_elsewhere(browser):
    page = browser.client.get("/").text
    fetched = re.findall(r'<(?:script|img)[^>]*src="(http[^"]*)|<link[^>]*href="(http[^"]*)', page)
    assert [address for found in fetched for address in found if "127.0.0.1" not in address] == []
    config = browser.client.get("/config").json()
    labels = {component["props"].get("label") for component in config["components"]}
    assert {"Message", "Method", "Seed", "Top-p", "Compare with regular generation"} <= labels
    values = {
        component["props"].get("value")
        for component in config["components"]
        if isinstance(component["props"].get("value"), str)
    }
    assert {"Send", "Stop", "New conversation", "Export", "Letters"} <= values
    assert config["analytics_enabled"] is False


def test_an_answer_streams_and_is_compared_on_request(browser):
    shown = texts(browser.updates(browser.ask(QUESTION, compares=True, max_new_tokens=100)))
    assert len(shown) > 2
    assert re.search(r"✓ identical: \d+ tokens; \d", shown[-1])
    assert '<span class="drafted" data-label="drafted: depth 1' in shown[-1]
    again = texts(browser.updates(browser.ask("b")))
    assert QUESTION in again[0]  # among the turns before
    assert "prompt tokens from the cache" in again[-1]


def test_what_a_person_writes_is_escaped(browser):
    shown = texts(browser.updates(browser.ask("<script>bad()</script>")))
    assert "&lt;script&gt;bad()" in shown[-1]
    assert not any("<script" in text for text in shown)


def test_a_title_is_text(browser):
    config = browser.client.get("/config").json()
    values = [str(component["props"].get("value")) for component in config["components"]]
    assert "<h1>speclm: &lt;script&gt;bad()&lt;/script&gt; *a*</h1>" in values
    assert TITLE not in browser.client.get("/").text


def test_sampling_takes_what_a_browser_sends_for_whole_numbers(browser):
    options = {"temperature": 5, "top_p": 0}  # 5 is the default here, as of a command line
    assert DONE.search(texts(browser.updates(browser.ask(QUESTION, **options)))[-1])


def test_errors_are_text_and_the_page_stays_up(browser, caplog):
    for question, options, words in [
        ("", {}, "the question is empty"),
        ("a" * 500, {}, "the conversation has"),
        (QUESTION, {"seed": None}, "seed is None"),
        (QUESTION, {"method": "broken"}, "the answer has failed (MemoryError: full)"),
    ]:
        *_, error = texts(browser.updates(browser.ask(question, **options)))
        assert f'role="alert">{words}' in error
        assert question in error  # it can be corrected
    assert DONE.search(texts(browser.updates(browser.ask(QUESTION)))[-1])
    assert caplog.text.count("Traceback") == caplog.text.count("MemoryError: full") == 1


def test_stop_ends_an_answer_and_a_new_conversation_begins_empty(browser):
    updates = browser.updates(browser.ask(QUESTION, max_new_tokens=380))
    next(updates)
    browser.do("stop")
    assert "; stopped" in texts(updates)[-1]
    assert json.loads(browser.do("export"))["turns"][0]["finish"] == "stopped"
    assert "Ask something" in browser.do("reset")
    assert 'role="alert">there is no answer to export yet' in browser.do("export")


def test_a_page_waits_for_the_answer_of_another_which_ends_when_that_is_closed(address, browser):
    with opened(address, "closed") as closed:
        with closed.client.stream("GET", "/gradio_api/heartbeat/closed"):
            long = closed.updates(closed.ask(QUESTION, max_new_tokens=380))
            next(long)
            updates = browser.updates(browser.ask(QUESTION))
            assert "waiting for another" in texts([next(updates)])[0]
        long.close()
        assert DONE.search(texts(updates)[-1])
        assert "no answer to export yet" in closed.do("export")  # it is forgotten


def test_requests_for_other_hosts_are_refused(browser):
    reply = browser.client.get("/config", headers={"host": "evil.example"})
    assert reply.status_code == 400


@pytest.mark.parametrize(
    ("host", "allowed"),
    [("::1", "[::1]"), ("127.0.0.2", "127.0.0.2"), ("0.0.0.0", None)],
)
def test_every_address_of_this_machine_alone_refuses_other_hosts(page, monkeypatch, host, allowed):
    monkeypatch.setattr(page.uvicorn.Server, "run", lambda *_, **__: None)
    app, listener = page.fastapi.FastAPI(), Mock(**{"getsockname.return_value": (host, 1)})
    page.serve(app, listener)
    found = [middleware.kwargs["allowed_hosts"] for middleware in app.user_middleware]
    expected = [["localhost", "127.0.0.1", allowed]]
    assert found == (expected if allowed else [])


def test_ctrl_c_ends_the_server(page):
    with listen("127.0.0.1", 0) as listener:
        Timer(0.5, signal.raise_signal, [signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt):
            page.serve(page.fastapi.FastAPI(), listener)
