"""``speclm tune``: finds the draft trees with the most tokens per second on this machine."""

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from speclm.adaptive.acceptance_rates import (
    RankAcceptance,
    RankRecorder,
    calibrated_paths,
    expected_tau,
)
from speclm.adaptive.memory import Memory
from speclm.adaptive.planner import RoundCosts
from speclm.bench import Call, make_calls, setting_options
from speclm.cli._display import progress
from speclm.cli._files import positive_numbers, prepare_file, read_prompts
from speclm.cli._models import Loaded, load_with_heads
from speclm.cli._options import TuneOptions
from speclm.demo.bundle import load_prompts
from speclm.errors import OptionError
from speclm.files.atomic import write_file
from speclm.model import SpecModel
from speclm.tree.static import RankPaths

_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48)


def tune(options: TuneOptions) -> None:
    """Measure draft trees of every size, and calibrate a static tree if the method ranks."""
    save = options.save
    if save is not None and save.suffix != ".json":
        raise OptionError(f"--save is {str(save)!r}, expected a file named *.json; rename it")
    given = read_prompts(options.prompts) if options.prompts else load_prompts("sql_tune")
    texts = given[: options.num_prompts]
    sizes = positive_numbers(options.batch)
    arguments = {**setting_options(options.setting), "max_new_tokens": options.max_new_tokens}
    loaded, console = load_with_heads(options), Console()
    proposer = loaded.spec.proposer
    if proposer is None:
        raise OptionError("--heads is 'none', expected a method; drop it, or pass lookup")
    if save is not None and not proposer.fills_static_trees:
        raise OptionError(
            f"--save has nothing to write: {type(proposer).__name__} does not rank its candidates; "
            "drop it and use tree='auto'"
        )
    if save is not None:
        prepare_file("--save", save)
    for size in sizes:
        calls = make_calls(texts, loaded.base, loaded.tokenizer, options=arguments, batch=size)
        costs = _print_sizes(loaded, calls, size, console)
        if size == sizes[0] and proposer.fills_static_trees:
            tree, acceptance = _calibrate(loaded, calls, costs, options.num_draft_tokens)
            tau = expected_tau(acceptance, tree)
            console.print(_acceptance_table(acceptance))
            console.print(
                f"static tree of {len(tree)} nodes on {max(map(len, tree))} levels, "
                f"estimated tau {tau:.2f}",
                highlight=False,
            )
            if save is not None:
                _write(save, tree, tau, loaded, options.heads)
                console.print(f"written to {save}; use generate(tree={str(save)!r})", markup=False)


def _print_sizes(loaded: Loaded, calls: list[Call], batch: int, console: Console) -> RoundCosts:
    """Decode with large trees only, and print what smaller trees would give."""
    model = SpecModel(loaded.base, loaded.spec.proposer, adaptive=False, tree="auto")
    model.memory = Memory(explores_always=True)
    _run(model, calls)
    tuner = model.memory.last_tuner
    if tuner is None or not tuner.estimates():
        raise OptionError("nothing was drafted; pass more or longer prompts")
    estimates = tuner.estimates()
    best = max(estimates, key=lambda estimate: estimate.rate)
    table = Table(box=None, pad_edge=False, header_style="bold underline", title=f"batch {batch}")
    for name in (
        "nodes",
        "depth",
        "min probability",
        "confidence",
        "tau",
        "ms per round",
        "tokens/s",
        "",
    ):
        table.add_column(name, justify="right")
    for found in estimates:
        size = found.plan.num_draft_tokens
        if size in _SIZES or found is best:
            thresholds = (found.plan.min_probability, found.plan.min_confidence)
            table.add_row(
                str(size),
                str(found.plan.depth),
                *("" if value is None else f"{value:.2f}" for value in thresholds),
                f"{found.tau:.2f}",
                f"{1e3 * found.seconds:.2f}",
                f"{batch * found.rate:.0f}",
                "best" if found is best else "",
            )
    console.print(table)
    return tuner.costs


def _run(model: SpecModel, calls: list[Call]) -> None:
    with progress("decoding", total=len(calls)) as count:
        for call in calls:
            torch.manual_seed(call.seed)
            count(model.generate(**call.arguments))


def _calibrate(
    loaded: Loaded, calls: list[Call], costs: RoundCosts, num_nodes: int | None
) -> tuple[RankPaths, RankAcceptance]:
    """Return the static tree with the most tokens per second, or of a given size."""
    proposer = loaded.spec.proposer
    assert proposer is not None
    recorder = RankRecorder(proposer)
    model = SpecModel(loaded.base, recorder, adaptive=False)
    _run(model, calls)
    acceptance = recorder.acceptance
    trees = [
        calibrated_paths(acceptance, num_nodes=size)
        for size in ([num_nodes] if num_nodes else _SIZES)
    ]

    def rate(tree: RankPaths) -> float:
        depth = float(max(map(len, tree)))
        return expected_tau(acceptance, tree) / costs.round(len(tree), depth)

    return max(trees, key=rate), acceptance


def _acceptance_table(acceptance: RankAcceptance) -> Table:
    """Return how often each rank was accepted at each depth, given that its parent was."""
    table = Table(box=None, pad_edge=False, header_style="bold underline", title="accepted, %")
    table.add_column("depth", justify="right")
    for rank in range(max(map(len, acceptance))):
        table.add_column(f"rank {rank}", justify="right")
    for depth, shares in enumerate(acceptance, start=1):
        table.add_row(str(depth), *(f"{share:.1%}"[:-1] for share in shares))
    return table


def _write(path: Path, tree: RankPaths, tau: float, loaded: Loaded, heads: str | None) -> None:
    record: dict[str, Any] = {
        "tree": tree,
        "estimated_tau": round(tau, 3),
        "base": loaded.base.config.name_or_path,
        "heads": heads or "default",
    }
    try:
        write_file(path, json.dumps(record) + "\n")
    except OSError as error:
        raise OptionError(f"--save {str(path)!r} cannot be written ({error})") from error
