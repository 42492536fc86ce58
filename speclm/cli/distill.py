"""``speclm data distill``: generates the answers of conversations anew."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from speclm.cli._console import INTERRUPTED, printable
from speclm.cli._files import prepare_file
from speclm.cli._models import load_with_heads
from speclm.cli._options import DistillOptions, DraftOptions
from speclm.data.dialogues import AnswerSource, DistillSettings
from speclm.data.distillation import (
    DistillProgress,
    DistillReport,
    ModelSource,
    require_other_file,
)
from speclm.data.distillation import distill as run_distillation
from speclm.data.row_plan import RowPlan, Shard
from speclm.data.server import ServerSource
from speclm.data.shards import require_free
from speclm.errors import OptionError

_SERVER_ONLY = ("model", "api_key_env", "concurrency", "timeout", "retries")


def distill(options: DistillOptions) -> None:
    """Generate answers, keep finished rows, and write all of them once they are there."""
    settings = DistillSettings(
        **{field.name: getattr(options, field.name) for field in fields(DistillSettings)}
    )
    shard = Shard(options.shard, options.num_shards)
    server = _server(options)
    prepare_file("--out", options.out)
    require_free(options.out, overwrite=options.overwrite)
    console, errors = Console(soft_wrap=True, highlight=False), Console(stderr=True)
    with errors.status(f"reading {options.data.name}"):
        plan = RowPlan(options.data)
    require_other_file(options.data, options.out)
    source: AnswerSource = server or _model(options)
    last: DistillProgress | None = None
    try:
        with answering_bar(errors) as show:

            def on_progress(progress: DistillProgress) -> None:
                nonlocal last
                last = progress
                show(progress)

            report = run_distillation(
                plan,
                options.out,
                source,
                settings=settings,
                shard=shard,
                overwrite=options.overwrite,
                on_progress=on_progress,
            )
    except KeyboardInterrupt:
        done, total = (last.num_done, last.num_total) if last else (0, len(plan))
        errors.print(
            f"interrupted: {done} of {total} rows are finished and kept; run the same command "
            "again to go on",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(INTERRUPTED) from None
    _print(console, report, options)


def _server(options: DistillOptions) -> ServerSource | None:
    """Return the server of ``--server``; None if the base is to answer."""
    if options.server is None:
        if given := _given(options, _SERVER_ONLY):
            raise OptionError(
                f"{given} is an option of a server, and there is none; pass --server or drop it"
            )
        return None
    if given := _given(options, [field.name for field in fields(DraftOptions)]):
        raise OptionError(f"{given} has no effect on --server; drop one of them")
    if options.model is None:
        raise OptionError("--server needs --model, the server's name of the model; pass it")
    key = None
    if options.api_key_env is not None:
        key = os.environ.get(options.api_key_env)
        if key is None:
            raise OptionError(
                f"--api-key-env names {options.api_key_env!r}, which is not set; set the variable, "
                "or name another"
            )
    return ServerSource(
        options.server,
        options.model,
        api_key=key,
        concurrency=options.concurrency,
        timeout=options.timeout,
        retries=options.retries,
    )


def _given(options: DistillOptions, names: list[str] | tuple[str, ...]) -> str | None:
    """Return the first of some options that is not at its default, as it is typed."""
    defaults = {field.name: field.default for field in fields(DistillOptions)}
    for name in names:
        if getattr(options, name) != defaults[name]:
            return "--import" if name == "imports" else f"--{name.replace('_', '-')}"
    return None


def _model(options: DistillOptions) -> ModelSource:
    loaded = load_with_heads(options)
    return ModelSource(loaded.spec, loaded.tokenizer)


@contextmanager
def answering_bar(console: Console) -> Iterator[Callable[[DistillProgress], None]]:
    """Show rows, tokens per second and the time left."""
    columns = (
        TextColumn("answering"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task("", total=None, speed="")

        def show(progress: DistillProgress) -> None:
            shown.update(
                task,
                total=progress.num_total,
                completed=progress.num_done,
                speed=f"{progress.tokens_per_second:.0f} tokens/s",
            )

        yield show


def _print(console: Console, report: DistillReport, options: DistillOptions) -> None:
    totals, progress = report.totals, report.progress
    num_dropped = totals.dropped.total()
    console.print(f"{totals.num_rows} rows, {num_dropped} dropped, {totals.num_tokens} tokens")
    if totals.dropped:
        table = Table("dropped because", "rows", "first", box=None, pad_edge=False)
        for reason, count in totals.dropped.most_common():
            table.add_row(reason, str(count), Text(printable(totals.examples[reason])))
        console.print(table)
    line = (
        f"this run: {progress.num_done - progress.num_resumed} rows, {progress.num_new_tokens} "
        f"tokens, {progress.tokens_per_second:.0f} tokens/s"
    )
    if report.tau is not None:
        line += f", tau {report.tau:.2f}"
    if progress.num_resumed:
        line += f"; {progress.num_resumed} rows were finished before"
    console.print(line, style="dim")
    if report.out is not None:
        console.print(f"written to {report.out}", markup=False)
    else:
        console.print(
            f"shard {options.shard} of {options.num_shards} is finished; the last one to finish "
            f"writes {options.out}",
            markup=False,
        )
