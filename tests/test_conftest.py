"""The guards of conftest.py do guard."""

import os
import socket
import sys

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import CHECKED_CASES, IS_DEEP
from tests.network_guard import refused_network
from tests.tracing import (
    TRACED_EXAMPLES,
    TRACED_GENERATIONS,
    generation_traced,
    is_traced,
    trace_few_examples,
)

IS_CHECKED = os.environ.get("SPECLM_TYPECHECK") != "0"


@pytest.mark.skipif(not IS_CHECKED, reason="shape checks are off")
@pytest.mark.parametrize("case", range(CHECKED_CASES + 1))
def test_shapes_are_checked_in_the_first_cases_of_a_test(case):
    assert any(type(finder).__name__ == "_JaxtypingFinder" for finder in sys.meta_path)
    assert jaxtyping.config.jaxtyping_disable == (case >= CHECKED_CASES and not IS_DEEP)


def tracers(function, *, num_calls, **given):
    """Return what traces each of some calls, all of which raise, and that it goes on afterwards."""
    before, found = sys.gettrace(), []

    def traced(**_):
        found.append(sys.gettrace())
        raise KeyError

    wrapped = function(traced)
    for _ in range(num_calls):
        with pytest.raises(KeyError):
            wrapped(**given)
        assert sys.gettrace() is before
    return found


def test_coverage_is_measured_in_the_first_calls_of_our_decoding_only():
    assert tracers(generation_traced, num_calls=2) == [None, None]
    found = tracers(generation_traced, num_calls=5, custom_generate=print)
    assert found == [sys.gettrace()] * TRACED_GENERATIONS + [None] * (5 - TRACED_GENERATIONS)


def test_coverage_is_measured_in_the_first_examples_of_a_property():
    found = []

    @given(st.integers())
    def every(_):
        found.append(sys.gettrace())

    trace_few_examples(every)
    trace_few_examples(every)  # of the next case
    every()
    assert found[:TRACED_EXAMPLES] == [sys.gettrace()] * TRACED_EXAMPLES
    assert set(found[TRACED_EXAMPLES:]) == {None}


@pytest.fixture
def is_traced_in_setup():
    return is_traced()


@pytest.mark.untraced
def test_coverage_is_measured_neither_in_a_marked_test_nor_in_its_fixtures(is_traced_in_setup):
    assert not is_traced_in_setup
    assert not is_traced()


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
