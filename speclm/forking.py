"""Temporary changes, undone in the child of a fork for threads that do not exist there.

`os.fork` copies only the thread that calls it. Temporary changes by other threads are therefore
never undone in the child, and their locks stay locked.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_CHANGES: dict[object, tuple[threading.Thread, Callable[[], object]]] = {}
"""Thread and undo function of each change, in order."""
_RESETS: list[Callable[[], object]] = []


@contextmanager
def temporary(undo: Callable[[], object]) -> Iterator[None]:
    """Call `undo` when the block ends, or in the child of a fork by another thread.

    Args:
        undo: Undoes what the block changes. It may be called twice, and also when the change was
            made only in part or not at all.
    """
    change = object()
    try:
        _CHANGES[change] = threading.current_thread(), undo
        yield
    finally:
        try:
            undo()
        finally:
            _CHANGES.pop(change, None)


def reset_in_children(reset: Callable[[], object]) -> None:
    """Call `reset` in the child of every fork, before temporary changes are undone there."""
    _RESETS.append(reset)


def _clean_child() -> None:
    for reset in _RESETS:
        reset()
    here = threading.current_thread()
    for change, (thread, undo) in reversed(_CHANGES.copy().items()):
        if thread is not here:
            undo()
            _CHANGES.pop(change, None)


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_clean_child)
