"""The guards of conftest.py do guard."""

import os
import socket
import subprocess
import sys

import pytest
import torch

GUARDED_TEST = """
import socket

def test_swallows_the_refusal():
    try:
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    except OSError:
        pass
"""


@pytest.mark.skipif(os.environ.get("SPECLM_TYPECHECK") == "0", reason="shape checks are off")
def test_shape_checks_are_installed():
    assert any(type(finder).__name__ == "_JaxtypingFinder" for finder in sys.meta_path)


def test_one_thread_is_used():
    assert torch.get_num_threads() == 1


def test_loopback_may_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()


def test_reaching_for_the_network_fails_even_when_the_error_is_swallowed(request, tmp_path):
    (tmp_path / "conftest.py").write_text((request.path.parent / "conftest.py").read_text())
    (tmp_path / "test_guarded.py").write_text(GUARDED_TEST)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    result = subprocess.run(
        [*command, str(tmp_path)], cwd=tmp_path, check=False, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "reached for the network: [('192.0.2.1',)]" in result.stdout
