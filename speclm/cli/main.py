"""The command line."""

import sys
from typing import Any

import typer
from typer.core import TyperGroup
from typing_extensions import override

from speclm.cli._console import (
    USAGE_ERROR,
    exits_when_output_fails,
    flush_output,
    print_error,
    replace_unencodable,
)
from speclm.cli.bench import bench
from speclm.cli.chat import chat
from speclm.cli.demo import demo
from speclm.cli.env import env
from speclm.cli.generate import generate
from speclm.cli.kernels import kernels
from speclm.cli.train import train
from speclm.cli.tune import tune
from speclm.cli.verify import verify
from speclm.errors import SpeclmError


class _Commands(TyperGroup):
    """Ends a command whose output cannot be written with `USAGE_ERROR`; Typer would with 1."""

    @override
    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with exits_when_output_fails():
            return super().make_context(*args, **kwargs)

    @override
    def invoke(self, ctx: Any) -> Any:
        with exits_when_output_fails():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Commands,
    help="Exact speculative decoding: the tokens of generate, faster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (demo, generate, chat, bench, tune, verify, kernels, env):
    app.command()(command)
app.add_typer(train, name="train")


def main() -> None:
    """Run the command line.

    An error of speclm's own, and output that cannot be written, become one red line and exit code
    2. Output that nobody reads on, as in ``speclm env | head -1``, gives the same code and no line.
    """
    replace_unencodable()
    try:
        app()
    except SystemExit as finished:
        if finished.code == 0:
            flush_output()
        raise
    except SpeclmError as error:
        print_error(error)
        sys.exit(USAGE_ERROR)
