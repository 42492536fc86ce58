"""``speclm bench``: measures a base and a method on the user's prompts."""

from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console

from speclm.bench import (
    Cell,
    Decoder,
    make_calls,
    measure_grid,
    prompt_lookup_decoder,
    read_records,
    setting_options,
    speculative_decoder,
)
from speclm.bench.report import as_dictionary, recorded, write_report
from speclm.cli._display import add_comparison, comparison_table, progress
from speclm.cli._files import (
    positive_numbers,
    prepare_file,
    read_prompts,
    require_folder_to_write,
)
from speclm.cli._models import Loaded, load_with_heads
from speclm.cli._options import BenchOptions
from speclm.files.hub import path_exists
from speclm.model.publishing import drafting_digest
from speclm.plots import require_plots


def bench(options: BenchOptions) -> None:
    """Measure in pairs with regular generation; exit with 1 if an output differs."""
    texts = read_prompts(options.prompts)[: options.num_prompts]
    batches = positive_numbers(options.batch)
    settings = {name: setting_options(name) for name in options.setting.split(",")}
    _prepare(options)
    loaded = load_with_heads(options)
    spec = loaded.spec
    methods = [
        speculative_decoder(
            "speclm",
            loaded.base,
            spec.proposer,
            tree=spec.tree,
            engine=spec.engine,
            adaptive=not options.no_pauses,
        )
    ]
    if options.prompt_lookup:
        methods.append(prompt_lookup_decoder(loaded.base))
    shared = {**_shared_settings(options, loaded), "num_prompts": len(texts)}
    cells = [
        Cell(
            make_calls(
                texts,
                loaded.base,
                loaded.tokenizer,
                options={**arguments, "max_new_tokens": options.max_new_tokens},
                batch=size,
                seed=options.seed,
            ),
            {**shared, "setting": name, "batch": size},
        )
        for name, arguments in settings.items()
        for size in batches
    ]
    is_honest = _measure(cells, methods, loaded, options)
    if not is_honest:
        raise typer.Exit(1)


def _prepare(options: BenchOptions) -> None:
    """Check the files that are to be written, before anything is loaded."""
    if options.report is not None:
        require_plots("--report")
        require_folder_to_write("--report", options.report)
    if options.out is not None:
        prepare_file("--out", options.out, flag="--make-folders", makes=options.make_folders)
        read_records(options.out)  # a file of another kind is reported before anything is measured


def _measure(
    cells: list[Cell], methods: list[Decoder], loaded: Loaded, options: BenchOptions
) -> bool:
    """Measure, print the table and write the report; return whether all outputs are explained."""
    table = comparison_table(("setting", "batch"))
    is_honest, records = True, []
    num_pairs = sum(len(cell.calls) for cell in cells) * len(methods)
    with progress("measuring", total=num_pairs) as count:
        for result in measure_grid(
            cells, methods, base=loaded.base, benchmark="bench", path=options.out, on_pair=count
        ):
            keys = (result.cell.settings["setting"], str(result.cell.settings["batch"]))
            add_comparison(table, keys, result.comparison)
            is_honest = is_honest and result.comparison.is_honest
            records.append(as_dictionary(result.record))
    console = Console()
    console.print(table)
    if options.report is not None:
        if options.out is not None:  # it may hold measurements of an earlier, interrupted run
            wanted = [{**c.settings, "method": m.name} for c in cells for m in methods]
            records = recorded(options.out, benchmark="bench", settings=wanted)
        write_report(options.report, records)
        console.print(f"report is in {options.report}", markup=False, soft_wrap=True)
    return is_honest


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
        "prompts": options.prompts.name,
        "dtype": str(loaded.base.dtype).removeprefix("torch."),
        "device": str(loaded.base.device),
        "num_threads": torch.get_num_threads(),
        "max_new_tokens": options.max_new_tokens,
        "seed": options.seed,
        **_identity_of_heads(options),
        **({"pauses": False} if options.no_pauses else {}),
        **drafting,
    }


def _identity_of_heads(options: BenchOptions) -> dict[str, str]:
    """Return a hash of the heads in a folder that a report is about, for ``speclm push``."""
    if options.report is None or options.heads is None or not path_exists(options.heads):
        return {}
    digest = drafting_digest(Path(options.heads, options.heads_subfolder or ""))
    return {} if digest is None else {"heads_sha256": digest}
