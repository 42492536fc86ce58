"""Measure tokens per target forward of every drafter, at equal numbers of nodes.

When the target samples, candidates are ranked in two ways: by probability alone, and with the noise
of their position. Every output has to be that of regular generation.

    python benchmarks/trees/tau.py --set both --n 50
    python benchmarks/trees/tau.py --drafters eagle3 --heads my-heads --nodes 8
"""

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything needed is bundled

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from benchmarks.decode.rules import (
    DRAFTERS,
    MAX_NEW_TOKENS,
    TREE_NODES,
    Maker,
    RuleMethod,
    maker,
    plain_outputs,
    run_method,
    shape_name,
    tau_record,
)
from speclm.acceptance import ExactRule
from speclm.bench.decoders import Call, make_calls, setting_options
from speclm.bench.records import Record, append_record, is_recorded
from speclm.demo.bundle import assets, load_prompts

SETTINGS = ("greedy", "t1.0")
TOP_K = RuleMethod("top-k", ExactRule(), is_coupled=False)
COUPLED = RuleMethod("coupled", ExactRule())


def measure(
    base: PreTrainedModel,
    makers: Mapping[str, Maker],
    calls: Sequence[Call],
    *,
    nodes: Sequence[int],
    settings: dict[str, Any],
    path: Path,
) -> Iterator[Record]:
    """Measure every drafter on one set of prompts, and record what was not recorded yet."""
    plain: list[list[list[int]]] | None = None
    rankings = (TOP_K,) if settings["setting"] == "greedy" else (TOP_K, COUPLED)
    for num_nodes in nodes:
        for drafter, make in makers.items():
            for method in rankings:
                named = {
                    **settings,
                    "num_nodes": num_nodes,
                    "drafter": drafter,
                    "method": method.name,
                }
                named["grown"] = shape_name(num_nodes)
                if is_recorded(path, benchmark="tau", settings=named):
                    continue
                plain = plain_outputs(base, calls) if plain is None else plain
                counters, outputs = run_method(base, make(num_nodes), method, calls)
                record = tau_record(
                    base, calls, counters, outputs, plain=plain, benchmark="tau", settings=named
                )
                append_record(path, record)
                yield record


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", choices=("sql", "gsm8k", "both"), default="both")
    parser.add_argument("--n", type=int, default=50, help="prompts of each set")
    parser.add_argument("--drafters", nargs="+", choices=DRAFTERS, default=DRAFTERS)
    parser.add_argument("--heads", type=Path, help="folder of folders eagle and eagle3 of heads")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS)
    parser.add_argument("--nodes", nargs="+", type=int, choices=TREE_NODES, default=TREE_NODES)
    parser.add_argument("--max-new-tokens", type=int, help="instead of 128 and 256")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/tau.jsonl"))
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(arguments)


def main() -> None:
    from rich.console import Console

    options = parse_arguments()
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    base = AutoModelForCausalLM.from_pretrained(assets()["base"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(assets()["base"])
    makers = {name: maker(name, base, folder=options.heads) for name in options.drafters}
    console = Console()
    for name in ("sql", "gsm8k") if options.set == "both" else (options.set,):
        length = options.max_new_tokens or MAX_NEW_TOKENS[name]
        conversations = load_prompts(f"{name}_dev", limit=options.n)
        for setting in options.settings:
            chosen = {**setting_options(setting), "max_new_tokens": length}
            calls = make_calls(conversations, base, tokenizer, options=chosen)
            settings = {
                "prompts": f"{name}_dev",
                "num_prompts": len(calls),
                "setting": setting,
                "max_new_tokens": length,
                "dtype": "float32",
                "device": base.device.type,
            }
            for record in measure(
                base, makers, calls, nodes=options.nodes, settings=settings, path=options.out
            ):
                found = record.settings
                console.print(
                    f"{found['prompts']:9s} {setting:6s} {found['num_nodes']:2d} nodes "
                    f"{found['drafter']:6s} {found['method']:7s} tau {record.tau:.2f} "
                    f"{record.num_identical}/{record.n}",
                    highlight=False,
                )


if __name__ == "__main__":
    main()
