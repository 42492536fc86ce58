"""Measure how tau grows with the number of conversations that heads are trained on.

The base answers the conversations itself. Then heads are trained on the first of them, in several
amounts, and decode the dev prompts greedily, without pauses.

    PYTHONPATH=. python benchmarks/demo_model/amount.py conversations.jsonl --sizes 50 200 800
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything needed is bundled

import torch
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from benchmarks.decode.decode import load_model
from speclm import SpecModel
from speclm.bench import append_record, make_calls, setting_options
from speclm.bench.pairs import Spread
from speclm.bench.records import Record
from speclm.demo.bundle import assets, load_prompts
from speclm.stats import SpeculationStats
from speclm.training.dataset import load_examples


def run(*words: object) -> float:
    """Run a command of speclm; return its seconds."""
    start = perf_counter()
    subprocess.run([sys.executable, "-m", "speclm", *map(str, words)], check=True)
    return perf_counter() - start


def decoded_tau(base: PreTrainedModel, heads: Path, *, num_prompts: int) -> list[float]:
    """Return the tau of all calls together, and then that of each call."""
    calls = make_calls(
        load_prompts("sql_dev", limit=num_prompts),
        base,
        AutoTokenizer.from_pretrained(assets()["base"]),
        options={**setting_options("greedy"), "max_new_tokens": 128},
    )
    model = SpecModel.from_pretrained(base, heads, adaptive=False)
    parts = []
    for call in calls:
        model.generate(**call.arguments)
        assert model.last_speculation is not None
        parts.append(model.last_speculation)
    return [SpeculationStats.merge(parts).total.tau, *(part.tau for part in parts)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("conversations", type=Path, help='JSON lines with "messages"')
    parser.add_argument("--sizes", type=int, nargs="+", default=[50, 200, 800])
    parser.add_argument("--recipes", nargs="+", default=["medusa", "eagle3"])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--n", type=int, default=40, help="dev prompts to decode")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/amount.jsonl"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    base = load_model("base", dtype=torch.float32, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(assets()["base"])
    shared = ("--threads", options.threads, "--device", "cpu")
    with TemporaryDirectory() as name:
        folder = Path(name)
        lines = options.conversations.read_text().splitlines(keepends=True)
        (folder / "all.jsonl").write_text("".join(lines[: max(options.sizes)]))
        answers = folder / "answers.jsonl"
        given = ("--data", folder / "all.jsonl", "--out", answers, "--max-new-tokens", 128)
        run("data", "distill", *given, *shared)
        lines = answers.read_text().splitlines(keepends=True)
        for recipe in options.recipes:
            for size in options.sizes:
                data, heads = folder / f"{size}.jsonl", folder / f"{recipe}-{size}"
                data.write_text("".join(lines[:size]))
                given = ("--data", data, "--out", heads, "--epochs", options.epochs)
                seconds = run("train", recipe, *given, *shared, "--training-arg", "save_steps=1.0")
                tau, *by_call = decoded_tau(base, heads, num_prompts=options.n)
                examples = load_examples(data, tokenizer)
                num_tokens = sum(sum(example["loss_mask"]) for example in examples)
                spread = Spread.of(by_call)
                record = Record(
                    benchmark="amount",
                    settings={
                        "method": recipe,
                        "num_conversations": len(lines[:size]),
                        "num_tokens": num_tokens,
                        "epochs": options.epochs,
                        "seconds": round(seconds, 1),
                        "setting": "greedy",
                        "prompts": "sql_dev",
                    },
                    unit="tokens per target forward",
                    n=len(by_call),
                    median=spread.median,
                    lower_quartile=spread.lower_quartile,
                    upper_quartile=spread.upper_quartile,
                    promises_identity=False,  # outputs are not compared here
                    tau=tau,
                )
                append_record(options.out, record)
                print(f"{recipe} {size}: {num_tokens} tokens, {seconds:.0f} s, tau {tau:.2f}")


if __name__ == "__main__":
    main()
