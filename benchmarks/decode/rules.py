"""Compare acceptance rules by tokens per target forward at temperature 1, with one drafter.

All methods draft the same number of nodes for the same prompts. The outputs of methods that promise
the tokens of regular generation are compared with it.

    python benchmarks/decode/rules.py --set both --n 50 --drafter draft
    python benchmarks/decode/rules.py --drafter eagle3 --heads my-heads
"""

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything needed is bundled

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging
from typing_extensions import override

from speclm import SpecModel
from speclm.acceptance import AcceptanceRule, Accepted, ExactRule, RejectionRule, TypicalRule
from speclm.bench.decoders import Call, make_calls, setting_options, until_end
from speclm.bench.divergence import explain
from speclm.bench.pairs import Spread
from speclm.bench.records import Record, append_record, is_recorded
from speclm.demo.bundle import assets, load_prompts
from speclm.drafting.interface import Draft, Prefill, Proposer
from speclm.methods.draft_model.proposer import DraftModelProposer
from speclm.methods.eagle.proposer import EagleProposer
from speclm.methods.medusa.proposer import MedusaProposer
from speclm.model.heads import load_proposer
from speclm.sampling import PositionNoise
from speclm.stats import SpeculationStats

MAX_NEW_TOKENS = {"sql": 128, "gsm8k": 256}
SETTING = "t1.0"
DRAFTERS = ("draft", "medusa", "eagle", "eagle3")
CHAIN_DEPTH = 5
TREE_NODES = (8, 16, 32)

# By the number of draft tokens of a tree: nodes expanded at a level, children of each, and levels.
TREE_SHAPES = {8: (3, 3, 6), 16: (4, 4, 8), 32: (8, 6, 8)}
# A static tree for Medusa heads: children at each depth.
MEDUSA_WIDTHS = {8: [3, 1, 1], 16: [4, 2, 1], 32: [6, 2, 2]}


class Uncoupled(Proposer):
    """Rank candidates by probability alone, without the noise."""

    def __init__(self, inner: Proposer) -> None:
        self.inner = inner
        self.config = inner.config
        self.features = inner.features  # type: ignore[misc]  # what the wrapped class declares

    @override
    def begin(self, prompt: Prefill) -> None:
        self.inner.begin(prompt)

    @override
    def propose(self, roots: Int[Tensor, " batch"], *, noise: PositionNoise | None) -> Draft:
        return self.inner.propose(roots, noise=None)

    @override
    def commit(self, accepted: Accepted) -> None:
        self.inner.commit(accepted)


@dataclass(frozen=True, slots=True)
class RuleMethod:
    """An acceptance rule with a way to draft."""

    name: str
    rule: AcceptanceRule
    is_coupled: bool = True

    @property
    def is_exact(self) -> bool:
        return isinstance(self.rule, ExactRule)


CHAIN_METHODS = (
    RuleMethod("top-k", ExactRule(), is_coupled=False),
    RuleMethod("coupled", ExactRule()),
    RuleMethod("multi-round", RejectionRule("multi_round")),
    RuleMethod("block", RejectionRule("block")),
    RuleMethod("typical (lossy)", TypicalRule()),
)
TREE_METHODS = (
    RuleMethod("top-k", ExactRule(), is_coupled=False),
    RuleMethod("coupled", ExactRule()),
    RuleMethod("multi-round", RejectionRule("multi_round")),
    RuleMethod("traversal", RejectionRule("traversal")),
    RuleMethod("typical (lossy)", TypicalRule()),
)


Maker = Callable[[int | None], Proposer]
"""Builds a proposer with that many draft tokens per round; with a chain for None."""


def whole_trees(num_nodes: int | None) -> dict[str, Any]:
    """Return options that make all drafts the same size: nothing is pruned as unlikely."""
    width, branches, depth = (1, 1, CHAIN_DEPTH) if num_nodes is None else TREE_SHAPES[num_nodes]
    return {
        "depth": depth,
        "num_draft_tokens": num_nodes or CHAIN_DEPTH,
        "width": width,
        "branches": branches,
        "min_probability": 0.0,
        "min_confidence": 0.0,
        "min_growing": 0.0,
    }


