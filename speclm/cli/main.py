"""The command line: its commands, and how errors end them."""

import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typing_extensions import override

from speclm._version import __version__
from speclm.cli import _heads_options, _options
from speclm.cli._console import (
    USAGE_ERROR,
    exits_when_output_fails,
    flush_output,
    print_error,
    replace_unencodable,
)
from speclm.errors import SpeclmError

COMMANDS: dict[str, tuple[type, str]] = {
    "demo": (_options.DemoOptions, "demo"),
    "generate": (_options.GenerateOptions, "generate"),
    "chat": (_options.ChatOptions, "chat"),
    "webui": (_options.WebuiOptions, "webui"),
    "bench": (_options.BenchOptions, "bench"),
    "tune": (_options.TuneOptions, "tune"),
    "warm": (_options.WarmOptions, "warm"),
    "index": (_options.IndexOptions, "index"),
    "convert": (_heads_options.ConvertOptions, "convert"),
    "push": (_heads_options.PushOptions, "push"),
    "export-server": (_heads_options.ExportServerOptions, "export_server"),
    "verify": (_options.VerifyOptions, "verify"),
    "kernels": (_options.KernelsOptions, "machine"),
    "env": (_options.EnvOptions, "machine"),
}
"""Options of each command, and the module of speclm.cli with its function."""


GROUPS = {
    "data": "Prepare the data to train heads with.",
    "train": "Train heads for a base.",
}
"""Help of each group of commands: function ``NAME_app`` of module ``speclm.cli.NAME``."""


class _Group(TyperCommand):
    """A group of commands; imported only when one of them or its help is requested."""

    @override
    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> Any:
        module = import_module(f"speclm.cli.{self.name}")
        group = typer.main.get_group(getattr(module, f"{self.name}_app")())
        return group.make_context(info_name, args, *rest, **extra)


class _Commands(TyperGroup):
    """The commands; one whose output cannot be written ends with `USAGE_ERROR` instead of 1."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, text in GROUPS.items():
            self.add_command(_Group(name=name, callback=None, help=text))

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


def _print_version(value: bool) -> bool:
    if value:
        print(__version__)
        raise typer.Exit
    return value


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Exact speculative decoding: the tokens of generate, faster."""


def command(name: str, options: type, module: str) -> Callable[..., None]:
    """Return a function whose parameters are the fields of an options class, its own first.

    The module that does the work imports PyTorch, which takes seconds. It is imported when the
    command runs, not for its help.
    """

    def run(**values: Any) -> None:
        getattr(import_module(f"speclm.cli.{module}"), name.replace("-", "_"))(options(**values))

    own = options.__annotations__
    parameters = inspect.signature(options).parameters.values()
    ordered = sorted(parameters, key=lambda parameter: parameter.name not in own)
    changed: Any = run
    changed.__signature__ = inspect.Signature(ordered)
    changed.__doc__ = options.__doc__
    return run


for _name, (_class, _module) in COMMANDS.items():
    app.command(_name)(command(_name, _class, _module))


def main() -> None:
    """Run the command line.

    Errors of speclm's own, and output that cannot be written, become one red line and exit code
    2. If the reader of the output has left, as in ``speclm env | head -1``, the exit code is the
    same, without a line.
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
