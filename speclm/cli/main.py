"""The command line."""

import sys

import typer
from rich.console import Console
from rich.text import Text

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

USAGE_ERROR = 2

app = typer.Typer(
    help="Exact speculative decoding: the tokens of generate, faster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (demo, generate, chat, bench, tune, verify, kernels, env):
    app.command()(command)
app.add_typer(train, name="train")


def main() -> None:
    """Run the command line; an error of speclm's own becomes one red line and exit code 2."""
    try:
        app()
    except SpeclmError as error:
        line = " ".join(str(error).split())
        Console(stderr=True, soft_wrap=True).print(Text(f"error: {line}", style="red"))
        sys.exit(USAGE_ERROR)
