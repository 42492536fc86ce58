import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from speclm.cli import main

ROOT = Path(__file__).parents[2]


def test_help_lists_the_commands(run):
    result = run("--help")
    assert result.exit_code == 0
    assert all(name in result.output for name in ("demo", "generate", "chat", "bench", "env"))


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
    command = [sys.executable, "-m", "speclm", "generate"]
    result = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "error: expected exactly one of" in result.stderr
