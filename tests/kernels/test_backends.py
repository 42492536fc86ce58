"""Which backend is chosen, and what is said about it."""

import logging

import pytest
import torch

from speclm.errors import KernelError
from speclm.kernels import backends
from speclm.kernels.backends import (
    VARIABLE,
    choose,
    forced_backend,
    head_obstacle,
    is_interpreting,
    is_recording,
    triton_obstacle,
)

CPU = torch.device("cpu")
ALL = ("triton", "sdpa", "reference")
TWO = ("triton", "reference")
FREE = dict.fromkeys(ALL)


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backends._log_once.cache_clear()


def test_the_preferred_backend_is_chosen_silently(caplog):
    with caplog.at_level(logging.INFO, "speclm"):
        choice = choose("auto", names=ALL, obstacles=FREE)
    assert (choice.backend, choice.reason) == ("triton", "runs on this device")
    assert not caplog.records


def test_another_one_is_logged_once_for_each_reason(caplog):
    with caplog.at_level(logging.INFO, "speclm"):
        for obstacle in ("too old", "too old", "too new"):
            choice = choose("auto", names=ALL, obstacles=FREE | {"triton": obstacle})
            assert (choice.backend, choice.reason) == ("sdpa", obstacle)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["kernels run on sdpa: too old", "kernels run on sdpa: too new"]


def test_all_reasons_against_the_preferred_ones_are_given():
    choice = choose("auto", names=ALL, obstacles=FREE | {"triton": "too old", "sdpa": "no sinks"})
    assert (choice.backend, choice.reason) == ("reference", "too old; no sinks")


@pytest.mark.parametrize("name", ALL)
def test_a_backend_that_is_asked_for_is_used(name, monkeypatch):
    assert choose(name, names=ALL, obstacles=FREE).backend == name
    monkeypatch.setenv(VARIABLE, name)
    assert choose("auto", names=ALL, obstacles=FREE).backend == name
    assert choose("sdpa", names=ALL, obstacles=FREE).backend == "sdpa"  # the caller comes first


def test_a_backend_that_is_asked_for_and_cannot_compute_is_an_error(monkeypatch):
    obstacles = FREE | {"sdpa": "PyTorch's attention has no sinks"}
    with pytest.raises(KernelError, match=r"'sdpa' cannot be used: .* no sinks; leave it out"):
        choose("sdpa", names=ALL, obstacles=obstacles)
    monkeypatch.setenv(VARIABLE, "sdpa")
    with pytest.raises(KernelError, match=f"'sdpa' cannot be used: .* no sinks; unset {VARIABLE}"):
        choose("auto", names=ALL, obstacles=obstacles)


def test_an_unknown_name_is_an_error_wherever_it_comes_from(monkeypatch):
    with pytest.raises(KernelError, match=r"backend is 'cuda', expected one of \['auto', 'triton"):
        choose("cuda", names=ALL, obstacles=FREE)
    with pytest.raises(KernelError, match=r"backend is 'sdpa', expected one of"):
        choose("sdpa", names=TWO, obstacles=FREE)
    monkeypatch.setenv(VARIABLE, "cuda")
    with pytest.raises(KernelError, match=f"{VARIABLE} is 'cuda', expected one of"):
        choose("auto", names=TWO, obstacles=FREE)


def test_no_backend_that_computes_is_an_error():
    obstacles = {"triton": "too old", "sdpa": "no sinks"}
    with pytest.raises(KernelError, match=r"no backend .*triton: too old; sdpa: no sinks"):
        choose("auto", names=("triton", "sdpa"), obstacles=obstacles)


@pytest.mark.parametrize(
    ("asked", "names", "forced"),
    [
        (None, ALL, None),
        ("auto", ALL, None),
        ("triton", TWO, "triton"),
        ("sdpa", ALL, "sdpa"),
        ("sdpa", TWO, "reference"),
        ("triton", ("reference",), "reference"),
    ],
)
def test_a_name_that_an_op_lacks_stands_for_the_next_plainer_one(asked, names, forced, monkeypatch):
    if asked is not None:
        monkeypatch.setenv(VARIABLE, asked)
    assert forced_backend(names) == forced


def test_triton_takes_a_cpu_only_in_its_interpreter(monkeypatch):
    assert triton_obstacle(CPU) == "Triton has no CPU backend"
    assert not is_interpreting()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_obstacle(CPU) is None
    assert is_interpreting()


def test_triton_takes_types_heads_and_devices_that_it_is_tested_on(monkeypatch):
    assert "not torch.float64" in triton_obstacle(CPU, torch.float64)
    assert "not tested on mps" in triton_obstacle(torch.device("mps"))
    assert head_obstacle(128) is None
    assert "not 100" in head_obstacle(100)
    monkeypatch.setattr(backends, "_has_triton", lambda: False)
    assert "not installed" in triton_obstacle(torch.device("cuda"))


@pytest.mark.parametrize(
    ("capability", "hip", "obstacle"),
    [((7, 5), None, "T4 is older than compute capability 8.0"), ((8, 0), None, None),
     ((7, 5), "6.4", None)],
)  # fmt: skip
def test_triton_takes_gpus_that_it_compiles_for(capability, hip, obstacle, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "T4")
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(backends, "_has_triton", lambda: True)
    backends._cuda_obstacle.cache_clear()
    found = triton_obstacle(torch.device("cuda", 0))
    backends._cuda_obstacle.cache_clear()
    assert found == obstacle or obstacle in found


def test_nothing_is_read_while_a_graph_is_recorded(monkeypatch):
    assert not is_recording(CPU)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert is_recording(torch.device("cuda"))
    assert not is_recording(CPU)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert is_recording(CPU)
