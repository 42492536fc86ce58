"""``speclm tune``: finds the draft trees with the most tokens per second on this machine."""

import json
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
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
from speclm.cli._files import (
    positive_numbers,
    prepare_file,
    read_prompts,
    require_folder_to_write,
)
from speclm.cli._models import Loaded, load_with_heads
from speclm.cli._options import TuneOptions
from speclm.demo.bundle import load_prompts
from speclm.drafting.heads_folder import CONFIG_NAME, read_choices, store_choices
from speclm.errors import OptionError
from speclm.files.atomic import write_file
from speclm.files.hub import path_exists
from speclm.files.weights import read_json
from speclm.methods.finding import find_heads
from speclm.model import SpecModel
from speclm.stats import SpeculationStats
from speclm.tree.static import RankPaths

_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48)
_SHORTLIST = 3  # static trees that are decoded
# Half are held out. Two equally fast trees differ in the same direction in all of five calls with a
# probability of 2 / 2**5 = 6%, and in fewer calls more often.
_MIN_CALLS = 10


@dataclass(frozen=True, slots=True)
class _Tried:
    """A tree, decoded on the prompts that it was not calibrated on.

    Args:
        paths: The static tree; None for the proposer's own settings.
        tau: Tokens per row and target forward.
        tokens_per_second: Over all calls.
        num_draft_tokens: Draft tokens of a round, on average.
    """

    paths: RankPaths | None
    tau: float
    tokens_per_second: float
    num_draft_tokens: float


def tune(options: TuneOptions) -> None:
    """Measure draft trees of every size, and calibrate a static tree if the method ranks."""
    save = options.save
    if save is not None:
        _require_place(save, _folder(options))
    given = read_prompts(options.prompts) if options.prompts else load_prompts("sql_tune")
    texts = given[: options.num_prompts]
    sizes = positive_numbers(options.batch)
    arguments = {**setting_options(options.setting), "max_new_tokens": options.max_new_tokens}
    loaded = load_with_heads(options, heads_kwargs=_without_tree(_folder(options)))
    console = Console()
    proposer = loaded.spec.proposer
    if proposer is None:
        raise OptionError("--heads is 'none', expected a method; drop it, or pass lookup")
    if save is not None and not proposer.fills_static_trees:
        raise OptionError(
            f"--save has nothing to write: {type(proposer).__name__} does not rank its candidates; "
            "drop it and use tree='auto'"
        )
    if save is not None and not save.is_dir():
        prepare_file("--save", save)
    for size in sizes:
        calls = make_calls(texts, loaded.base, loaded.tokenizer, options=arguments, batch=size)
        costs = _print_sizes(loaded, calls, size, console)
        if size == sizes[0] and proposer.fills_static_trees:
            own, best = _calibrate(loaded, calls, costs, options.num_draft_tokens, console)
            if save is not None:
                _warn_of_few(len(calls), size)
                _write(save, own, best, loaded, options)
                console.print(_saved(save), markup=False)


def _warn_of_few(num_calls: int, batch: int) -> None:
    """Warn on standard error if the calls are too few to say that a tree is better."""
    if num_calls < _MIN_CALLS:
        Console(stderr=True, soft_wrap=True).print(
            f"warning: the stored tree rests on {num_calls} calls, expected at least {_MIN_CALLS}: "
            "of so few, it may be fitted to these prompts only; pass at least "
            f"--num-prompts {_MIN_CALLS * batch}, and --prompts with as many",
            style="yellow",
            highlight=False,
            markup=False,
        )


def _require_place(save: Path, heads: Path | None) -> None:
    """Check that a tree can be saved there: in a file, or in the folder of the heads.

    Raises:
        OptionError: If it is neither.
        CheckpointError: If the heads in the folder are damaged, or have no config.
    """
    if save.suffix == ".json" and not save.is_dir():
        return
    if save.is_dir() and heads is not None and heads.resolve() == save.resolve():
        require_folder_to_write("--save", save)
        read_json(save / CONFIG_NAME)
        method = find_heads(save).method
        if not method.stores_trees:
            raise OptionError(
                f"--save is {str(save)!r}, which holds {method.summary}, expected heads of Medusa, "
                "EAGLE or block drafting, whose config holds a tree; drop --save and pass "
                "tree='auto' to generate, which chooses trees while it decodes"
            )
        method.card(save)
        return
    raise OptionError(
        f"--save is {str(save)!r}, expected a file named *.json, or the folder of --heads, whose "
        "heads are then loaded with the tree; rename it, or pass the folder as --heads too"
    )


def _folder(options: TuneOptions) -> Path | None:
    """Return the folder of the heads, if they are in one."""
    if options.heads is None or not path_exists(options.heads):
        return None
    return Path(options.heads, options.heads_subfolder or "")


def _without_tree(folder: Path | None) -> dict[str, Any]:
    """Return the options that load heads in a folder without the tree that they were saved with.

    It would bound the trees that are tried.
    """
    if folder is None or not path_exists(folder / CONFIG_NAME):
        return {}
    is_stored = read_choices(folder, read_json(folder / CONFIG_NAME)) is not None
    return {"tree": None} if is_stored else {}


