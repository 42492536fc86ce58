"""Measure methods on the bundled questions of Spec-Bench, by category, and append the records.

Questions of several turns are answered turn by turn, with the cache kept. The categories take
turns, so that each is measured alike if the time ends early.

    python benchmarks/decode/prompt_sets.py
    python benchmarks/report/render.py  # writes the table
"""

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything needed is bundled

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from benchmarks.decode.decode import METHODS, build_methods, load_model
from speclm.bench import append_record, compare, make_dialogues, plain_decoder, setting_options
from speclm.bench.records import describe_commit, group_records
from speclm.demo.bundle import assets, load_questions
from speclm.files.questions import Question

UNIT = "times regular generation, with times of calls"


def in_turns(questions: Sequence[Question]) -> list[Question]:
    """Return the first question of each group, then the second ones, and so on."""
    seen = Counter[str]()
    ranks = {}
    for question in questions:
        ranks[question.question_id] = seen[question.group]
        seen[question.group] += 1
    return sorted(questions, key=lambda question: ranks[question.question_id])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", choices=("spec-bench", "mt-bench"), default="spec-bench")
    parser.add_argument("--n", type=int, help="number of questions; all by default")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["lookup", "eagle3"])
    parser.add_argument("--setting", default="greedy")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=3.5, help="begin no question afterwards")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/prompt_sets.jsonl"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    if describe_commit().is_dirty:
        print("the library differs from its commit: do not publish these records")
    base = load_model("base", dtype=torch.float32, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(assets()["base"])
    arguments_of_generate = {
        **setting_options(options.setting),
        "max_new_tokens": options.max_new_tokens,
    }
    questions = in_turns(load_questions(options.set))[: options.n]
    tasks = make_dialogues(questions, base, tokenizer, options=arguments_of_generate)
    methods = build_methods(options.methods, base, lookup_tokens=10)
    comparisons = compare(
        plain_decoder(base), methods, tasks, base=base, max_seconds=60 * options.minutes
    )
    shared = {
        "prompts": options.set,
        "setting": options.setting,
        "batch": 1,
        "max_new_tokens": options.max_new_tokens,
        "dtype": "float32",
        "device": "cpu",
        "num_threads": options.threads,
    }
    for comparison in comparisons:
        settings = {**shared, "method": comparison.method}
        for record in group_records(comparison, benchmark="prompt_sets", settings=settings):
            append_record(options.out, replace(record, unit=UNIT))
            print(
                f"{record.settings['category']:15s} {comparison.method:10s} n {record.n:3d}, "
                f"tau {record.tau or 1:.2f}, ratio {record.median:.2f}, "
                f"identical {record.num_identical}/{record.n}",
                flush=True,
            )


if __name__ == "__main__":
    main()
