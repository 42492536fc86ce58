import json
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from threading import Barrier, Event

import pytest

from speclm.data import server as server_module
from speclm.data.dialogues import DistillSettings, Drop, parse_row
from speclm.data.server import ServerSource
from speclm.errors import OptionError, ServerError
from speclm.files.json_lines import JsonLine
from tests.data.answering_server import Reply, completion, serving

TEMPLATE = {"tools": [{"t": 1}], "chat_template_kwargs": {"enable_thinking": False}}
OVERLOADED = Reply("busy", status=503)


def rows(count=1, turns=1, **keys):
    turn = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "old"}]
    return [
        parse_row(JsonLine(json.dumps({"id": str(n), "messages": turn * turns, **keys}).encode(),
                           f"f:{n + 1}"), n)
        for n in range(count)
    ]  # fmt: skip


def answered(server, asked, *, settings=None, **options):
    """Return finished rows by position."""
    source = ServerSource(server.url, "m", **{"backoff": 1e-3, **options})
    batches = [asked[:2], asked[2:]]
    found = source.answer(batches, settings or DistillSettings())
    return {finished.position: finished for part in found for finished in part}


def texts(finished):
    return [each["content"] for each in finished.row["messages"] if each["role"] == "assistant"]


def in_order(*replies):
    given = iter(replies)
    return lambda _: next(given)


def test_turns_are_asked_for_one_after_the_other():
    with serving(lambda request: completion(f"a{len(request['messages'])}")) as server:
        settings = DistillSettings(max_new_tokens=7)
        (finished,) = answered(server, rows(turns=2, **TEMPLATE), settings=settings).values()
    assert texts(finished) == ["a1", "a3"]
    assert finished.num_tokens == 6
    first, second = server.requests
    assert first == {
        "path": "/v1/chat/completions",
        "model": "m",
        "messages": [{"role": "user", "content": "q"}],
        "max_tokens": 7,
        "temperature": 0.0,
        **TEMPLATE,
    }
    assert second["messages"][1] == {"role": "assistant", "content": "a1"}
    assert "Authorization" not in server.headers[0]


def test_sampled_requests_have_a_seed_of_their_own_and_the_key_is_sent():
    settings = DistillSettings(temperature=0.7, top_p=0.9, top_k=5)
    with serving(lambda _: completion("a")) as server:
        answered(server, rows(2, turns=2), settings=settings, api_key="secret")
    seeds = {request["seed"] for request in server.requests}
    assert seeds == {settings.seed_of(turn, [name]) for turn in (0, 1) for name in ("0", "1")}
    assert {(request["top_p"], request["top_k"]) for request in server.requests} == {(0.9, 5)}
    assert server.headers[0]["Authorization"] == "Bearer secret"


def test_requests_run_at_the_same_time():
    together = Barrier(3, timeout=20)

    def reply(_):
        together.wait()
        return completion("a")

    with serving(reply) as server:
        assert len(answered(server, rows(6), concurrency=3)) == 6


@pytest.mark.parametrize(
    "failure",
    [
        OVERLOADED,
        Reply("slow down", status=429),
        Reply(completion("a").body, cut=5),  # the connection ends before the body does
        Reply(b'{"choices": [{"mess'),
        Reply({"choices": []}),
        Reply({"error": "\ud800"}),
        None,
    ],
    ids=["503", "429", "cut off", "half a body", "no choice", "half a character", "hung up"],
)
def test_what_may_pass_is_asked_for_again(failure):
    with serving(in_order(failure, failure, completion("a"))) as server:
        (finished,) = answered(server, rows()).values()
    assert texts(finished) == ["a"]
    assert len(server.requests) == 3
    assert server.requests[0] == server.requests[2]


def test_a_server_that_takes_too_long_is_asked_again():
    stuck = Barrier(2)

    def reply(_):
        if len(server.requests) == 1:
            stuck.wait()
        return completion("a")

    with serving(reply) as server:
        (finished,) = answered(server, rows(), timeout=0.2).values()
        stuck.wait()
    assert texts(finished) == ["a"]


