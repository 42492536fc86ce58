"""Measure what a round and a position cost next to the base's own forward, and the import.

python benchmarks/overhead.py
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything needed is bundled

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from speclm import SpecModel
from speclm.bench import SETTINGS, Spread, append_record, make_calls
from speclm.bench.overhead import import_seconds, round_overheads, walk_overheads
from speclm.bench.records import Record, time_record
from speclm.demo.bundle import assets, load_prompts
from speclm.methods.ngram.proposer import NgramProposer

NUM_NODES = 8
PROMPT_LENGTH = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/overhead.jsonl"))
    parser.add_argument("--rounds", type=int, default=200, help="rounds of each kind")
    parser.add_argument("--calls", type=int, default=50, help="prompts decoded both ways")
    parser.add_argument("--imports", type=int, default=5, help="processes that import speclm")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    base = AutoModelForCausalLM.from_pretrained(
        assets()["base"], dtype=getattr(torch, options.dtype)
    ).to(options.device)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(10, 4000, (options.batch, PROMPT_LENGTH), generator=generator)
    common = {"dtype": options.dtype, "device": options.device, "batch": options.batch}
    for shape in ("chain", "tree"):
        for setting in ("greedy", "t1.0"):
            seconds = round_overheads(
                base,
                prompt.to(options.device),
                shape=shape,
                num_nodes=NUM_NODES,
                num_rounds=options.rounds,
                options=dict(SETTINGS[setting]),
            )
            settings = {**common, "shape": shape, "num_nodes": NUM_NODES, "setting": setting}
            report(options.out, "round_overhead", seconds, settings)
    tokenizer = AutoTokenizer.from_pretrained(assets()["base"])
    for setting in ("greedy", "t1.0"):
        calls = make_calls(
            load_prompts("sql_dev", limit=options.calls),
            base,
            tokenizer,
            options={**SETTINGS[setting], "max_new_tokens": 128},
            batch=options.batch,
        )
        model = SpecModel(base, NgramProposer(), adaptive=False)
        walk_overheads(model, calls[:2])  # warms up
        settings = {**common, "setting": setting}
        report(options.out, "walk_overhead", walk_overheads(model, calls), settings)
    report(options.out, "import", import_seconds(num_runs=options.imports), {})


def report(path: Path, benchmark: str, seconds: list[float], settings: dict[str, object]) -> Record:
    """Print and record times."""
    spread = Spread.of([1e3 * value for value in seconds])
    record = time_record(spread, n=len(seconds), benchmark=benchmark, settings=settings)
    append_record(path, record)
    what = " ".join(str(settings[name]) for name in ("shape", "setting") if name in settings)
    print(
        f"{f'{benchmark} {what}'.strip()}: {spread.median:.2f} ms "
        f"[{spread.lower_quartile:.2f}, {spread.upper_quartile:.2f}], n {record.n}"
    )
    return record


if __name__ == "__main__":
    main()
