import gc
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2
import openai
import pytest
import torch
from starlette.exceptions import HTTPException
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from speclm.demo import assets, load_prompts
from speclm.errors import CheckpointError, OptionError, PromptError
from speclm.serving import export_server
from speclm.serving.runtime import require_drafts

ROOT = Path(__file__).parents[2]
START_SECONDS = 120.0  # on a busy machine
STOP_SECONDS = 20.0
MAX_TOKENS = 24


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)


@pytest.fixture
def served(base, tmp_path, modules):
    return export_server(base, tmp_path / "served", heads="ngram", check=False).folder


def test_loaded_base_generates_its_own_tokens_with_drafts(served, base):
    model, prompt = load(served), torch.arange(5, 30)[None].repeat(1, 2)
    output = model.generate(prompt, max_new_tokens=12, return_dict_in_generate=True)
    regular = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert torch.equal(output.sequences, regular.generate(prompt, max_new_tokens=12))
    assert output.speculation.total.num_draft_tokens > 0
    with pytest.raises(PromptError, match="at least one row"):
        model.generate(prompt[:, :0])
    # What is saved is the base, without what makes it draft.
    model.save_pretrained(served.parent / "saved")
    assert not (served.parent / "saved" / "custom_generate").exists()


def test_unloaded_base_is_freed_with_its_proposer(served):
    model = load(served)
    model.generate(torch.arange(5, 9)[None], max_new_tokens=2)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_tokenizer_of_the_server_needs_trust(served):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoProcessor.from_pretrained(served, trust_remote_code=False)
    trusted = AutoProcessor.from_pretrained(served, trust_remote_code=True)
    assert type(trusted) is type(AutoTokenizer.from_pretrained(served))


def test_missing_speclm_is_named_with_its_installation(served, monkeypatch):
    def find(name, *rest):
        if name == "speclm":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return import_module(name, *rest)

    import_module = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", find)
    with pytest.raises(ImportError, match="pip install speclm"):
        load(served)


def test_code_next_to_another_base_is_refused_at_the_first_call(served, base, tmp_path):
    other = shutil.copytree(base, tmp_path / "other")
    shutil.copytree(served / "custom_generate", Path(other) / "custom_generate")
    with pytest.raises(CheckpointError, match="export this base"):
        load(other).generate(torch.arange(5, 9)[None])


@pytest.mark.parametrize("option", ["--continuous-batching", "--compile"])
def test_options_of_the_server_that_bypass_drafts_are_refused(option):
    require_drafts(["transformers", "serve", "--trust-remote-code", "served"])
    with pytest.raises(OptionError, match=f"started with {option}"):
        require_drafts(["transformers", "serve", option, "served"])


def test_error_in_a_stream_of_the_server_is_text_that_json_can_hold(served, monkeypatch):
    class Streamer(BaseStreamer):
        def put(self, value):
            raise ValueError('"quoted"\nwords')

        def end(self):
            pass

    monkeypatch.setitem(sys.modules, "transformers.cli.serving.server", object())
    with pytest.raises(HTTPException) as raised:
        load(served).generate(torch.arange(5, 9)[None], streamer=Streamer(), max_new_tokens=2)
    assert raised.value.status_code == 400
    assert '"quoted" words' in json.loads(f'"{raised.value.detail}"')


class Server:
    """The server of Transformers in a process of its own, with the bundled base and heads."""

    def __init__(self, folder, log):
        self.folder, self.log = folder, log
        self.process = None
        with socket.create_server(("127.0.0.1", 0)) as found:
            self.port = found.getsockname()[1]
        self.client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=60
        )
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    @contextmanager
    def running(self):
        command = [
            *(Path(sys.executable).with_name("transformers"), "serve", self.folder),
            *("--trust-remote-code", "--dtype", "float32", "--device", "cpu"),
            *("--host", "127.0.0.1", "--port", str(self.port)),
        ]
        modules = str(self.log.with_name("modules"))
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        own = {"PYTHONPATH": path, "HF_MODULES_CACHE": modules, "OMP_NUM_THREADS": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                list(map(str, command)), env={**os.environ, **own}, stdout=log, stderr=log
            )
        try:
            self.wait_until_ready()
            yield self
        finally:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(STOP_SECONDS)
            finally:
                self.process.kill()

    def wait_until_ready(self):
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if httpx2.get(f"http://127.0.0.1:{self.port}/health").status_code == 200:
                    return
            except httpx2.TransportError:
                time.sleep(0.1)
        pytest.fail(f"the server did not start:\n{self.log.read_text()}")

    def chat(self, messages, **options):
        create = self.client.chat.completions.create
        return create(**{"model": str(self.folder), "messages": messages, **options})

    def complete(self, prompt, *, generation_config=None, **options):
        body = {} if generation_config is None else {"generation_config": generation_config}
        body |= {name: options.pop(name) for name in ("seed",) if name in options}
        options = {"model": str(self.folder), "prompt": prompt, **options}
        return self.client.completions.create(**options, extra_body=body)

    def regular(self, inputs, **options):
        """Return the text and the number of new tokens of regular generation."""
        output = self.base.generate(**inputs, tokenizer=self.tokenizer, **options)
        tokens = output[0, inputs["input_ids"].shape[1] :]
        return self.tokenizer.decode(tokens, skip_special_tokens=True), len(tokens)

    def template(self, messages):
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    out = export_server(assets()["base"], folder / "served", heads=assets()["eagle3"], check=False)
    with Server(out.folder, folder / "log").running() as running:
        yield running


