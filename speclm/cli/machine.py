"""``speclm env`` and ``speclm kernels``: the machine, and how its kernels are launched."""

import os
import platform
from dataclasses import asdict

import torch
from rich.console import Console
from rich.table import Table

from speclm.bench.records import describe_commit, describe_machine, describe_versions
from speclm.cli._files import prepare_file
from speclm.cli._options import EnvOptions, KernelsOptions
from speclm.errors import OptionError
from speclm.kernels import preferred
from speclm.kernels.launch import architecture, measure_on, tune
from speclm.kernels.launch_table import TABLE, VARIABLE, LaunchRow, built_in_rows, read_table
from speclm.methods.registry import registered_methods


def env(_: EnvOptions) -> None:
    """Print versions, machine, devices and methods."""
    machine, commit = describe_machine(), describe_commit()
    device = torch.device("cuda" if machine.gpus else "cpu")
    kernel = preferred(device)
    rows = {
        **describe_versions(),
        "commit": f"{commit.sha or 'none'}{' (modified)' if commit.is_dirty else ''}",
        "platform": platform.platform(),
        "cpu": f"{machine.cpu}, {machine.num_cores} cores, {machine.num_threads} threads",
        "cuda": torch.version.cuda or "none",
        "gpus": ", ".join(machine.gpus) or "none",
        "kernels": f"{kernel.backend}: {kernel.reason}",
        "methods": ", ".join(registered_methods()),
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")


def kernels(options: KernelsOptions) -> None:
    """Show the launch sizes of tree attention, or measure others on this GPU."""
    save = options.tune
    if options.arch is not None and options.arch not in TABLE:
        known = sorted(TABLE, key=lambda name: (name[:2] != "sm", len(name), name))
        raise OptionError(
            f"--arch is {options.arch!r}, expected one of {known!r}; pass one of them"
        )
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
    if options.arch is None and not has_gpu:
        console.print("no GPU here; --arch sm_90 shows the sizes of one")
        return
    name = options.arch or architecture(device)
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
