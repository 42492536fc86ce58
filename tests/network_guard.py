"""Keeps tests on this machine."""

import ipaddress
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest


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


@contextmanager
def refused_network() -> Iterator[None]:
    """Refuse to look up or reach other machines, and fail at the end if anything tried to."""
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

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, guard_method(getattr(socket.socket, name)))
        patch.setattr(socket, "getaddrinfo", guarded_resolve)
        yield
    # Libraries turn a failed connection into "not found": what was refused is reported here.
    assert not refused, f"the test reached for the network: {refused}"
