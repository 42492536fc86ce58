"""``speclm bench``: measures a base with a proposer on prompts of your own."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from speclm.bench import (
    Cell,
    make_calls,
    measure_grid,
    prompt_lookup_decoder,
    read_records,
    setting_options,
    speculative_decoder,
)
from speclm.cli._models import HeadsRevision, Loaded, load
from speclm.cli._options import MaxNewTokens, Seed, Threads, positive_numbers
from speclm.cli._outputs import prepare_file
from speclm.cli._prompts import read_prompts
from speclm.cli._tables import add_comparison, comparison_table


def bench(  # noqa: PLR0913, PLR0917 - each is an option of the command
    prompts: Annotated[Path, typer.Option(help='JSON lines with "messages" or "prompt".')],
    base: Annotated[
        str | None, typer.Option(help="Folder or hub id; by default the bundled model.")
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(help='Proposer name, folder or hub id of a draft model, or "none".'),
    ] = None,
    heads_revision: HeadsRevision = None,
    settings: Annotated[str, typer.Option(help="Of greedy, t0.7, t1.0.")] = "greedy,t1.0",
    batch: Annotated[str, typer.Option(help="Rows of each call.")] = "1",
    n: Annotated[int | None, typer.Option(min=1, help="Prompts; all by default.")] = None,
    max_new_tokens: MaxNewTokens = 128,
    prompt_lookup: Annotated[
        bool, typer.Option("--prompt-lookup", help="Measure Transformers' prompt lookup too.")
    ] = False,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16, auto.")] = None,
    threads: Threads = None,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Append records to this file.")] = None,
    make_folders: Annotated[
        bool, typer.Option("--make-folders", help="Make the folders of --out without asking.")
    ] = False,
) -> None:
    """Measure speculative and regular generation in pairs, and check that outputs are equal."""
    if threads is not None:
        torch.set_num_threads(threads)
    texts = read_prompts("--prompts", prompts)[:n]
    batches = positive_numbers(batch)
    named = {name: setting_options(name) for name in settings.split(",")}
    if out is not None:
        prepare_file("--out", out, flag="--make-folders", makes=make_folders)
        read_records(out)  # another file is named before anything is measured
    loaded = load(base, heads, dtype=dtype, heads_revision=heads_revision)
    methods = [speculative_decoder("speclm", loaded.base, loaded.spec.proposer)]
    if prompt_lookup:
        methods.append(prompt_lookup_decoder(loaded.base))
    cells = [
        Cell(
            make_calls(
                texts,
                loaded.base,
                loaded.tokenizer,
                options={**options, "max_new_tokens": max_new_tokens},
                batch=size,
                seed=seed,
            ),
            {
                **_common_settings(loaded, heads, prompts, num_prompts=len(texts)),
                "setting": name,
                "batch": size,
                "max_new_tokens": max_new_tokens,
                "seed": seed,
            },
        )
        for name, options in named.items()
        for size in batches
    ]
    table = comparison_table(("setting", "batch"))
    is_honest = True
    with Console(stderr=True).status("measuring"):
        for result in measure_grid(cells, methods, base=loaded.base, benchmark="bench", path=out):
            keys = (result.cell.settings["setting"], str(result.cell.settings["batch"]))
            add_comparison(table, keys, result.comparison)
            is_honest = is_honest and result.comparison.is_honest
    Console().print(table)
    if not is_honest:
        raise typer.Exit(1)


def _common_settings(
    loaded: Loaded, heads: str | None, prompts: Path, *, num_prompts: int
) -> dict[str, Any]:
    return {
        "base": loaded.base.config.name_or_path,
        "heads": heads or "default",
        "prompts": prompts.name,
        "num_prompts": num_prompts,
        "dtype": str(loaded.base.dtype).removeprefix("torch."),
        "device": str(loaded.base.device),
        "num_threads": torch.get_num_threads(),
    }
