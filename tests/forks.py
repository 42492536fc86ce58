"""Runs code in the child of a fork."""

import os
import pickle
import select
import signal
import traceback
from collections.abc import Callable
from typing import Any

SECONDS = 60


def in_child(call: Callable[[], Any]) -> Any:
    """Return what a call returns in the child of a fork, and fail if it never does.

    Python warns of forks in a process with threads: a test that calls this ignores that warning.
    """
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            message = pickle.dumps((True, call()))
        except BaseException:  # noqa: BLE001 - the child must not go on in the test run
            message = pickle.dumps((False, traceback.format_exc()))
        os.write(writable, message)
        os._exit(0)
    os.close(writable)
    try:
        ready, _, _ = select.select([readable], [], [], SECONDS)
        assert ready, "the child hangs"
        is_well, found = pickle.loads(os.read(readable, 1 << 16))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(readable)
    assert is_well, found
    return found
