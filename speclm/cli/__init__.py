"""The `speclm` command."""

from speclm.cli.main import app, main

__all__ = ["app", "main"]