def _saved(save: Path) -> str:
    if save.is_dir():
        return (
            f"written into {save}, whose heads are loaded with it; heads_kwargs={{'tree': None}} "
            "loads them without"
        )
    return f"written to {save}; use generate(tree={str(save)!r})"


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
    loaded: Loaded,
    calls: list[Call],
    costs: RoundCosts,
    num_nodes: int | None,
    console: Console,
) -> tuple[_Tried, _Tried]:
    """Return the proposer's own trees and the best static tree, decoded on held-out prompts.

    The ranks that are accepted on every other call give a tree of each size. The three that should
    be fastest, or the one of `num_nodes` nodes, are decoded on the other calls.
    """
    proposer = loaded.spec.proposer
    assert proposer is not None
    recorder = RankRecorder(proposer)
    _run(SpecModel(loaded.base, recorder, adaptive=False), calls[::2])
    acceptance = recorder.acceptance
    console.print(_acceptance_table(acceptance))
    trees = {
        calibrated_paths(acceptance, num_nodes=size)
        for size in ([num_nodes] if num_nodes else _SIZES)
    }

    def rate(tree: RankPaths, tau: float) -> float:
        return tau / costs.round(len(tree), float(max(map(len, tree))))

    ordered = sorted(trees, key=lambda tree: rate(tree, expected_tau(acceptance, tree)))
    held_out = calls[1::2] or calls
    own, *tried = (_try(loaded, held_out, tree) for tree in (None, *ordered[-_SHORTLIST:]))
    best = max(tried, key=lambda each: rate(each.paths or (), each.tau))
    paths = best.paths or ()
    console.print(
        f"static tree of {len(paths)} nodes, not counting the root, on {max(map(len, paths))} "
        "levels, estimated tau "
        f"{expected_tau(acceptance, paths):.2f}",
        highlight=False,
    )
    console.print(_comparison_table(own, best, num_calls=len(held_out)))
    if best.tokens_per_second < own.tokens_per_second:
        console.print("the default trees were faster on these prompts")
    return own, best


def _try(loaded: Loaded, calls: list[Call], paths: RankPaths | None) -> _Tried:
    """Decode calls with a static tree, or with the proposer's own settings."""
    model = SpecModel(loaded.base, loaded.spec.proposer, adaptive=False, tree=paths)
    if model.proposer is not None:
        model.proposer.forget()
    start, parts = perf_counter(), []
    for call in calls:
        torch.manual_seed(call.seed)
        model.generate(**call.arguments)
        parts.append(model.last_speculation)
    seconds, total = perf_counter() - start, SpeculationStats.merge(filter(None, parts)).total
    num_rounds = max(len(total.accepted_lengths), 1)
    rate, size = total.num_tokens / seconds, total.num_draft_tokens / num_rounds
    return _Tried(paths, total.tau, rate, size)


def _comparison_table(own: _Tried, best: _Tried, *, num_calls: int) -> Table:
    """Return the proposer's own trees and the calibrated one, side by side."""
    title = f"decoded, {num_calls} held-out calls"
    table = Table(box=None, pad_edge=False, header_style="bold underline", title=title)
    for name in ("trees", "draft tokens", "tau", "tokens/s"):
        table.add_column(name, justify="left" if name == "trees" else "right")
    for name, found in (("default", own), ("calibrated", best)):
        numbers = (found.num_draft_tokens, found.tau, found.tokens_per_second)
        table.add_row(name, *(f"{n:.{d}f}" for n, d in zip(numbers, (1, 2, 0), strict=True)))
    return table


def _acceptance_table(acceptance: RankAcceptance) -> Table:
    """Return how often each rank was accepted at each depth, given that its parent was."""
    table = Table(box=None, pad_edge=False, header_style="bold underline", title="accepted, %")
    table.add_column("depth", justify="right")
    for rank in range(max(map(len, acceptance))):
        table.add_column(f"rank {rank}", justify="right")
    for depth, shares in enumerate(acceptance, start=1):
        table.add_row(str(depth), *(f"{share:.1%}"[:-1] for share in shares))
    return table


def _write(save: Path, own: _Tried, best: _Tried, loaded: Loaded, options: TuneOptions) -> None:
    assert best.paths is not None
    taus = {"tau": round(best.tau, 3), "default_tau": round(own.tau, 3)}
    try:
        if save.is_dir():
            notes = {**taus, "setting": options.setting, "max_new_tokens": options.max_new_tokens}
            card = find_heads(save).method.card
            store_choices(save, best.paths, notes={"calibration": notes}, check=card)
            return
        record: dict[str, Any] = {
            "tree": best.paths,
            **taus,
            "base": loaded.base.config.name_or_path,
            "heads": options.heads or "default",
            **loaded.commits,
        }
        write_file(save, json.dumps(record) + "\n")
    except OSError as error:
        raise OptionError(f"--save {str(save)!r} cannot be written ({error})") from error