@pytest.mark.parametrize("streams", [False, True])
def test_chats_are_answered_with_the_text_and_counts_of_regular_generation(server, streams):
    for messages, limit in zip(load_prompts("sql_dev", limit=2), (64, 8), strict=True):
        inputs = server.template(messages)
        text, length = server.regular(inputs, max_new_tokens=limit)
        if streams:
            chunks = list(server.chat(messages, max_tokens=limit, stream=True))
            found = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason, usage = chunks[-1].choices[0].finish_reason, chunks[-1].usage
        else:
            answer = server.chat(messages, max_tokens=limit)
            found, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
            usage = answer.usage
        assert found == text
        assert reason == ("length" if limit == 8 else "stop")
        assert (usage.prompt_tokens, usage.completion_tokens) == (
            inputs["input_ids"].shape[1],
            length,
        )
    assert "EagleProposer drafts; verification: tree attention" in server.log.read_text()


def test_sampling_and_stop_strings_give_the_text_of_regular_generation(server):
    inputs = server.tokenizer("SELECT", return_tensors="pt")
    sampling = {"do_sample": True, "temperature": 0.8, "top_k": 20}
    torch.manual_seed(3)
    text, _ = server.regular(inputs, max_new_tokens=MAX_TOKENS, **sampling)
    config = json.dumps(sampling)
    for _ in range(2):
        found = server.complete("SELECT", max_tokens=MAX_TOKENS, seed=3, generation_config=config)
        assert found.choices[0].text == text
    text, _ = server.regular(inputs, max_new_tokens=MAX_TOKENS, stop_strings=["FROM"])
    assert "FROM" in text
    assert server.complete("SELECT", max_tokens=MAX_TOKENS, stop=["FROM"]).choices[0].text == text


def test_two_clients_at_once_get_their_own_answers(server):
    prompts = load_prompts("sql_dev", limit=4)
    expected = [
        server.regular(server.template(messages), max_new_tokens=MAX_TOKENS)[0]
        for messages in prompts
    ]

    def ask(messages):
        chunks = list(server.chat(messages, max_tokens=MAX_TOKENS, stream=True))
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with ThreadPoolExecutor(2) as clients:
        assert list(clients.map(ask, prompts)) == expected


def test_client_that_leaves_a_stream_frees_the_model(server):
    endless = json.dumps({"eos_token_id": None, "max_new_tokens": 1900})
    stream = server.complete("SELECT", stream=True, generation_config=endless)
    next(iter(stream))
    stream.close()
    start = time.monotonic()
    server.complete("SELECT", max_tokens=1)
    left = time.monotonic() - start
    start = time.monotonic()
    server.complete("SELECT", generation_config=endless)
    assert left < (time.monotonic() - start) / 2


def test_wrong_requests_get_their_message_and_the_server_goes_on(server):
    sampling = json.dumps({"do_sample": True, "temperature": -1.0})
    wrong = [
        (("a " * 3000,), {}, "max_position_embeddings 2048"),
        (("",), {}, "at least one row and one token"),
        (("a",), {"generation_config": sampling}, "temperature"),
        (("a",), {"max_tokens": -4}, "max_new_tokens"),
    ]
    for arguments, options, words in wrong:
        with pytest.raises(openai.BadRequestError) as refused:
            server.complete(*arguments, **options)
        assert words in refused.value.body["detail"]
        with pytest.raises(openai.APIError) as broken:
            list(server.complete(*arguments, stream=True, **options))
        assert words in broken.value.body
    for path, body in (("chat/completions", {"messages": [{}]}), ("completions", {"x": 1})):
        answer = httpx2.post(f"http://127.0.0.1:{server.port}/v1/{path}", json=body)
        assert answer.status_code in (422, 500)
    assert server.complete("SELECT", max_tokens=2).usage.completion_tokens == 2


def test_reset_unloads_the_model_and_the_next_request_loads_it(server):
    before = server.complete("SELECT", max_tokens=MAX_TOKENS).choices[0].text
    assert httpx2.post(f"http://127.0.0.1:{server.port}/reset").status_code == 200
    assert server.complete("SELECT", max_tokens=MAX_TOKENS).choices[0].text == before
    assert server.log.read_text().count("EagleProposer drafts") == 2
