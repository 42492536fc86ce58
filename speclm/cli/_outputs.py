"""Checks, before anything is computed, that results can be written where they are to go."""

import sys
from pathlib import Path
from tempfile import TemporaryFile

import typer

from speclm.errors import OptionError


def prepare_file(option: str, path: Path, *, flag: str | None = None, makes: bool = False) -> None:
    """Check that a file can be written, and make its folder if that is not there.

    Somebody at a terminal is asked before more than the last part of the folder's name is made.

    Args:
        option: That the file was given with, for messages.
        path: The file, which may exist.
        flag: Option that has all folders made without asking; None where there is none.
        makes: Whether it was given.

    Raises:
        OptionError: If the file cannot be written, or several folders are missing and nobody
            wants them made.
    """
    folder = path.absolute().parent
    try:
        if path.exists() and not path.is_file():
            raise OptionError(
                f"{option} is {str(path)!r}, which is a folder or a device, expected a file; name "
                "one"
            )
        missing = _missing(folder)
        if len(missing) > 1 and not makes and not _is_wanted(missing):
            alternative = f", or pass {flag}" if flag else ""
            raise OptionError(
                f"{option} is {str(path)!r}, whose folder is to be in {str(missing[-1])!r}, which "
                f"does not exist; correct the path, make {str(folder)!r} first{alternative}"
            )
        _probe(folder)
    except OSError as error:
        raise OptionError(
            f"{option} {str(path)!r} cannot be written ({error}); name a file in a folder that "
            "you may write to"
        ) from error


def require_folder_to_write(option: str, folder: Path) -> None:
    """Check that files can be written into a folder, and leave behind nothing new.

    Args:
        option: That the folder was given with, for messages.
        folder: The folder, which may be missing.

    Raises:
        OptionError: If nothing can be written there.
    """
    try:
        missing = _missing(folder.absolute())
        _probe(folder)
        for made in missing:
            made.rmdir()
    except OSError as error:
        raise OptionError(
            f"{option} {str(folder)!r} cannot be written to ({error}); name a folder that you may "
            "write to"
        ) from error


def _missing(folder: Path) -> list[Path]:
    """Return a folder and those above it as far as they do not exist, the innermost first."""
    return [part for part in (folder, *folder.parents) if not part.exists()]


def _probe(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=folder):
        pass


def _is_wanted(missing: list[Path]) -> bool:
    """Return whether somebody at a terminal wants folders made."""
    if sys.stdin is None or not sys.stdin.isatty():
        return False
    try:
        return typer.confirm(f"make {len(missing)} folders, from {missing[-1]} on?", err=True)
    except typer.Abort:
        return False
