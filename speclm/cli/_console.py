"""Printing of commands: text that cannot steer a terminal, and output that cannot be written."""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.text import Text

USAGE_ERROR = 2
"""Exit code of wrong options and files, and of an unsuitable environment."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells report it."""

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
_BIDI = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))  # overrides, embeddings and isolates
_CONTROL = {
    code: None
    for code in (*range(0x20), *range(0x7F, 0xA0), *_BIDI, 0x2028, 0x2029)
    if chr(code) not in "\t\n"
}


def printable(text: str) -> str:
    """Return a text without the characters that steer a terminal.

    These are control characters of 7 and 8 bits except tabs and newlines, and characters that
    change the direction of writing. An escape sequence without its first character is harmless
    text, however it was split over tokens.

    Args:
        text: Text of a model, a file or an error, or any part of one.
    """
    return text.translate(_CONTROL)


def print_error(error: object) -> None:
    """Print an error as one line on standard error."""
    line = printable(" ".join(str(error).split()))
    with suppress(OSError):  # there is nowhere left to report it
        Console(stderr=True, soft_wrap=True).print(Text(f"error: {line}", style="red"))


def replace_unencodable() -> None:
    """Make standard output and standard error replace characters that they cannot encode."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextmanager
def exits_when_output_fails() -> Iterator[None]:
    """Exit with `USAGE_ERROR` if nobody reads the output any more, or the disk is full."""
    try:
        yield
    except SystemExit:  # of rich, with 1, where a pipe is closed; commands raise typer.Exit
        sys.exit(USAGE_ERROR)
    except OSError as error:
        if error.errno != errno.EPIPE and error.errno not in _DISK_ERRORS:
            raise
        _discard_output()
        if error.errno != errno.EPIPE:
            print_error(f"output cannot be written ({error}); make room, or write elsewhere")
        sys.exit(USAGE_ERROR)


def flush_output() -> None:
    """Write all buffered output; exit with `USAGE_ERROR` if that fails."""
    if sys.stdout is not None:
        with exits_when_output_fails():
            sys.stdout.flush()


def _discard_output() -> None:
    """Discard standard output: Python flushes it at the end, and would fail again."""
    with suppress(OSError, ValueError, AttributeError):  # it may be closed, or no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