def test_the_server_says_how_long_to_wait(monkeypatch):
    waits = []

    class Impatient(Event):
        def wait(self, timeout=None):
            waits.append(timeout)

    monkeypatch.setattr(server_module, "Event", Impatient)
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    values = ("7", "9999", soon, "nonsense", None)
    replies = [
        Reply("", status=429, headers={} if value is None else {"Retry-After": value})
        for value in values
    ]
    with serving(in_order(*replies, completion("a"))) as server:
        answered(server, rows(), backoff=1.0)
    assert waits[:2] == [7.0, 300.0]
    assert 60 < waits[2] <= 90
    assert 4 <= waits[3] <= 8
    assert 8 <= waits[4] <= 16


def test_answers_that_cannot_be_used_drop_the_row():
    replies = {
        "0": (completion("a", finish="length"), Drop.CUT),
        "1": (completion(None), Drop.EMPTY),
        "2": (completion("a", finish="content_filter"), Drop.FILTERED),
        "3": (completion(None, tool_calls=[{"id": "1"}]), Drop.CALLED),
        "4": (Reply(b"too many tokens", status=400), Drop.REFUSED),
    }
    asked = rows(5)
    for row in asked:
        row.content["messages"][0]["content"] = row.id
    with serving(lambda request: replies[request["messages"][0]["content"]][0]) as server:
        found = answered(server, asked)
    assert {n: found[n].dropped for n in found} == {n: str(replies[str(n)][1]) for n in range(5)}
    assert found[4].detail == "HTTP 400 Bad Request: too many tokens"
    assert len(server.requests) == 5


def test_reasoning_is_kept():
    with serving(lambda _: completion("a", reasoning_content="because")) as server:
        (finished,) = answered(server, rows()).values()
    assert finished.row["messages"][1]["reasoning_content"] == "because"


def test_a_row_that_fails_again_and_again_is_named_after_all_others_are_done():
    asked = rows(6)
    asked[1].content["messages"][0]["content"] = "poison"

    def reply(request):
        return OVERLOADED if request["messages"][0]["content"] == "poison" else completion("a")

    with serving(reply) as server:
        source = ServerSource(server.url, "m", concurrency=1, retries=2, backoff=1e-3)
        found = source.answer([asked], DistillSettings())
        assert [finished.position for _ in range(5) for finished in next(found)] == [0, 2, 3, 4, 5]
        with pytest.raises(ServerError, match=r"1 rows have no answer .* f:2: HTTP 503 .*again"):
            next(found)
    assert len(server.requests) == 5 + 3


def test_a_server_that_always_fails_is_given_up_soon():
    with serving(lambda _: OVERLOADED) as server:
        with pytest.raises(ServerError, match=r"^4 rows have no answer"):
            answered(server, rows(50), concurrency=1, retries=0)
        assert len(server.requests) == 4
    with pytest.raises(ServerError, match=r"Connection refused"):
        answered(server, rows(50), retries=1)


@pytest.mark.parametrize(
    "refusal",
    [
        Reply("no such model", status=404),
        Reply("", status=401),
        Reply("", status=302, headers={"Location": "http://127.0.0.1:9/v1"}),  # takes the key along
    ],
    ids=["404", "401", "302"],
)
def test_what_no_row_will_pass_ends_the_run_at_once(refusal):
    with serving(lambda _: refusal) as server:
        with pytest.raises(ServerError, match=rf"HTTP {refusal.status} .*check address, model"):
            answered(server, rows(50), concurrency=1)
        assert len(server.requests) == 1


def test_mistakes_in_a_thread_are_raised(monkeypatch):
    monkeypatch.setattr(ServerSource, "_request", lambda *_: {}["missing"])
    with serving(lambda _: completion("a")) as server, pytest.raises(ServerError) as caught:
        answered(server, rows())
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000/v1"}, "address is 'localhost:8000/v1', expected one such as"),
        ({"url": "file:///etc/passwd"}, "expected one such as http"),
        ({"url": "http://[::1/v1"}, "expected one such as http"),
        ({"url": "http://h:port/v1"}, "expected one such as http"),
        ({"url": "https://me:secret@host/v1"}, "https://host with a query, .*a key is passed"),
        ({"api_key": "a b"}, "key of the server has 3 characters"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"timeout": 0.0}, "timeout is 0.0"),
        ({"retries": -1}, "retries is -1"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(OptionError, match=message) as caught:
        ServerSource(**{"url": "http://localhost/v1", "model": "m", **options})
    assert "secret" not in str(caught.value)


def test_a_server_on_this_machine_is_not_asked_through_a_proxy(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with serving(lambda _: completion("a")) as server:
        assert len(answered(server, rows(), retries=0)) == 1
