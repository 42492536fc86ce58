r"""Read files of JSON lines: one object per line, where only ``\n`` ends a line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speclm.errors import DataError
from speclm.files.atomic import load_json

_GZIP = b"\x1f\x8b"  # first bytes of such a file


@dataclass(frozen=True, slots=True)
class JsonLine:
    """A line that is not blank.

    Args:
        content: Bytes in the file, without the line end.
        where: File and line number, for messages.
    """

    content: bytes
    where: str

    def parse(self) -> dict[str, Any]:
        """Return the object in the line.

        Raises:
            DataError: If it holds anything else, or a string that is not Unicode text.
        """
        try:
            value = load_json(self.content.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.where}: expected UTF-8 text, found {self.excerpt} ({error}); save the file "
                "as UTF-8"
            ) from error
        except ValueError as error:
            raise DataError(
                f"{self.where}: expected a JSON object, found {self.excerpt} ({error}); correct or "
                "drop the line"
            ) from error
        if not isinstance(value, dict):
            raise DataError(
                f"{self.where}: expected a JSON object, found {self.excerpt}; correct or drop the "
                "line"
            )
        return value

    @property
    def excerpt(self) -> str:
        """The start of the line, for messages."""
        return repr(self.content[:60].decode("utf-8", errors="replace"))


def read_json_lines(path: str | Path) -> list[JsonLine]:
    r"""Read the lines of a file that are not blank, without parsing them.

    Lines end at ``\n`` or ``\r\n``. Strings may hold any other character that ends a line
    elsewhere, such as U+2028.

    Args:
        path: The file; a byte order mark at its start is dropped.

    Raises:
        DataError: If the file cannot be read, or is compressed.
    """
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise DataError(f"{path} cannot be read ({error}); name a file of JSON lines") from error
    return split_json_lines(content, name=str(path))


def split_json_lines(content: bytes, *, name: str) -> list[JsonLine]:
    """Return the lines of file content that are not blank, as `read_json_lines` does.

    Args:
        content: Bytes of a file or of standard input.
        name: Name of the file, for messages.

    Raises:
        DataError: If the content is compressed.
    """
    if content.startswith(_GZIP):
        raise DataError(
            f"{name} is compressed by gzip, expected JSON lines; unpack it with gunzip, and pass "
            "the unpacked file"
        )
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return [
        JsonLine(line.removesuffix(b"\r"), f"{name}:{number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]


def parse_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """Read and parse all lines of a file that are not blank.

    Args:
        path: The file.

    Raises:
        DataError: If the file cannot be read, or a line is not a JSON object.
    """
    return [line.parse() for line in read_json_lines(path)]