def shape_name(num_nodes: int | None) -> str:
    """Return nodes expanded at a level, children of each and levels."""
    options = whole_trees(num_nodes)
    return "x".join(str(options[name]) for name in ("width", "branches", "depth"))


def maker(drafter: str, base: PreTrainedModel, *, folder: Path | None = None) -> Maker:
    """Return the builder of a kind of proposers; `folder` holds folders of EAGLE heads."""
    if drafter == "draft":
        return draft_model_maker(base)
    if drafter == "medusa":
        return medusa_maker(base, assets()["medusa"])
    return eagle_maker(base, assets()[drafter] if folder is None else folder / drafter)


def draft_model_maker(base: PreTrainedModel) -> Maker:
    draft = AutoModelForCausalLM.from_pretrained(assets()["draft"], dtype=base.dtype)
    return lambda num_nodes: DraftModelProposer(draft, target=base, **whole_trees(num_nodes))


def eagle_maker(base: PreTrainedModel, folder: Path) -> Maker:
    loaded = load_proposer(folder, base, heads_kwargs={}, num_draft_tokens=None)
    assert isinstance(loaded, EagleProposer)
    heads = loaded.heads
    return lambda num_nodes: EagleProposer(heads, target=base, **whole_trees(num_nodes))


def medusa_maker(base: PreTrainedModel, folder: Path) -> Maker:
    from speclm.methods.medusa.checkpoint import read_medusa
    from speclm.methods.medusa.network import MedusaHeads, MedusaHeadsConfig

    stored = read_medusa(folder)
    config = MedusaHeadsConfig(
        hidden_size=stored.hidden_size,
        vocab_size=base.config.vocab_size,
        num_heads=stored.num_heads,
        num_layers=stored.num_layers,
        has_own_lm_head=stored.has_own_lm_head,
        has_bias=stored.has_bias,
    )
    heads = MedusaHeads(config, dtype=base.dtype)
    heads.load_state_dict(stored.stacked())

    def make(num_nodes: int | None) -> Proposer:
        tree = [1] * stored.num_heads if num_nodes is None else MEDUSA_WIDTHS[num_nodes]
        return MedusaProposer(heads, target=base, tree=tree, num_draft_tokens=num_nodes)

    return make


def run_method(
    base: PreTrainedModel, proposer: Proposer, method: RuleMethod, calls: Sequence[Call]
) -> tuple[list[SpeculationStats], list[list[list[int]]]]:
    """Return the counters and the new tokens of every call."""
    drafter = proposer if method.is_coupled else Uncoupled(proposer)
    model = SpecModel(base, drafter, adaptive=False)
    counters, outputs = [], []
    for call in calls:
        torch.manual_seed(call.seed)
        tokens = model.generate(**call.arguments, acceptance=method.rule)
        assert isinstance(tokens, Tensor)
        assert model.last_speculation is not None
        counters.append(model.last_speculation)
        new = tokens[:, call.input_ids.shape[1] :].tolist()
        outputs.append([until_end(row, call.eos_token_ids) for row in new])
    return counters, outputs


def plain_outputs(base: PreTrainedModel, calls: Sequence[Call]) -> list[list[list[int]]]:
    """Return regular generation's new tokens of every call."""
    outputs = []
    for call in calls:
        torch.manual_seed(call.seed)
        tokens = base.generate(**call.arguments)
        new = tokens[:, call.input_ids.shape[1] :].tolist()
        outputs.append([until_end(row, call.eos_token_ids) for row in new])
    return outputs


