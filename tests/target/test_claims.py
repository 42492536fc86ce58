"""One generation has its objects, whatever else fails meanwhile, and others follow in order."""

import gc
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from speclm.errors import BusyError
from speclm.target import NestedError, claims, exclusive


@pytest.fixture(autouse=True)
def _nothing_is_queued():
    """Wait for what threads of other tests still generate."""
    gc.collect()
    wait_for(lambda: claims._QUEUE == [])


def wanting(*things: object) -> list[tuple[object, str]]:
    return [(thing, "org/model") for thing in things]


def start(call: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(1e-3)


@contextmanager
def held_elsewhere(*things: object) -> Iterator[threading.Event]:
    """Have another thread hold objects until the block ends or the event is set."""
    has_it, may_end = threading.Event(), threading.Event()

    def hold() -> None:
        with exclusive(wanting(*things)):
            has_it.set()
            may_end.wait(60)

    thread = start(hold)
    assert has_it.wait(60)
    try:
        yield may_end
    finally:
        may_end.set()
        thread.join(60)


def require_free(*things: object) -> None:
    with exclusive(wanting(*things), waits=False):
        pass
    assert claims._QUEUE == []


def test_object_is_free_again_after_an_error():
    claimed = object()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), exclusive(wanting(claimed)):
            raise ZeroDivisionError
    require_free(claimed)


def test_second_claim_in_one_thread_is_nested_and_names_the_object():
    claimed = object()
    with exclusive(wanting(claimed)):
        for waits in (True, False):
            with (
                pytest.raises(NestedError, match=r"org/model is generating already, in this th"),
                exclusive(wanting(object(), claimed), waits=waits),
            ):
                pass
        with exclusive(wanting(object())):
            pass
    require_free(claimed)


def test_claim_of_another_thread_is_named_where_nobody_waits():
    claimed = object()
    message = r"org/model .*in thread 'Thread-.*busy='wait'"
    with (
        held_elsewhere(claimed),
        pytest.raises(BusyError, match=message) as caught,
        exclusive(wanting(claimed), waits=False),
    ):
        pass
    assert not isinstance(caught.value, NestedError)
    require_free(claimed)


def test_threads_get_an_object_in_the_order_of_their_calls_and_one_line_says_so(caplog):
    one, two, order = object(), object(), []

    def run(name: str, *things: object) -> None:
        with exclusive(wanting(*things)):
            order.append(name)

    calls = {"a": (one,), "b": (one, two), "c": (two,), "d": (one,)}
    with caplog.at_level(logging.DEBUG, "speclm"), held_elsewhere(one):
        threads = []
        for name, things in calls.items():
            num_queued = len(claims._QUEUE)
            threads.append(start(lambda name=name, things=things: run(name, *things)))
            wait_for(lambda num_queued=num_queued: len(claims._QUEUE) > num_queued)
        run("elsewhere", object())  # what nobody wants is had at once
        assert order == ["elsewhere"]
    for thread in threads:
        thread.join(60)
    assert order[1:3] == ["a", "b"]  # c and d want nothing of each other's
    assert sorted(order[3:]) == ["c", "d"]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(calls)
    assert lines[0].startswith("waiting for org/model, which is generating in thread 'Thread-")
    require_free(one, two)


def test_thread_that_has_an_object_does_not_wait_for_another():
    """Or two of them would wait for each other."""
    own, other = object(), object()
    with held_elsewhere(other), exclusive(wanting(own)):
        with pytest.raises(NestedError, match="does not wait"), exclusive(wanting(other)):
            pass
        with pytest.raises(NestedError), exclusive(wanting(other), waits=False):
            pass
    require_free(own, other)


def test_interrupt_ends_the_wait_and_those_behind_go_on():
    claimed, main = object(), threading.main_thread().ident
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        require_interruptible(claimed, main)
    finally:
        signal.signal(signal.SIGINT, before)


def require_interruptible(claimed: object, main: int | None) -> None:
    with held_elsewhere(claimed) as may_end:

        def interrupt() -> None:
            wait_for(lambda: len(claims._QUEUE) == 2)
            signal.pthread_kill(main, signal.SIGINT)

        start(interrupt)
        with pytest.raises(KeyboardInterrupt), exclusive(wanting(claimed)):
            pytest.fail("another thread has it")
        assert len(claims._QUEUE) == 1
        behind = start(lambda: require_free_later(claimed))
        wait_for(lambda: len(claims._QUEUE) == 2)
        may_end.set()
        behind.join(60)
        assert not behind.is_alive()
    require_free(claimed)


def require_free_later(claimed: object) -> None:
    with exclusive(wanting(claimed)):
        pass


def _interrupted(call: Callable[[], object], *, at: int) -> bool:
    """Return whether a call is interrupted before the instruction `at` of what it runs."""
    num_seen, previous = 0, sys.gettrace()

    def trace(frame: Any, event: str, argument: object) -> Any:
        nonlocal num_seen
        if not frame.f_code.co_filename.endswith(("claims.py", "forking.py", "contextlib.py")):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            num_seen += 1
            if num_seen == at + 1:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(previous)
    return False


@pytest.mark.untraced
def test_interrupt_at_any_instruction_frees_the_object_and_wakes_the_next():
    claimed, at = object(), 0

    def claim() -> None:
        with exclusive(wanting(claimed)):
            pass

    while _interrupted(claim, at=at):
        with exclusive(wanting(claimed), waits=False):
            pass
        at += 1
    assert at > 100
    require_free(claimed)
