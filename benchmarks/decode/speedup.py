"""Measure the table and the picture of the README, in one run with the bundled models.

All methods run every call, next to regular generation and in rotating order, until the time of a
cell is up. The file of records is written anew, so that it holds one run of one commit.

    python benchmarks/decode/speedup.py
    python benchmarks/report/render.py  # writes the table and the picture
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything needed is bundled

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from benchmarks.decode.decode import build_cells, build_methods, describe, load_model
from speclm.bench import Cell, Decoder, Measured, append_record, compare, plain_decoder
from speclm.bench.records import decode_record, describe_commit

METHODS = ("prompt_lookup", "ngram", "lookup", "draft", "medusa", "eagle", "eagle3", "block")
PLANNED = "eagle3"
NUM_WARMUP = 4
WARMUP_SHARE = 0.2  # of the time of a cell, at most


def all_methods(base: PreTrainedModel) -> list[Decoder]:
    """Return every method of the table; one of them a second time, with planned trees."""
    methods = build_methods(METHODS, base, lookup_tokens=10)
    (planned,) = build_methods([PLANNED], base, lookup_tokens=10, tree="auto")
    return [*methods, replace(planned, name=f"{PLANNED} auto")]


def measure(
    base: PreTrainedModel,
    methods: Sequence[Decoder],
    cell: Cell,
    warmup: Cell,
    *,
    until: float,
    path: Path,
) -> None:
    """Measure a cell until a time on the monotonic clock, and append its records."""
    plain, start = plain_decoder(base), monotonic()
    for call in warmup.calls:
        if monotonic() - start > WARMUP_SHARE * (until - start):
            break
        for method in (plain, *methods):
            method.run(call)
    comparisons = compare(
        plain, methods, cell.calls, base=base, num_warmup=0, max_seconds=until - monotonic()
    )
    for comparison in comparisons:
        settings = {**cell.settings, "num_prompts": len(comparison.pairs)}
        settings["method"] = comparison.method
        record = decode_record(comparison, benchmark="speedup", settings=settings)
        append_record(path, record)
        print(describe(Measured(cell, comparison, record)), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=17.0, help="for all cells together")
    parser.add_argument("--n", type=int, default=100, help="at most so many prompts of each set")
    parser.add_argument("--sets", nargs="+", choices=("sql", "gsm8k"), default=["sql", "gsm8k"])
    parser.add_argument("--settings", nargs="+", default=["greedy", "t1.0"])
    parser.add_argument("--max-new-tokens", type=int, help="instead of 128 and 256")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/speedup.jsonl"))
    options = parser.parse_args(arguments)
    deadline = monotonic() + 60 * options.minutes
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    if describe_commit().is_dirty:
        print("the library differs from its commit: do not publish these records")
    base = load_model("base", dtype=torch.float32, device="cpu")
    methods = all_methods(base)
    options.out.unlink(missing_ok=True)
    chosen = {"sets": options.sets, "settings": options.settings, "batches": (1,)}
    chosen["max_new_tokens"] = options.max_new_tokens
    cells = build_cells(base, num_prompts=options.n, **chosen)
    warmups = build_cells(base, num_prompts=min(options.n, NUM_WARMUP), tune=True, **chosen)
    for index, (cell, warmup) in enumerate(zip(cells, warmups, strict=True)):
        share = (deadline - monotonic()) / (len(cells) - index)
        until = monotonic() + share
        measure(base, methods, cell, warmup, until=until, path=options.out)


if __name__ == "__main__":
    main()
