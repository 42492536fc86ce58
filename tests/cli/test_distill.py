import json
import os
import signal
from threading import Event, Lock, main_thread

import pytest

from speclm.cli._options import DistillOptions
from speclm.demo.bundle import load_prompts
from speclm.errors import DataError, OptionError, ServerError
from tests.data.answering_server import Reply, completion, serving

NUM_ROWS = 8
SERVER = ("--model", "m", "--concurrency", "1", "--retries", "0")


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"messages": [{"role": "user", "content": str(n)}]} for n in range(NUM_ROWS)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def asked(request):
    return request["messages"][-1]["content"]


def answer(request):
    return completion(f"answer {asked(request)}")


def test_the_base_answers_and_the_summary_has_the_counters(run, tmp_path):
    data, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    rows = [{"messages": messages} for messages in load_prompts("sql_tune", limit=3)]
    rows.append({"messages": [{"role": "system", "content": "s"}]})
    data.write_text("\n".join(map(json.dumps, rows)))
    options = ("--max-new-tokens", "8", "--keep-cut", "--threads", "1", "--device", "cpu")
    result = run("data", "distill", "--data", str(data), "--out", str(out), *options)
    assert result.exit_code == 0
    for words in ("3 rows, 1 dropped, 2", "nothing to answer", "row 4", "tokens/s, tau ", str(out)):
        assert words in result.output
    found = [json.loads(line)["messages"] for line in out.read_text().split("\n")[:-1]]
    assert [messages[:-1] for messages in found] == [row["messages"] for row in rows[:3]]
    assert all(messages[-1]["content"].startswith("SELECT") for messages in found)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_killed_process_loses_the_row_in_flight_and_nothing_else(run, data, tmp_path):
    reached, killed, lock = Event(), Event(), Lock()
    num_requests = 0

    def reply(request):
        nonlocal num_requests
        with lock:
            num_requests += 1
            is_last = num_requests == 5
        if is_last:
            reached.set()
            killed.wait(60)
        return answer(request)

    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    with serving(reply) as server:
        command = ("data", "distill", "--data", str(data), "--server", server.url, *SERVER)
        child = os.fork()
        if child == 0:
            try:
                run(*command, "--out", str(out))
            finally:
                os._exit(0)
        assert reached.wait(60)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        killed.set()
        (shard,) = tmp_path.glob("out.jsonl.shards/shard-*")
        assert len(shard.read_text().splitlines()) == 4
        before = len(server.requests)
        result = run(*command, "--out", str(out))
        assert "8 rows, 0 dropped" in result.output
        assert "this run: 4 rows" in result.output
        assert "4 rows were finished before" in result.output
        assert len(server.requests) - before == 4
        run(*command, "--out", str(whole))
    assert out.read_bytes() == whole.read_bytes()
    assert [asked(json.loads(line)) for line in out.read_text().splitlines()] == [
        f"answer {n}" for n in range(NUM_ROWS)
    ]


def test_ctrl_c_keeps_what_is_finished_and_exits_with_130(run, data, tmp_path):
    def reply(request):
        if asked(request) == "3":
            signal.pthread_kill(main_thread().ident, signal.SIGINT)
            held.wait(60)
        return answer(request)

    held = Event()
    with serving(reply) as server:
        command = ("data", "distill", "--data", str(data), "--server", server.url, *SERVER)
        result = run(*command, "--out", str(tmp_path / "out.jsonl"))
        held.set()
    assert result.exit_code == 130
    assert "interrupted: 3 of 8 rows are finished and kept; run the same command" in result.output


def test_the_last_shard_writes_the_file(run, data, tmp_path, monkeypatch):
    monkeypatch.setenv("KEY", "secret")
    out = tmp_path / "out.jsonl"
    with serving(answer) as server:
        command = ("data", "distill", "--data", str(data), "--out", str(out), *SERVER)
        command += ("--server", server.url, "--api-key-env", "KEY", "--batch-size", "3")
        first = run(*command, "--num-shards", "2", "--shard", "1")
        assert "3 rows, 0 dropped" in first.output
        assert "shard 1 of 2 is finished; the last one to finish writes" in first.output
        assert not out.exists()
        second = run(*command, "--num-shards", "2", "--shard", "0")
        assert f"written to {out}" in second.output.replace("\n", "")
    assert len(out.read_text().splitlines()) == NUM_ROWS
    assert server.headers[0]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (("--model", "m"), OptionError, "--model is an option of a server, and there is none"),
        (("--server", "http://h/v1"), OptionError, "--server needs --model"),
        (("--server", "http://h", "--base", "b"), OptionError, "--base has no effect on --server"),
        (
            ("--server", "http://h", "--model", "m", "--api-key-env", "NO_SUCH_KEY"),
            OptionError,
            "names 'NO_SUCH_KEY', which is not set",
        ),
        (("--shard", "1"), OptionError, "shard is 1, expected 0 to 0"),
        (("--data", "none.jsonl"), DataError, "none.jsonl cannot be read"),
        (("--out", __file__), OptionError, "exists; name another file, or pass --overwrite"),
        (("--out", "no/such/out"), OptionError, "--out is .* make .* first"),
    ],
)
def test_wrong_options_are_named_before_a_base_is_loaded(run, data, options, error, message):
    given = {"--data": str(data), "--out": str(data.with_name("out.jsonl"))}
    given |= dict(zip(options[::2], options[1::2], strict=True))
    with pytest.raises(error, match=message):
        run("data", "distill", *(word for pair in given.items() for word in pair))


def test_a_server_that_refuses_is_named(run, data):
    out = str(data.with_name("out.jsonl"))
    with serving(lambda _: Reply("no", status=401)) as server, pytest.raises(ServerError):
        run("data", "distill", "--data", str(data), "--out", out, "--server", server.url, *SERVER)


def test_options_of_the_command_have_the_defaults_of_the_library(data):
    from speclm.data import DistillSettings

    options = DistillOptions(data=data, out=data)
    assert DistillSettings() == DistillSettings(
        **{name: getattr(options, name) for name in DistillSettings.__dataclass_fields__}
    )
