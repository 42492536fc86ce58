"""Compare `transformers serve` with and without drafts, and both with calls in process.

python benchmarks/serving/serving.py
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything needed is bundled

import httpx2
import openai
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from speclm import SpecModel
from speclm.bench import Record, Spread, append_record
from speclm.demo.bundle import assets, load_prompts
from speclm.errors import MeasurementError
from speclm.serving import export_server

ROOT = Path(__file__).parents[2]
START_SECONDS = 120
POLL_SECONDS = 0.1
NUM_WARM_UP = 2


@contextmanager
def serving(folder: Path) -> Iterator[Callable[..., Any]]:
    """Serve a folder in a process with one thread; yield what asks for a chat completion."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", folder, "--device", "cpu"]
    command += ["--trust-remote-code", "--dtype", "float32", "--host", "127.0.0.1"]
    process = subprocess.Popen(
        [*map(str, command), "--port", str(port)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    try:
        for _ in range(int(START_SECONDS / POLL_SECONDS)):
            time.sleep(POLL_SECONDS)
            try:
                httpx2.get(f"http://127.0.0.1:{port}/health")
                break
            except httpx2.TransportError:
                if process.poll() is not None:
                    raise
        yield lambda **options: client.chat.completions.create(model=str(folder), **options)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def timed(ask: Callable[[], str]) -> tuple[float, str]:
    start = perf_counter()
    text = ask()
    return perf_counter() - start, text


def first_text(chunks: Any) -> str:
    """Return the first text of a stream, and read the rest of it after the clock has stopped."""
    return next(text for chunk in chunks if (text := chunk.choices[0].delta.content))


class Ways:
    """The four ways to answer a chat, whose texts must be equal."""

    def __init__(self, servers: dict[str, Callable[..., Any]], *, limit: int) -> None:
        folder = assets()["base"]
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.spec = SpecModel.from_pretrained(self.base, assets()["eagle3"])
        self.servers, self.limit = servers, limit

    def in_process(self, generate: Callable[..., Any], messages: Any) -> str:
        inputs = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = generate(**inputs, max_new_tokens=self.limit)
        tokens = output[0, inputs["input_ids"].shape[1] :]
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def whole(self, name: str, messages: Any) -> str:
        answer = self.servers[name](messages=messages, max_tokens=self.limit)
        return str(answer.choices[0].message.content)

    def seconds(self, messages: Any, *, backwards: bool) -> dict[str, float]:
        """Return the seconds of all ways, run one after the other.

        Raises:
            MeasurementError: If the texts differ.
        """
        ways: dict[str, Callable[[], str]] = {
            "process, plain": lambda: self.in_process(self.base.generate, messages),
            "process": lambda: self.in_process(self.spec.generate, messages),
            "server, plain": lambda: self.whole("plain", messages),
            "server": lambda: self.whole("served", messages),
        }
        names = list(reversed(ways)) if backwards else list(ways)
        found = {name: timed(ways[name]) for name in names}
        if len({text for _, text in found.values()}) > 1:
            raise MeasurementError(f"the ways gave different texts: {found!r}")
        return {name: seconds for name, (seconds, _) in found.items()}

    def first_seconds(self, messages: Any, *, backwards: bool) -> dict[str, float]:
        """Return the seconds to the first text of a stream, of both servers."""
        found = {}
        for name in ("served", "plain") if backwards else ("plain", "served"):
            start = perf_counter()
            stream = self.servers[name](messages=messages, max_tokens=self.limit, stream=True)
            first_text(stream)
            found[name] = perf_counter() - start
            for _ in stream:
                pass
        return found


def record(values: list[float], *, unit: str, settings: dict[str, Any], out: Path) -> None:
    """Print and record a sample."""
    spread = Spread.of(values)
    found = Record(
        benchmark="serving",
        settings=settings,
        unit=unit,
        n=len(values),
        median=spread.median,
        lower_quartile=spread.lower_quartile,
        upper_quartile=spread.upper_quartile,
    )
    append_record(out, found)
    print(
        f"{settings['what']}, {settings['prompts']}: {spread.median:.2f} {unit} "
        f"[{spread.lower_quartile:.2f}, {spread.upper_quartile:.2f}], n {found.n}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serving.jsonl"))
    parser.add_argument("--prompts", type=int, default=20, help="prompts of each set")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    with ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory())) / "served"
        export_server(assets()["base"], folder, heads=assets()["eagle3"], check=False)
        folders = {"plain": assets()["base"], "served": folder}
        servers = {name: running.enter_context(serving(each)) for name, each in folders.items()}
        ways = Ways(servers, limit=options.max_new_tokens)
        for prompts in ("sql_dev", "gsm8k_dev"):
            chats = load_prompts(prompts, limit=options.prompts)
            for messages in chats[:NUM_WARM_UP]:
                ways.seconds(messages, backwards=False)
            found = [ways.seconds(chat, backwards=i % 2 == 1) for i, chat in enumerate(chats)]
            for where in ("process", "server"):
                ratios = [each[f"{where}, plain"] / each[where] for each in found]
                settings = {"what": f"speed-up, {where}", "prompts": prompts, "heads": "eagle3"}
                record(ratios, unit="ratio", settings=settings, out=options.out)
            firsts = [
                ways.first_seconds(chat, backwards=i % 2 == 1) for i, chat in enumerate(chats)
            ]
            for name in ("plain", "served"):
                settings = {"what": f"first text, {name}", "prompts": prompts, "heads": "eagle3"}
                values = [1e3 * each[name] for each in firsts]
                record(values, unit="ms", settings=settings, out=options.out)


if __name__ == "__main__":
    main()
