"""``speclm data``: prepare the data to train heads with. Imports no PyTorch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from speclm.cli._console import printable
from speclm.cli._files import prepare_file
from speclm.cli._options import DistillOptions
from speclm.cli.main import command
from speclm.data import ConversionReport, convert
from speclm.errors import OptionError
from speclm.files.atomic import write_json


def data_app() -> typer.Typer:
    """Return the group of commands."""
    app = typer.Typer(help="Prepare the data to train heads with.", no_args_is_help=True)
    app.command("convert")(_convert)
    app.command("distill")(command("distill", DistillOptions, "distill"))
    return app


def _convert(
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="FILE", help="Each a JSON array of objects, or one object a line."),
    ],
    out: Annotated[Path, typer.Option(help='File of JSON lines with "messages" to write.')],
    schema: Annotated[
        str | None,
        typer.Option(
            help="messages, sharegpt, alpaca or pairs; by default what the keys of each row show."
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write what became of the rows here, as JSON.")
    ] = None,
    deduplicate: Annotated[
        bool, typer.Option("--deduplicate", help="Drop conversations that an earlier row has.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="End with an error at a row that cannot be used.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace --out if it exists.")
    ] = False,
) -> None:
    """Convert conversations of other forms to the JSON lines that trainings read."""
    prepare_file("--out", out)
    if report is not None:
        prepare_file("--report", report)
        if report.absolute() in {path.absolute() for path in (out, *sources)}:
            raise OptionError(
                f"--report {str(report)!r} is also the output or a source; name another file"
            )
    with _progress(sources) as progress:
        done = convert(
            sources,
            out,
            schema=schema,
            deduplicate=deduplicate,
            strict=strict,
            overwrite=overwrite,
            progress=progress,
        )
    if report is not None:
        try:
            write_json(report, done.as_dict())
        except OSError as error:
            raise OptionError(
                f"--report {str(report)!r} cannot be written ({error}); name a file in a folder "
                "that you may write to"
            ) from error
    _print(done, out)


@contextmanager
def _progress(sources: list[Path]) -> Iterator[Callable[[int], object]]:
    """Show on standard error how much of the files is read."""
    total = sum(path.stat().st_size for path in sources if path.is_file())
    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("converting", total=total)
        yield lambda num_bytes: shown.advance(task, num_bytes)


def _print(report: ConversionReport, out: Path) -> None:
    console = Console()
    if report.outcomes:
        table = Table("rows", "are", "because", box=None, pad_edge=False)
        for each in report.outcomes:
            verb = "dropped" if each.is_dropped else "repaired"
            first = f"first {each.where}: {each.detail or each.excerpt}"
            reason = Text(each.meaning).append(f"\n{printable(first)}", style="dim")
            table.add_row(str(each.count), verb, reason)
        console.print(table)
    forms = ", ".join(f"{count} of {name}" for name, count in report.schemas.items())
    console.print(
        f"{report.num_kept} of {report.num_rows} rows are in {printable(str(out))}, "
        f"{report.num_repaired} of them repaired; schemas: {forms}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
