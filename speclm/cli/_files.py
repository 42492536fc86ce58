"""Files named by the user: prompts to read, and results to write."""

import re
import sys
from pathlib import Path
from tempfile import TemporaryFile

import typer

from speclm.demo.bundle import HUMANEVAL, QUESTION_SETS, load_questions
from speclm.errors import DataError, OptionError
from speclm.files.json_lines import JsonLine, read_json_lines, split_json_lines
from speclm.files.questions import Prompt, Question, parse_prompt, parse_questions

STANDARD_INPUT = Path("-")


def read_prompts(path: Path) -> list[Prompt]:
    """Read the prompts of ``--prompts``; the final assistant turn of a conversation is dropped.

    Args:
        path: File of JSON lines, or `STANDARD_INPUT`.

    Raises:
        DataError: If the file cannot be read, has no prompt, or has a line that is not one.
        OptionError: If standard input cannot be read.
    """
    return [parse_prompt(line) for line in read_lines(path, "--prompts")]


def read_chats(path: Path) -> list[Prompt]:
    """Read the prompts of ``--prompts`` as `read_prompts` does, with the answers that they have.

    Raises:
        DataError: If the file cannot be read, has no prompt, or a line is none.
        OptionError: If standard input cannot be read.
    """
    return [parse_prompt(line, keeps_answer=True) for line in read_lines(path, "--prompts")]


def read_questions(prompts: str) -> list[Question]:
    """Read the questions of ``--prompts`` of ``speclm bench``.

    Args:
        prompts: Name of a bundled set, or a file in one of the layouts of `parse_questions`, or
            `STANDARD_INPUT`.

    Raises:
        OptionError: If no set has that name, the set is not bundled, or standard input cannot be
            read.
        DataError: If the file cannot be read, is empty, or has a line of another layout.
    """
    if prompts in QUESTION_SETS:
        return load_questions(prompts)
    path = Path(prompts)
    if prompts == HUMANEVAL:
        raise OptionError(
            f"--prompts is {HUMANEVAL!r}, which is not bundled; download data/HumanEval.jsonl.gz "
            "of https://github.com/openai/human-eval, unpack it with gunzip, and pass the file: "
            "--prompts HumanEval.jsonl"
        )
    if path != STANDARD_INPUT and len(path.parts) == 1 and not path.suffix and not path.exists():
        known = (*QUESTION_SETS, HUMANEVAL)
        raise OptionError(
            f"--prompts is {prompts!r}, expected a file or one of the sets {list(known)!r}; "
            "correct the name or the path"
        )
    return parse_questions(read_lines(path, "--prompts"))


def read_lines(path: Path, option: str) -> list[JsonLine]:
    """Read the JSON lines of the file or standard input that an option names.

    Raises:
        DataError: If the file cannot be read or is empty.
        OptionError: If standard input cannot be read.
    """
    if path == STANDARD_INPUT:
        lines = split_json_lines(read_input(option), name="standard input")
    else:
        lines = read_json_lines(path)
    if not lines:
        raise DataError(f"{option} {str(path)!r} is empty, expected one JSON object a line")
    return lines


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """Return the single prompt, given as a text, a file or standard input.

    Raises:
        OptionError: If none or two are given, or the file cannot be read.
    """
    if (prompt is None) == (file is None):
        raise OptionError("expected exactly one of --prompt and --file; pass one of them")
    if file is None:
        return str(prompt)
    try:
        content = read_input("--file") if file == STANDARD_INPUT else file.read_bytes()
        return content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(
            f"--file {str(file)!r} cannot be read ({error}); name a text file in UTF-8"
        ) from error


def read_input(option: str) -> bytes:
    """Return the content of standard input.

    Args:
        option: Option whose value is ``-``, for messages.

    Raises:
        OptionError: If standard input is closed.
    """
    if sys.stdin is None:
        raise OptionError(f"{option} is '-' and standard input is closed; name a file")
    return sys.stdin.buffer.read()


def positive_numbers(text: str) -> list[int]:
    """Return the numbers of ``--batch``.

    Raises:
        OptionError: If one is not positive.
    """
    parts = text.split(",")
    wrong = [part for part in parts if not re.fullmatch("[0-9]{1,9}", part) or int(part) < 1]
    if wrong:
        raise OptionError(
            f"--batch has {wrong[0][:40]!r}, expected positive numbers such as 1,4; correct it"
        )
    return [int(part) for part in parts]


def prepare_file(option: str, path: Path, *, flag: str | None = None, makes: bool = False) -> None:
    """Check that a file can be written, and make its folder if it is missing.

    A user at a terminal is asked before more than one folder is made.

    Args:
        option: Option that names the file, for messages.
        path: The file, which may exist.
        flag: Option that makes all folders without asking; None if there is none.
        makes: Whether that option is given.

    Raises:
        OptionError: If the file cannot be written, or several folders are missing and must not be
            made.
    """
    folder = path.absolute().parent
    try:
        if path.exists() and not path.is_file():
            raise OptionError(
                f"{option} is {str(path)!r}, which is a folder or a device, expected a file; name "
                "one"
            )
        missing = _missing(folder)
        if len(missing) > 1 and not makes and not _is_confirmed(missing):
            alternative = f", or pass {flag}" if flag else ""
            raise OptionError(
                f"{option} is {str(path)!r}, whose folder is to be in {str(missing[-1])!r}, which "
                f"does not exist; correct the path, make {str(folder)!r} first{alternative}"
            )
        _try_to_write(folder)
    except OSError as error:
        raise OptionError(
            f"{option} {str(path)!r} cannot be written ({error}); name a file in a folder that "
            "you may write to"
        ) from error


def require_folder_to_write(option: str, folder: Path) -> None:
    """Check that files can be written into a folder, without leaving anything there.

    Args:
        option: Option that names the folder, for messages.
        folder: The folder, which may be missing.

    Raises:
        OptionError: If nothing can be written there.
    """
    try:
        missing = _missing(folder.absolute())
        _try_to_write(folder)
        for made in missing:
            made.rmdir()
    except OSError as error:
        raise OptionError(
            f"{option} {str(folder)!r} cannot be written to ({error}); name a folder that you may "
            "write to"
        ) from error


def _missing(folder: Path) -> list[Path]:
    """Return the missing ones of a folder and its parents, innermost first."""
    return [part for part in (folder, *folder.parents) if not part.exists()]


def _try_to_write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=folder):
        pass


def _is_confirmed(missing: list[Path]) -> bool:
    """Return whether a user at a terminal agrees to make folders."""
    if sys.stdin is None or not sys.stdin.isatty():
        return False
    try:
        return typer.confirm(f"make {len(missing)} folders, from {missing[-1]} on?", err=True)
    except typer.Abort:
        return False
