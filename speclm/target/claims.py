"""Who has a model or a proposer for itself."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from speclm.errors import BusyError


@dataclass(frozen=True, slots=True, eq=False)
class _Claim:
    """Who has an object for itself."""

    claimed: object  # kept here so that its id is no other's
    thread: threading.Thread


_CLAIMS: dict[int, _Claim] = {}
"""Objects that one generation has for itself, by id. No lock, because it could not be pickled and
`setdefault` is atomic."""


@contextmanager
def exclusive(claimed: object, *, name: str) -> Iterator[None]:
    """Have an object for one generation alone, and fail where another has it.

    Args:
        claimed: A model or a proposer, whose state is that of one generation.
        name: What messages call it.

    Raises:
        BusyError: If it is claimed already, in this thread or another.
    """
    claim = _Claim(claimed, threading.current_thread())
    try:
        holder = _CLAIMS.setdefault(id(claimed), claim)
        if holder is not claim:
            place = (
                "this thread, by code that it calls"
                if holder.thread is claim.thread
                else f"thread {holder.thread.name!r}"
            )
            raise BusyError(
                f"{name} is generating already, in {place}; give each thread a model object and "
                "a proposer of its own, or hold a lock around generate, and inside a generation "
                "call the plain base.generate"
            )
        yield
    finally:
        if _CLAIMS.get(id(claimed)) is claim:
            del _CLAIMS[id(claimed)]
