"""``speclm bench``: measures a base and a method on public questions or the user's prompts."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console

from speclm.bench import (
    Cell,
    Decoder,
    Measured,
    Task,
    make_calls,
    make_dialogues,
    measure_grid,
    prompt_lookup_decoder,
    read_records,
    setting_options,
    speculative_decoder,
    write_answers,
)
from speclm.bench.dialogues import num_positions, without_room
from speclm.bench.report import as_dictionary, recorded, write_report
from speclm.bench.tree_sizes import simulate_tau
from speclm.cli._display import add_comparison, category_table, comparison_table, progress
from speclm.cli._files import (
    positive_numbers,
    prepare_file,
    read_questions,
    require_folder_to_write,
)
from speclm.cli._models import Loaded, load_with_heads
from speclm.cli._options import BenchOptions
from speclm.errors import OptionError, PromptError
from speclm.files.hub import path_exists
from speclm.files.questions import Question
from speclm.model.publishing import drafting_digest
from speclm.plots import require_plots

_NUM_SIMULATED = 8  # tasks of a cell that are decoded again for the tau of other trees
_OURS = "speclm"


def bench(options: BenchOptions) -> None:
    """Measure in pairs with regular generation; exit with 1 if an output differs."""
    questions = read_questions(options.prompts)[: options.num_prompts]
    batches = positive_numbers(options.batch)
    _require_single_turns(questions, batches)
    settings = {name: setting_options(name) for name in options.setting.split(",")}
    _prepare(options, batches)
    loaded = load_with_heads(options)
    questions = _with_room(questions, loaded)
    spec = loaded.spec
    methods = [
        speculative_decoder(
            _OURS,
            loaded.base,
            spec.proposer,
            tree=spec.tree,
            engine=spec.engine,
            adaptive=not options.no_pauses,
        )
    ]
    if options.prompt_lookup:
        methods.append(prompt_lookup_decoder(loaded.base))
    shared = {**_shared_settings(options, loaded), **_identity_of_prompts(questions)}
    cells = [
        Cell(
            _tasks(questions, loaded, options, arguments, batch=size),
            {**shared, "setting": name, "batch": size},
        )
        for name, arguments in settings.items()
        for size in batches
    ]
    measured = _measure(cells, methods, loaded, options)
    _name_skipped(cells, methods, measured, options)
    if measured:
        _print_tables(measured)
    _warn_of_open_ends(questions, measured, loaded)
    _write(cells, methods, measured, loaded, options)
    if not all(found.comparison.is_honest for found in measured):
        raise typer.Exit(1)


def _require_single_turns(questions: Sequence[Question], batches: Sequence[int]) -> None:
    """Check that questions of several turns are not asked in batches.

    Raises:
        OptionError: If one is.
    """
    several = next((each for each in questions if len(each.turns) > 1), None)
    if several is not None and max(batches) > 1:
        raise OptionError(
            f"--batch has {max(batches)}, and {several.name} has "
            f"{len(several.turns)} turns, which are answered one after the other; pass --batch 1, "
            "or questions of one turn"
        )


def _prepare(options: BenchOptions, batches: Sequence[int]) -> None:
    """Check the files that are to be written, before anything is loaded."""
    if options.report is not None:
        require_plots("--report")
        require_folder_to_write("--report", options.report)
    if options.answers is not None:
        require_folder_to_write("--answers", options.answers)
        if 1 not in batches:
            raise OptionError(
                f"--answers has the answers of batches of 1, and --batch is {options.batch!r}; "
                "add 1, or drop --answers"
            )
    if options.out is not None:
        prepare_file("--out", options.out, flag="--make-folders", makes=options.make_folders)
        read_records(options.out)  # a file of another kind is reported before anything is measured


def _with_room(questions: Sequence[Question], loaded: Loaded) -> list[Question]:
    """Return the questions that fit into the model's positions, and warn of the others.

    Raises:
        PromptError: If none fits.
    """
    lengths = without_room(questions, loaded.base, loaded.tokenizer)
    positions = num_positions(loaded.base)
    named = [f"{questions[index].name} has {n} tokens" for index, n in lengths.items()]
    reason = f"and the model has {positions} positions"
    if len(lengths) == len(questions):
        raise PromptError(
            f"no prompt leaves room for an answer: {named[0]}, {reason}; pass shorter prompts"
        )
    for name in named:
        _warn(f"{name}, {reason}; it is left out")
    return [question for index, question in enumerate(questions) if index not in lengths]


def _tasks(
    questions: Sequence[Question],
    loaded: Loaded,
    options: BenchOptions,
    arguments: Mapping[str, Any],
    *,
    batch: int,
) -> Sequence[Task]:
    base, tokenizer = loaded.base, loaded.tokenizer
    settings = {**arguments, "max_new_tokens": options.max_new_tokens}
    if batch == 1:
        return make_dialogues(questions, base, tokenizer, options=settings, seed=options.seed)
    has_template = bool(tokenizer.chat_template)
    prompts = [question.first_prompt(has_template=has_template) for question in questions]
    return make_calls(prompts, base, tokenizer, options=settings, batch=batch, seed=options.seed)


def _measure(
    cells: Sequence[Cell], methods: Sequence[Decoder], loaded: Loaded, options: BenchOptions
) -> list[Measured]:
    """Measure all cells, and simulate other trees for a report."""
    proposer = loaded.spec.proposer

    def simulate(cell: Cell, method: Decoder) -> dict[int, float]:
        if proposer is None or method.name != _OURS:
            return {}
        return simulate_tau(loaded.base, proposer, cell.calls[:_NUM_SIMULATED])

    num_pairs = sum(len(cell.calls) for cell in cells) * len(methods)
    with progress("measuring", total=num_pairs) as count:
        return list(
            measure_grid(
                cells,
                methods,
                base=loaded.base,
                benchmark="bench",
                path=options.out,
                on_pair=lambda pair: None if pair.turn else count(pair),
                simulate=None if options.report is None else simulate,
            )
        )


def _name_skipped(
    cells: Sequence[Cell],
    methods: Sequence[Decoder],
    measured: Sequence[Measured],
    options: BenchOptions,
) -> None:
    """Print which measurements were not repeated."""
    made = [found.record.settings for found in measured]
    for cell in cells:
        for method in methods:
            setting, batch = cell.settings["setting"], cell.settings["batch"]
            is_made = {**cell.settings, "method": method.name} in made
            if method.can_run(batch) and not is_made:
                Console(soft_wrap=True).print(
                    f"{setting}, batch {batch}, {method.name}: {options.out} has this measurement",
                    markup=False,
                    highlight=False,
                )


def _print_tables(measured: Sequence[Measured]) -> None:
    table = comparison_table(("setting", "batch"))
    for found in measured:
        keys = (found.cell.settings["setting"], str(found.cell.settings["batch"]))
        add_comparison(table, keys, found.comparison)
    console = Console()
    console.print(table)
    parts = [
        (found.cell.settings["setting"], name, part)
        for found in measured
        for name, part in found.comparison.by_group().items()
    ]
    if parts:
        console.print()
        console.print(category_table(parts))


def _warn_of_open_ends(
    questions: Sequence[Question], measured: Sequence[Measured], loaded: Loaded
) -> None:
    """Warn of questions whose last turns were not asked."""
    for found in measured:
        last = {id(pair.question): pair for pair in found.comparison.pairs if pair.question}
        for question in questions:
            pair = last.get(id(question))
            if pair is None or pair.turn + 1 == len(question.turns):
                continue
            reason = "the outputs of the turn before differ"
            if pair.is_identical or not found.comparison.promises_identity:
                reason = f"it does not fit into the model's {num_positions(loaded.base)} positions"
            setting, method = found.cell.settings["setting"], found.comparison.method
            _warn(
                f"{setting}, {method}: {question.name} ends before turn "
                f"{pair.turn + 2}, because {reason}"
            )


def _write(
    cells: Sequence[Cell],
    methods: Sequence[Decoder],
    measured: Sequence[Measured],
    loaded: Loaded,
    options: BenchOptions,
) -> None:
    """Write the report and the answers, if they are wanted."""
    console = Console()
    if options.report is not None:
        found = [
            as_dictionary(record) for each in measured for record in (each.record, *each.groups)
        ]
        if options.out is not None:  # it may hold measurements of an earlier, interrupted run
            wanted = [{**c.settings, "method": m.name} for c in cells for m in methods]
            found = recorded(options.out, benchmark="bench", settings=wanted)
        write_report(options.report, found)
        console.print(f"report is in {options.report}", markup=False, soft_wrap=True)
    if options.answers is not None:
        answered = [(each.cell.settings["setting"], each.comparison) for each in measured]
        files = write_answers(options.answers, answered, loaded.tokenizer)
        names = ", ".join(file.name for file in files)
        console.print(f"answers are in {options.answers}: {names}", markup=False, soft_wrap=True)


def _warn(text: str) -> None:
    Console(stderr=True, soft_wrap=True).print(
        f"warning: {text}", style="yellow", highlight=False, markup=False
    )


def _shared_settings(options: BenchOptions, loaded: Loaded) -> dict[str, Any]:
    """Return the settings that all records of the run share."""
    names = [
        *("heads_subfolder", "tree", "engine", "num_draft_tokens", "depth", "quantization"),
        *("memory", "corpus", "token_map"),
    ]
    drafting = {name: getattr(options, name) for name in names}
    drafting = {
        name: value.name if isinstance(value, Path) else value
        for name, value in drafting.items()
        if value is not None
    }
    return {
        "base": loaded.base.config.name_or_path,
        "heads": options.heads or "default",
        **loaded.commits,
        "prompts": Path(options.prompts).name,
        "dtype": str(loaded.base.dtype).removeprefix("torch."),
        "device": str(loaded.base.device),
        "num_threads": torch.get_num_threads(),
        "max_new_tokens": options.max_new_tokens,
        "seed": options.seed,
        **_identity_of_heads(options),
        **({"pauses": False} if options.no_pauses else {}),
        **drafting,
    }


def _identity_of_prompts(questions: Sequence[Question]) -> dict[str, Any]:
    """Return the number of questions, and a hash of their content."""
    content = json.dumps([asdict(question) for question in questions])
    digest = hashlib.sha256(content.encode()).hexdigest()
    return {"num_prompts": len(questions), "prompts_sha256": digest}


def _identity_of_heads(options: BenchOptions) -> dict[str, str]:
    """Return a hash of the heads in a folder that a report is about, for ``speclm push``."""
    if options.report is None or options.heads is None or not path_exists(options.heads):
        return {}
    digest = drafting_digest(Path(options.heads, options.heads_subfolder or ""))
    return {} if digest is None else {"heads_sha256": digest}
