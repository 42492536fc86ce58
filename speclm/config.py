"""Limits of a round and the settings of the built-in proposers, as frozen dataclasses."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, cast

from speclm.errors import OptionError, TreeBudgetError, suggest

MAX_NODES = 512
"""Maximum nodes of one draft, root included; a larger tree costs more than it can gain."""

MAX_LEAD = 64
"""Maximum lead of the fastest row over the slowest, in positions; bounds the noise in memory."""

MAX_DEPTH = MAX_LEAD
"""Maximum levels below the root; a row may not be further ahead than `MAX_LEAD`."""

MAX_MERGED_PROMPT = 1024
"""Longest prompt whose forward also verifies the first draft; that forward needs a dense mask."""


def require_options(options: Iterable[str], known: Iterable[str], *, owner: str) -> None:
    """Check the names of options.

    Args:
        options: Names that were given.
        known: Names that there are.
        owner: What takes the options, for the message.

    Raises:
        OptionError: If one is unknown; the message names those that are known.
    """
    known = sorted(known)
    unknown = sorted({*options} - {*known})
    if unknown:
        raise OptionError(
            f"{owner}: unknown option {unknown[0]!r}, expected some of {known!r}; "
            f"{suggest(unknown[0], known)}"
        )


def require_known(config_type: type, options: Iterable[str], *, owner: str) -> None:
    """Check that options are fields of a config, a dataclass.

    Raises:
        OptionError: If one is not a field; the message lists the fields.
    """
    require_options(options, (option.name for option in fields(config_type)), owner=owner)


def require_in_range(name: str, value: object, *, low: int | float, high: int | float) -> None:
    """Check that an option is a number in ``[low, high]``.

    Raises:
        OptionError: If it is not; the message names the option, the value and the range.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise OptionError(
            f"{name} is {value!r}, a {type(value).__name__}, expected a number from {low!r} to "
            f"{high!r}; choose one in range"
        )
    if not low <= cast("Any", value) <= high:
        raise OptionError(f"{name} is {value!r}, expected {low!r} to {high!r}; choose one in range")


def require_count(name: str, value: object, *, low: int, high: int) -> None:
    """Check that an option is a whole number in ``[low, high]``.

    Raises:
        OptionError: If it is not; the message names the option, the value and the range.
    """
    _require_whole(name, value, f"{low} to {high}")
    require_in_range(name, value, low=low, high=high)


def require_size(name: str, value: object) -> None:
    """Check that a size is a whole number of at least 1.

    Raises:
        OptionError: If it is not.
    """
    _require_whole(name, value, "1 on")
    if cast("int", value) < 1:
        raise OptionError(
            f"{name} is {value!r}, expected at least 1; take it from the model's config"
        )


def require_one_start(
    init: str | None, revision: str | None, sizes: Mapping[str, object], *, owner: str = "heads"
) -> None:
    """Check that options of new heads are not given next to heads to start from.

    Args:
        init: Value of ``--init``.
        revision: Value of ``--init-revision``.
        sizes: Values of the options that only new heads have, by their names; None and False stand
            for those that were not given.
        owner: What is trained, for messages.

    Raises:
        OptionError: If both are given, or a revision without a start.
    """
    if init is None and revision is not None:
        raise OptionError(
            f"--init-revision is {revision!r} without --init, expected {owner} on the hub to go on "
            "from; name them, or leave it out"
        )
    given = [name for name, value in sizes.items() if value is not None and value is not False]
    if init is not None and given:
        raise OptionError(
            f"{given[0]} is {sizes[given[0]]} next to --init {init!r}, whose {owner} keep their "
            "numbers and their vocabulary; leave one of them out"
        )


def require_unicode(name: str, text: str) -> None:
    """Check that a text can be encoded, that is, holds no unpaired surrogate.

    Raises:
        OptionError: If it cannot.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise OptionError(
            f"{name} is no Unicode text: {text[error.start]!r} at character {error.start}, "
            "expected text that was decoded from UTF-8; drop that character"
        ) from error


def require_positive(name: str, value: object) -> None:
    """Check that an option is a finite number above 0.

    Raises:
        OptionError: If it is not.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not 0 < cast("Any", value) < math.inf:
        raise OptionError(
            f"{name} is {value!r}, expected a finite number above 0; choose one such as 0.001 or 2"
        )


def _require_whole(name: str, value: object, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise OptionError(
            f"{name} is {value!r}, a {type(value).__name__}, expected a whole number from "
            f"{expected}; choose one in range"
        )


def require_depth(name: str, depth: Any) -> None:
    """Check that a number of levels fits into a round.

    Raises:
        OptionError: If `depth` is not a whole number.
        TreeBudgetError: If `depth` is below 1 or above `MAX_DEPTH`.
    """
    _require_whole(name, depth, f"1 to {MAX_DEPTH}")
    if not 1 <= depth <= MAX_DEPTH:
        raise TreeBudgetError(
            f"{name} is {depth!r}, a tree may be 1 to {MAX_DEPTH} levels deep; lower {name}"
        )


@dataclass(frozen=True, slots=True)
class ProposerConfig:
    """Settings common to all proposers.

    Args:
        depth: Maximum draft tokens on one path, in ``[1, MAX_DEPTH]``.
    """

    depth: int = 4

    def __post_init__(self) -> None:
        require_depth("depth", self.depth)
