"""``speclm kernels``: what computes attention of trees on this machine, and with which sizes."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from speclm.cli._outputs import prepare_file
from speclm.errors import OptionError
from speclm.kernels import preferred
from speclm.kernels.launch import architecture, measure_on, tune
from speclm.kernels.launch_table import TABLE, VARIABLE, LaunchRow, built_in_rows, read_table


def kernels(
    arch: Annotated[
        str | None, typer.Option(help="Of another GPU, such as sm_80 or gfx942.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option("--tune", help="Measure sizes on this GPU; write them here.")
    ] = None,
) -> None:
    """Show how tree attention is launched; with --tune, measure other sizes on this GPU.

    What --tune writes is used where the environment variable SPECLM_KERNEL_CONFIGS names it.
    """
    if arch is not None and arch not in TABLE:
        known = sorted(TABLE, key=lambda name: (name[:2] != "sm", len(name), name))
        raise OptionError(f"--arch is {arch!r}, expected one of {known!r}; pass one of them")
    console, has_gpu = Console(), torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu else "cpu")
    choice = preferred(device)
    console.print(f"here: {choice.backend}, {choice.reason}")
    if save is not None:
        if not has_gpu:
            raise OptionError("--tune measures on a GPU, and there is none here; leave it out")
        prepare_file("--tune", save)
        here = architecture(device)
        rows = tune(save, architecture=here, measure=measure_on(device))[here]
        console.print(_sizes(f"{here}, from {save}", rows))
        console.print(f"to use them: export {VARIABLE}={save}")
        return
    if arch is None and not has_gpu:
        console.print("no GPU here; --arch sm_90 shows the sizes of one")
        return
    name = arch or architecture(device)
    path = os.environ.get(VARIABLE)
    if path and name in (given := read_table(path)):
        console.print(_sizes(f"{name}, from {path}", given[name]))
    console.print(_sizes(f"{name}, built in", built_in_rows(name)))


def _sizes(title: str, rows: tuple[LaunchRow, ...]) -> Table:
    table = Table(title=f"{title}; the first row that takes a call counts", title_justify="left")
    for column in ("rows", "bytes of a key", "type", *asdict(rows[0].config)):
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        limits = (
            "any" if limit is None else f"to {limit}" for limit in (row.max_rows, row.max_key_bytes)
        )
        kind = "float32" if row.is_float32 else "two bytes"
        table.add_row(*limits, kind, *map(str, asdict(row.config).values()))
    return table
