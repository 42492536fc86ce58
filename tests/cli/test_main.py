import errno
import importlib
import io
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from speclm import __version__
from speclm.cli import app, main
from speclm.cli._console import print_error, printable
from speclm.cli._heads_options import ConvertOptions, ExportServerOptions, PushOptions
from speclm.cli._options import (
    DemoOptions,
    HeadsOptions,
    IndexOptions,
    ModelOptions,
    VerifyOptions,
)
from speclm.cli.main import COMMANDS, GROUPS
from speclm.errors import OptionError

ROOT = Path(__file__).parents[2]


def test_help_lists_the_commands_and_version_is_shown(run):
    result = run("--help")
    assert result.exit_code == 0
    assert all(name in result.output for name in (*COMMANDS, *GROUPS))
    assert run("--version").output == f"{__version__}\n"


def test_help_of_every_command_imports_no_torch():
    code = """
import sys
from typer.testing import CliRunner
from speclm.cli import app
from speclm.cli.main import COMMANDS
for command in ([], ["data", "distill"], *([name] for name in COMMANDS)):
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0 and "Usage" in result.output, result.output
    assert not {"torch", "transformers"} & set(sys.modules), command
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_options_of_one_idea_are_spelled_alike():
    for options, _ in COMMANDS.values():
        names = {field.name for field in fields(options)}
        conversations = {"data"} if options is IndexOptions else set()  # answers included
        assert not names & {"n", "nodes", "data", "prompts_file", "num"} - conversations
        for group in (ModelOptions, HeadsOptions):
            own = set(group.__annotations__)
            others = (ConvertOptions, DemoOptions, ExportServerOptions, IndexOptions, PushOptions)
            loads_no_base = options in others
            takes_heads = options is VerifyOptions and group is HeadsOptions  # as an argument
            assert not names & own or names >= own or loads_no_base or takes_heads


def test_unknown_commands_and_options_get_a_suggestion(run):
    for arguments, words in [(["generat"], "'generate'"), (["env", "--hel"], "--help")]:
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert words in result.output


def test_an_error_of_speclm_is_one_line_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["speclm", "generate"])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: expected exactly one of --prompt and --file")
    assert error.count("\n") == 1


def test_other_errors_are_not_hidden(monkeypatch):
    def fail():
        raise ZeroDivisionError

    module = importlib.import_module("speclm.cli.main")  # the package's `main` is the function
    monkeypatch.setattr(module, "app", fail)
    with pytest.raises(ZeroDivisionError):
        main()


def test_module_is_the_command():
    command = [sys.executable, "-m", "speclm", "--version"]
    result = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert result.stdout == f"{__version__}\n"


class Failing(io.StringIO):
    """Standard output that cannot be written."""

    def __init__(self, number):
        super().__init__()
        self._number = number

    def write(self, text):
        raise OSError(self._number, os.strerror(self._number))


def exit_code(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["speclm", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        main()
    return exit_info.value.code


@pytest.mark.parametrize("arguments", [("env",), ("kernels", "--arch", "sm_80"), ("--help",)])
def test_output_that_nobody_reads_on_ends_with_code_2_and_no_word(monkeypatch, capsys, arguments):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert exit_code(monkeypatch, *arguments) == 2
    assert capsys.readouterr().err == ""


def test_full_disk_ends_with_code_2_and_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Failing(errno.ENOSPC))
    assert exit_code(monkeypatch, "env") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: output cannot be written ([Errno 28]")
    assert error.count("\n") == 1


def test_output_that_fails_when_it_is_flushed_ends_with_code_2(monkeypatch, capsys):
    class Full(io.StringIO):
        def flush(self):
            raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(sys, "stdout", Full())
    assert exit_code(monkeypatch, "env") == 2
    assert "make room, or write elsewhere" in capsys.readouterr().err


def test_errors_that_cannot_be_written_keep_their_exit_code(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Failing(errno.ENOSPC))
    assert exit_code(monkeypatch, "generate") == 2


def test_other_errors_of_files_are_not_hidden(monkeypatch):
    def fail():
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr("speclm.cli.machine.describe_machine", fail)
    monkeypatch.setattr(sys, "argv", ["speclm", "env"])
    with pytest.raises(PermissionError):
        main()


def test_interrupt_ends_with_code_130(monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("speclm.cli.machine.describe_machine", interrupt)
    assert exit_code(monkeypatch, "env") == 130


def test_characters_that_the_encoding_lacks_are_replaced(monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr("speclm.cli.machine.registered_methods", lambda: {"好": None})
    assert exit_code(monkeypatch, "env") == 0
    assert output.buffer.getvalue().endswith(b"methods       ?\n")


def test_printable_text_has_no_character_that_steers_a_terminal():
    hostile = "a\x1b[31m\x9b1m\x07\rb\x7f\u202ec\u2066d\u2028e\t\n好"
    assert printable(hostile) == "a[31m1mbcde\t\n好"


def test_errors_are_printed_without_what_steers_a_terminal(capsys):
    print_error(OptionError("a\x1b[31m\nb"))
    assert capsys.readouterr().err == "error: a[31m b\n"
