"""Options that several commands have, and how lists of numbers are read."""

import re
from typing import Annotated

import typer

from speclm.errors import OptionError

MOST = 2**31 - 1
"""Of any number that becomes one of 32 bits somewhere."""

MaxNewTokens = Annotated[int, typer.Option(min=1, max=MOST)]
Seed = Annotated[int, typer.Option(min=0, max=MOST)]
Threads = Annotated[int | None, typer.Option(min=1, max=1024, help="Threads of PyTorch.")]


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
