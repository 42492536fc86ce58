"""Exclusive use of models and proposers by one generation after the other."""

import logging
import threading
from _thread import LockType
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from speclm.attention import active_step
from speclm.errors import BusyError
from speclm.forking import temporary

_log = logging.getLogger("speclm")


class NestedError(BusyError):
    """A call from inside a generation needs an object that it cannot wait for."""


@dataclass(frozen=True, slots=True, eq=False)
class _Ticket:
    """A generation that has its objects, or waits for them.

    Args:
        wanted: The objects and their names by id; kept alive, so that ids stay their own.
        thread: The thread of the generation; a later thread may reuse its number.
        gate: Locked until the generation ends. A ``with`` statement locks and unlocks it, because
            no interrupt can come between a lock and such a statement.
    """

    wanted: dict[int, tuple[object, str]]
    thread: threading.Thread
    gate: LockType = field(default_factory=threading.Lock)

    def shared_name(self, other: "_Ticket") -> str | None:
        """Return the name of an object that both want; None if there is none."""
        return next((name for key, (_, name) in self.wanted.items() if key in other.wanted), None)

    def leave(self) -> None:
        """Leave the queue, if it is in it."""
        with suppress(ValueError):
            _QUEUE.remove(self)


_QUEUE: list[_Ticket] = []
"""Generations in the order of their calls. A generation has its objects when no earlier one wants
any of them, so there is no other state that an interrupt could leave wrong. Adding and removing are
atomic; a lock could not be pickled with a model."""


@contextmanager
def exclusive(wanted: Sequence[tuple[object, str]], *, waits: bool = True) -> Iterator[None]:
    """Hold models and proposers for one generation, all of them at once, first come, first served.

    A waiting thread holds nothing, so no two threads wait for each other.

    Args:
        wanted: Objects that serve one generation at a time, and their names for messages.
        waits: Whether to wait while another thread holds one of them.

    Raises:
        NestedError: If this thread holds one of them, or holds others and would have to wait.
        BusyError: If another thread holds one of them and `waits` is False, or if this thread is
            in a forward of one.
    """
    here = threading.current_thread()
    ticket = _Ticket({id(thing): (thing, name) for thing, name in wanted}, here)
    queue = _QUEUE.copy()
    for ended in [other for other in queue if not other.gate.locked()]:
        ended.leave()  # an interrupt prevented it
    own = [other for other in queue if other.thread is here and other.gate.locked()]
    for outer in own:
        name = ticket.shared_name(outer)
        if name is not None:
            raise _nested(name)
    with temporary(ticket.leave), ticket.gate:
        _QUEUE.append(ticket)
        _wait(ticket, is_nested=bool(own), waits=waits)
        yield


def _wait(ticket: _Ticket, *, is_nested: bool, waits: bool) -> None:
    """Return when no earlier ticket wants an object of this one."""
    queue, has_logged = _QUEUE.copy(), False
    for earlier in queue[: queue.index(ticket)]:
        name = ticket.shared_name(earlier)
        if name is None or not earlier.gate.locked():
            continue
        where = f"in thread {earlier.thread.name!r}"
        if is_nested:
            raise NestedError(
                f"{name} is generating already, {where}, and a call from inside another generation "
                "does not wait"
            )
        if not waits:
            raise BusyError(
                f"{name} is generating already, {where}; call generate with busy='wait', or give "
                "each thread a model object and a proposer of its own"
            )
        if not has_logged:
            has_logged = True
            _log.debug("waiting for %s, which is generating %s", name, where)
        with earlier.gate:  # waits; Ctrl-C interrupts it
            pass


def _nested(name: str) -> BusyError:
    if active_step() is not None:
        return BusyError(
            f"{name} is generating already, in this thread, which is in a forward of that "
            "generation; generate in a logits processor, criterion or streamer, not in a hook"
        )
    return NestedError(f"{name} is generating already, in this thread, and called from inside")
