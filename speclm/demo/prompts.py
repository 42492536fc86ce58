"""Conversations to try the bundled models on."""

from speclm.demo._assets import assets
from speclm.errors import OptionError
from speclm.json_lines import read_json_lines


def load_prompts(name: str, *, limit: int | None = None) -> list[list[dict[str, str]]]:
    """Read the conversations of one bundled set, each without its final assistant turn.

    Args:
        name: ``sql_dev`` or ``gsm8k_dev`` to report on; ``sql_tune`` or ``gsm8k_tune`` to choose
            settings with, which the draft model never trained on either.
        limit: Number of conversations to keep from the start; None keeps all.

    Returns:
        Messages with ``role`` and ``content``, as chat templates take them.

    Raises:
        OptionError: No set has that name, or ``limit`` is negative.

    Example:
        >>> [message["role"] for message in load_prompts("sql_dev", limit=1)[0]]
        ['system', 'user']
    """
    files = {path.stem: path for path in assets()["prompts"].glob("*.jsonl")}
    if name not in files:
        raise OptionError(f"expected prompts named one of {sorted(files)}, found {name!r}")
    if limit is not None and limit < 0:
        raise OptionError(f"expected limit to be at least 0 or None, found {limit!r}")
    lines = read_json_lines(files[name])
    return [line.parse()["messages"][:-1] for line in lines[:limit]]
