"""How commands print: text that cannot steer a terminal, and output that cannot be written."""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.text import Text

USAGE_ERROR = 2
"""Exit code of wrong options and files, and of an environment that does not do."""

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
_BIDI = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))  # overrides, embeddings and isolates
_CONTROL = {
    code: None
    for code in (*range(0x20), *range(0x7F, 0xA0), *_BIDI, 0x2028, 0x2029)
    if chr(code) not in "\t\n"
}


def printable(text: str) -> str:
    """Return a text without the characters that steer a terminal.

    That are control characters of 7 and 8 bits but for tabs and newlines, and those that change
    the direction of writing. Without its first character an escape sequence is plain text, however
    it was split over tokens.

    Args:
        text: Of a model, a file or an error; any part of a longer one.
    """
    return text.translate(_CONTROL)


def print_error(error: object) -> None:
    """Print an error as one line on standard error."""
    line = printable(" ".join(str(error).split()))
    with suppress(OSError):  # nowhere is left to say it
        Console(stderr=True, soft_wrap=True).print(Text(f"error: {line}", style="red"))


def replace_unencodable() -> None:
    """Have standard output and standard error replace what their encoding does not have."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextmanager
def exits_when_output_fails() -> Iterator[None]:
    """Exit with `USAGE_ERROR` where nobody reads the output any more, or the disk is full."""
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
    """Write what is still held back; exit with `USAGE_ERROR` where that fails."""
    if sys.stdout is not None:
        with exits_when_output_fails():
            sys.stdout.flush()


def _discard_output() -> None:
    """Send standard output nowhere: Python flushes it when it ends, and would fail again."""
    with suppress(OSError, ValueError, AttributeError):  # it may be closed, or no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
