"""``speclm demo``: shows real speculation with the bundled models, offline."""

from typing import Any

import torch
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from speclm.bench import (
    Call,
    Cell,
    Decoder,
    Measured,
    make_calls,
    measure_grid,
    setting_options,
    speculative_decoder,
)
from speclm.cli._display import (
    ACCEPTED_STYLE,
    add_comparison,
    coloured,
    comparison_table,
    progress,
)
from speclm.cli._models import load
from speclm.cli._options import DemoOptions, ModelOptions
from speclm.demo.bundle import assets, load_prompts
from speclm.model.heads import load_proposer

SETTINGS = ("greedy", "t1.0")
MAX_NEW_TOKENS = {"sql": 64, "gsm8k": 96}


def demo(options: DemoOptions) -> None:
    """Compare the bundled methods with regular generation on bundled prompts."""
    num_prompts = options.num_prompts
    console = Console()
    loaded = load(ModelOptions(device="cpu", threads=options.threads))
    methods = _methods(loaded.base)
    console.print(
        f"A {_millions(loaded.base):.1f} M-parameter model answers {num_prompts} text-to-SQL and "
        f"{num_prompts} maths prompts, greedily and by sampling at temperature 1.\n"
        "Each run is paired with regular generation under the same seed; ratios are medians.\n"
        "tau: tokens per forward of the target; kept %: acceptance rate at depth 1, 2 and 3.\n"
    )
    cells = _cells(
        loaded.base, loaded.tokenizer, num_prompts=num_prompts, tune=options.tuning_prompts
    )
    measured: list[Measured] = []
    table = comparison_table(("set", "setting"))
    num_pairs = sum(len(cell.calls) for cell in cells) * len(methods)
    with progress("decoding", total=num_pairs) as count:
        for result in measure_grid(
            cells, methods, base=loaded.base, benchmark="demo", on_pair=count
        ):
            keys = (result.cell.settings["set"], result.cell.settings["setting"])
            add_comparison(table, keys, result.comparison)
            measured.append(result)
    console.print(table)
    _print_samples(console, measured, loaded.tokenizer)
    comparisons = [result.comparison for result in measured]
    if all(found.num_identical == len(found.pairs) for found in comparisons):
        console.print("identical: yes", style="green")
        return
    console.print("identical: NO", style="bold red")
    raise typer.Exit(1)


def _methods(base: PreTrainedModel) -> list[Decoder]:
    heads: dict[str, Any] = {
        "lookup": "lookup",
        "draft": AutoModelForCausalLM.from_pretrained(assets()["draft"], dtype=torch.float32),
        **{name: assets()[name] for name in ("medusa", "eagle", "eagle3", "block")},
    }
    proposers = {
        name: load_proposer(given, base, heads_kwargs={}, num_draft_tokens=None)
        for name, given in heads.items()
    }
    return [speculative_decoder(name, base, proposer) for name, proposer in proposers.items()]


def _cells(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, num_prompts: int, tune: bool
) -> list[Cell]:
    cells: list[Cell] = []
    for name, max_new_tokens in MAX_NEW_TOKENS.items():
        conversations = load_prompts(f"{name}_{'tune' if tune else 'dev'}", limit=num_prompts)
        for setting in SETTINGS:
            options = {**setting_options(setting), "max_new_tokens": max_new_tokens}
            calls: list[Call] = make_calls(conversations, base, tokenizer, options=options)
            cells.append(Cell(calls, {"set": name, "setting": setting}))
    return cells


def _print_samples(
    console: Console, measured: list[Measured], tokenizer: PreTrainedTokenizerBase
) -> None:
    console.print(f"\nAnswers; [{ACCEPTED_STYLE}]coloured[/] tokens were drafted and accepted.\n")
    for result in measured:
        settings = result.cell.settings
        if settings["setting"] != "greedy" or result.comparison.method != "draft":
            continue
        outcome = result.comparison.pairs[0].method
        if outcome.stats is not None and outcome.stats.rows:
            console.print(f"[dim]{settings['set']}[/]")
            console.print(coloured(outcome.tokens[0], outcome.stats.rows[0], tokenizer))
            console.print()


def _millions(model: PreTrainedModel) -> float:
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6