def measure(
    base: PreTrainedModel,
    make: Maker,
    calls: Sequence[Call],
    *,
    settings: dict[str, Any],
    path: Path,
) -> Iterator[Record]:
    """Measure every method on one set of prompts, and record what was not recorded yet."""
    plain: list[list[list[int]]] | None = None
    for num_nodes in (None, *TREE_NODES):
        for method in CHAIN_METHODS if num_nodes is None else TREE_METHODS:
            shape = "chain" if num_nodes is None else f"tree {num_nodes}"
            named = {**settings, "shape": shape, "method": method.name, "rule": method.rule.name}
            named["grown"] = shape_name(num_nodes)
            if is_recorded(path, benchmark="rules", settings=named):
                continue
            counters, outputs = run_method(base, make(num_nodes), method, calls)
            if method.is_exact and plain is None:
                plain = plain_outputs(base, calls)
            record = tau_record(
                base,
                calls,
                counters,
                outputs,
                plain=plain if method.is_exact else None,
                benchmark="rules",
                settings=named,
            )
            append_record(path, record)
            yield record


def tau_record(
    base: PreTrainedModel,
    calls: Sequence[Call],
    counters: Sequence[SpeculationStats],
    outputs: Sequence[list[list[int]]],
    *,
    plain: Sequence[list[list[int]]] | None,
    benchmark: str,
    settings: dict[str, Any],
) -> Record:
    """Return the record of tau; the outputs have to be those of `plain`, if given."""
    num_identical, divergences = None, []
    if plain is not None:
        num_identical = sum(o == p for o, p in zip(outputs, plain, strict=True))
        divergences = [
            found
            for index, call in enumerate(calls)
            for found in explain(base, call, index=index, plain=plain[index], other=outputs[index])
        ]
    taus = Spread.of([stats.tau for stats in counters])
    total = SpeculationStats.merge(counters)
    return Record(
        benchmark=benchmark,
        settings=settings,
        unit="tokens per target forward",
        n=len(calls),
        median=taus.median,
        lower_quartile=taus.lower_quartile,
        upper_quartile=taus.upper_quartile,
        promises_identity=plain is not None,
        num_identical=num_identical,
        divergences=divergences,
        tau=total.tau,
        acceptance_by_depth=total.acceptance_by_depth,
        milliseconds_per_round=total.milliseconds_per_round,
        fallbacks=total.fallbacks,
    )


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", choices=("sql", "gsm8k", "both"), default="both")
    parser.add_argument("--n", type=int, default=50, help="prompts of each set")
    parser.add_argument("--drafter", choices=DRAFTERS, default="draft")
    parser.add_argument("--heads", type=Path, help="folder of folders eagle and eagle3 of heads")
    parser.add_argument("--max-new-tokens", type=int, help="instead of 128 and 256")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/rules.jsonl"))
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(arguments)


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    options = parse_arguments()
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    base = AutoModelForCausalLM.from_pretrained(assets()["base"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(assets()["base"])
    make = maker(options.drafter, base, folder=options.heads)
    table = Table("prompts", "shape", "rule", "tau", "median [quartiles]", "identical")
    console = Console()
    for name in ("sql", "gsm8k") if options.set == "both" else (options.set,):
        length = options.max_new_tokens or MAX_NEW_TOKENS[name]
        calls = make_calls(
            load_prompts(f"{name}_dev", limit=options.n),
            base,
            tokenizer,
            options={**setting_options(SETTING), "max_new_tokens": length},
        )
        settings = {
            "prompts": f"{name}_dev",
            "num_prompts": len(calls),
            "setting": SETTING,
            "drafter": options.drafter,
            "max_new_tokens": length,
            "dtype": "float32",
            "device": base.device.type,
        }
        for record in measure(base, make, calls, settings=settings, path=options.out):
            spread = (
                f"{record.median:.2f} [{record.lower_quartile:.2f}, {record.upper_quartile:.2f}]"
            )
            same = "" if record.num_identical is None else f"{record.num_identical}/{record.n}"
            table.add_row(
                settings["prompts"],
                record.settings["shape"],
                record.settings["method"],
                f"{record.tau:.2f}",
                spread,
                same,
            )
            console.print(
                f"{settings['prompts']} {record.settings['shape']:8s} "
                f"{record.settings['method']:16s} tau {record.tau:.2f} {same}",
                highlight=False,
            )
    console.print(table)


if __name__ == "__main__":
    main()
