"""What a browser sends and receives; tests/webui/browser.py has a real one."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

pytestmark = pytest.mark.untraced  # the page runs in another process

ROOT = Path(__file__).parents[2]
QUESTION = "How many singers are there?"
LONG = "A robe takes 2 bolts of blue fiber and half that much white fiber. How many in total?"
DONE = re.compile(r'<p class="note">\d+ tokens, \d+ tokens/s')
SECONDS = 20.0
BROKEN = """
from speclm.methods.registry import register_proposer
from speclm.methods.ngram.proposer import NgramProposer

@register_proposer("broken")
class Broken(NgramProposer):
    def __init__(self):
        raise MemoryError("full")
"""


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
def address(tmp_path_factory):
    """Run the command in a process of its own, as warnings of Gradio are errors in this one."""
    folder = tmp_path_factory.mktemp("webui")
    (folder / "own.py").write_text(BROKEN)
    command = [sys.executable, "-m", "speclm", "webui", "--port", "0", "--heads", "ngram"]
    command += ["--import", "own", "--max-new-tokens", "24"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}
    with subprocess.Popen(
        command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        lines = []
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", "".join(lines))):
            lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
        yield found[0]
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130, rest
    assert rest.count("Traceback") == rest.count("MemoryError: full") == 1


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
    assert {"Send", "Stop", "New conversation", "Export", "Arithmetic"} <= values
    assert config["analytics_enabled"] is False


def test_an_answer_streams_and_is_compared_on_request(browser):
    shown = texts(browser.updates(browser.ask(QUESTION, compares=True, method="draft")))
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


def test_errors_are_text_and_the_page_stays_up(browser):
    for question, options, words in [
        ("", {}, "the question is empty"),
        ("a " * 5000, {}, "the conversation has"),
        (QUESTION, {"seed": None}, "seed is None"),
        (QUESTION, {"method": "broken"}, "the answer has failed (MemoryError: full)"),
    ]:
        *_, error = texts(browser.updates(browser.ask(question, **options)))
        assert f'role="alert">{words}' in error
        assert question in error  # it can be corrected
    assert DONE.search(texts(browser.updates(browser.ask(QUESTION)))[-1])


def test_stop_ends_an_answer_and_a_new_conversation_begins_empty(browser):
    updates = browser.updates(browser.ask(LONG, max_new_tokens=380))
    next(updates)
    browser.do("stop")
    assert "; stopped" in texts(updates)[-1]
    assert json.loads(browser.do("export"))["turns"][0]["finish"] == "stopped"
    assert "Ask something" in browser.do("reset")
    assert 'role="alert">there is no answer to export yet' in browser.do("export")


def test_a_page_waits_for_the_answer_of_another_which_ends_when_that_is_closed(address, browser):
    with opened(address, "closed") as closed:
        with closed.client.stream("GET", "/gradio_api/heartbeat/closed"):
            long = closed.updates(closed.ask(LONG, max_new_tokens=380))
            next(long)
            updates = browser.updates(browser.ask(QUESTION))
            assert "waiting for another" in texts([next(updates)])[0]
        long.close()
        assert DONE.search(texts(updates)[-1])
        assert "no answer to export yet" in closed.do("export")  # it is forgotten


def test_requests_for_other_hosts_are_refused(browser):
    reply = browser.client.get("/config", headers={"host": "evil.example"})
    assert reply.status_code == 400
