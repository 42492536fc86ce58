"""The guards of conftest.py do guard."""

import os
import socket
import sys

import jaxtyping
import pytest
import torch
from coverage.tracer import CTracer

from tests.conftest import CHECKED_CASES, IS_DEEP, untraced
from tests.network_guard import refused_network

IS_CHECKED = os.environ.get("SPECLM_TYPECHECK") != "0"


@pytest.mark.skipif(not IS_CHECKED, reason="shape checks are off")
@pytest.mark.parametrize("case", range(CHECKED_CASES + 1))
def test_shapes_are_checked_in_the_first_cases_of_a_test(case):
    assert any(type(finder).__name__ == "_JaxtypingFinder" for finder in sys.meta_path)
    assert jaxtyping.config.jaxtyping_disable == (case >= CHECKED_CASES and not IS_DEEP)


def test_coverage_is_not_measured_while_a_model_generates_by_itself():
    assert not isinstance(traced_by(None), CTracer)
    assert traced_by(lambda *_, **__: None) is sys.gettrace()


def traced_by(custom_generate):
    """Return what traces the forwards of a call, and check that it goes on afterwards."""
    before, found = sys.gettrace(), []

    def generate(_, *, custom_generate):
        found.append(sys.gettrace())
        raise KeyError

    with pytest.raises(KeyError):
        untraced(generate)(None, custom_generate=custom_generate)
    assert sys.gettrace() is before
    return found[0]


def test_one_thread_is_used():
    assert torch.get_num_threads() == 1


def test_loopback_may_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()


def test_every_test_is_guarded_from_the_network():
    assert socket.getaddrinfo.__module__ == refused_network.__module__
    assert socket.socket.connect.__module__ == refused_network.__module__


def test_reaching_for_the_network_fails_even_when_the_error_is_swallowed():
    expected = r"reached for the network: \[\('192.0.2.1',\)\]"
    refusal = "may not reach the network"
    with (
        pytest.raises(AssertionError, match=expected),
        refused_network(),
        pytest.raises(OSError, match=refusal),
    ):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
