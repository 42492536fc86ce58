"""Compare planned trees with a chain of four and calibrated static trees of 8, 16 and 32 nodes.

Trees are calibrated on the tuning prompts, and planned trees learn on them; figures are of the dev
prompts. Every call is run by regular generation and with all trees, in rotating order.

    python benchmarks/decode/auto_trees.py --heads medusa --n 32 --batch 1,4,16
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything needed is bundled

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from speclm.adaptive.acceptance_rates import RankRecorder, calibrated_paths
from speclm.bench import (
    Call,
    Comparison,
    Decoder,
    append_record,
    compare,
    make_calls,
    plain_decoder,
    setting_options,
)
from speclm.bench.records import decode_record
from speclm.demo.bundle import assets, load_prompts
from speclm.drafting.interface import Proposer
from speclm.model import SpecModel
from speclm.model.heads import load_proposer
from speclm.tree.plan import TreePlan

CHAIN = 4
SIZES = (8, 16, 32)
MIN_SHARE = 0.95  # of the best fixed tree's speed that planned trees have to reach


@dataclass(slots=True)
class Trees:
    """The trees that one proposer is measured with, by name."""

    base: PreTrainedModel
    proposer: Proposer
    fixed: dict[str, TreePlan] = field(default_factory=dict)

    def methods(self) -> list[Decoder]:
        named = {"own": None, **self.fixed, "auto": "auto"}
        return [self._method(name, tree) for name, tree in named.items()]

    def calibrate(self, calls: Sequence[Call]) -> None:
        """Calibrate static trees, for proposers that take them."""
        if not self.proposer.fills_static_trees:
            sizes = (CHAIN, *SIZES)
            self.fixed = {f"bound-{size}": TreePlan(min(size, 16), size) for size in sizes}
            return
        recorder = RankRecorder(self.proposer)
        model = SpecModel(self.base, recorder, adaptive=False)
        for call in calls:
            torch.manual_seed(call.seed)
            model.generate(**call.arguments)
        chain = tuple((0,) * depth for depth in range(1, CHAIN + 1))
        self.fixed = {f"chain-{CHAIN}": TreePlan.of(chain)}
        for size in SIZES:
            choices = calibrated_paths(recorder.acceptance, num_nodes=size)
            self.fixed[f"static-{size}"] = TreePlan.of(choices)

    def _method(self, name: str, tree: TreePlan | str | None) -> Decoder:
        model = SpecModel(self.base, self.proposer, tree=tree)

        def generate(call: Call) -> Tensor:
            output = model.generate(**call.arguments)
            assert isinstance(output, Tensor)
            return output

        return Decoder(name, generate, lambda: model.last_speculation, promises_identity=True)


def report(comparisons: Sequence[Comparison], batch: int) -> bool:
    """Print all speeds; return whether planned trees are close to the best fixed tree."""
    speeds = {comparison.method: comparison.tokens_per_second for comparison in comparisons}
    best = max(speed for name, speed in speeds.items() if name not in {"own", "auto"})
    for comparison in comparisons:
        stats = comparison.stats
        assert stats is not None
        print(
            f"batch {batch:2d} {comparison.method:10s} {speeds[comparison.method]:7.0f} tokens/s, "
            f"{speeds[comparison.method] / best:.3f} of the best fixed, ratio "
            f"{comparison.ratio.median:.2f}, tau {stats.tau:.2f}, "
            f"identical {comparison.num_identical}/{len(comparison.pairs)}"
        )
    return speeds["auto"] >= MIN_SHARE * best


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", default="medusa", help="a bundled asset, ngram, folder or id")
    parser.add_argument("--set", choices=("sql", "gsm8k"), default="sql")
    parser.add_argument("--setting", choices=("greedy", "t0.7", "t1.0"), default="greedy")
    parser.add_argument("--n", type=int, default=32, help="prompts to report on")
    parser.add_argument("--tune-n", type=int, default=32, help="prompts to calibrate on")
    parser.add_argument("--batch", default="1,4,16")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/auto_trees.jsonl"))
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    dtype = getattr(torch, options.dtype)
    base = AutoModelForCausalLM.from_pretrained(assets()["base"], dtype=dtype).to(options.device)
    tokenizer = AutoTokenizer.from_pretrained(assets()["base"])
    heads = assets().get(options.heads, options.heads)
    proposer = load_proposer(heads, base, heads_kwargs=None, num_draft_tokens=None)
    assert proposer is not None
    generation = {**setting_options(options.setting), "max_new_tokens": options.max_new_tokens}

    def calls_of(prompts: str, limit: int, batch: int) -> list[Call]:
        texts = load_prompts(f"{options.set}_{prompts}", limit=limit)
        return make_calls(texts, base, tokenizer, options=generation, batch=batch)

    trees = Trees(base, proposer)
    trees.calibrate(calls_of("tune", options.tune_n, 1))
    is_close = True
    for batch in map(int, options.batch.split(",")):
        methods = trees.methods()
        for call in calls_of("tune", options.tune_n, batch):
            methods[-1].run(call)  # planned trees learn
        for method in methods:  # and all warm up
            method.run(calls_of("tune", batch, batch)[0])
        dev = calls_of("dev", options.n, batch)
        comparisons = compare(plain_decoder(base), methods, dev, base=base, num_warmup=0)
        for comparison in comparisons:
            tree = trees.fixed.get(comparison.method)
            settings = {
                "heads": options.heads,
                "prompts": f"{options.set}_dev",
                "num_prompts": options.n,
                "setting": options.setting,
                "batch": batch,
                "max_new_tokens": options.max_new_tokens,
                "dtype": options.dtype,
                "device": options.device,
                "num_threads": options.threads,
                "method": comparison.method,
                "num_nodes": None if tree is None else tree.num_draft_tokens,
            }
            record = decode_record(comparison, benchmark="auto_trees", settings=settings)
            append_record(options.out, record)
        is_close = report(comparisons, batch) and is_close
    if not is_close:
        raise SystemExit(f"planned trees reach less than {MIN_SHARE} of the best fixed tree")


if __name__ == "__main__":
    main()
