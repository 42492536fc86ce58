"""What every test runs under: shape checks, one thread, no network, hypothesis profiles.

This file is imported before any test module, hence before ``speclm``: the shape checks are put in
while a module is imported, and cannot be added to one that already is.
"""

import atexit
import ipaddress
import os
import shutil
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Self

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tests start subprocesses
# Self-checks of this run alone, subprocesses included: nothing old is read, no home is written to.
os.environ["SPECLM_CACHE"] = tempfile.mkdtemp(prefix="speclm-tests-")

import hypothesis
import jaxtyping
import pytest
import torch
import transformers.generation.utils  # noqa: F401 - below the hook it would be compiled anew
from beartype import BeartypeConf, FrozenDict, beartype

atexit.register(shutil.rmtree, os.environ["SPECLM_CACHE"], ignore_errors=True)

# beartype knows what Self means where it decorates a class; the hook gives it the methods alone.
check_types = beartype(conf=BeartypeConf(hint_overrides=FrozenDict({Self: Any})))

if os.environ.get("SPECLM_TYPECHECK") != "0":
    jaxtyping.install_import_hook("speclm", f"{__name__}.check_types")

torch.set_num_threads(1)  # sums in one order; several test runs share few cores

hypothesis.settings.register_profile("dev", max_examples=25, deadline=None)
hypothesis.settings.register_profile(
    "ci", max_examples=100, deadline=None, derandomize=True, print_blob=True
)
hypothesis.settings.register_profile("deep", max_examples=5000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


TRACED_CASES = 2  # of a parametrised test


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Measure coverage in the first cases of a test alone: a traced case takes twice as long."""
    num_cases: Counter[str] = Counter()
    for item in items:
        test = item.nodeid.partition("[")[0]
        num_cases[test] += 1
        if num_cases[test] > TRACED_CASES:
            item.add_marker("no_cover")


def _is_local(address: Any) -> bool:
    """Return whether a socket address (a path, or a host and port) stays on this machine."""
    if not isinstance(address, tuple):
        return True  # a Unix socket
    host = address[0] or "localhost"
    if isinstance(host, bytes):
        host = host.decode()
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@pytest.fixture(autouse=True)
def _no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test that looks up or reaches another machine, unless it is marked ``network``."""
    if request.node.get_closest_marker("network"):
        yield
        return
    refused: list[Any] = []

    def refuse(address: Any) -> None:
        if not _is_local(address):
            refused.append(address)
            raise OSError(f"tests may not reach the network: {address!r}")

    def guard_method(original: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(self: socket.socket, address: Any) -> Any:
            refuse(address)
            return original(self, address)

        return guarded

    resolve = socket.getaddrinfo

    def guarded_resolve(host: Any, *args: Any, **kwargs: Any) -> Any:
        refuse((host,))
        return resolve(host, *args, **kwargs)

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, guard_method(getattr(socket.socket, name)))
    monkeypatch.setattr(socket, "getaddrinfo", guarded_resolve)
    yield
    # Libraries turn a failed connection into "not found": what was refused is reported here.
    assert not refused, f"the test reached for the network: {refused}"


@pytest.fixture
def no_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every model checked: for tests that plant a fault and build a `SpecModel`."""
    monkeypatch.setenv("SPECLM_CACHE", "")


@pytest.fixture(autouse=True)
def _drafts_in_every_round(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft whether it pays or not: the times of tiny models say nothing, and forwards are counted.

    Tests of pausing itself are left alone.
    """
    pausing = sys.modules.get("speclm.adaptive.pausing")  # None where the test decodes nothing
    if pausing is not None and "pausing" not in request.path.name:
        monkeypatch.setattr(pausing.Pausing, "wants_draft", lambda _: True)
        monkeypatch.setattr(pausing.Pausing, "record", lambda _, **__: None)
