"""Which backend is chosen for kernels and models, and how to override it."""

import logging

import pytest
import torch

from speclm.errors import KernelError
from speclm.kernels import backends
from speclm.kernels.backends import (
    NAMES,
    VARIABLE,
    attention_obstacle,
    choose,
    head_obstacle,
    is_interpreting,
    is_recording,
    pays,
    preferred,
    require_backend_name,
    triton_obstacle,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backends._log_once.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """Have the checks answer as on a GPU."""
    monkeypatch.setattr(backends, "triton_obstacle", lambda device, dtype=None: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")


def test_the_triton_kernel_is_chosen_silently(caplog):
    with caplog.at_level(logging.INFO, "speclm"):
        choice = choose("auto", None)
    assert (choice.backend, choice.reason) == ("triton", "runs on this device")
    assert not caplog.records


def test_the_reference_is_logged_once_for_each_reason(caplog):
    with caplog.at_level(logging.INFO, "speclm"):
        for obstacle in ("too old", "too old", "too new"):
            choice = choose("auto", obstacle)
            assert (choice.backend, choice.reason) == ("reference", obstacle)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["kernels run on reference: too old", "kernels run on reference: too new"]


def test_a_backend_that_is_asked_for_is_used(monkeypatch):
    assert choose("triton", None).backend == "triton"
    assert choose("reference", None).backend == "reference"
    for name, found in (("triton", "triton"), ("sdpa", "reference"), ("auto", "triton")):
        monkeypatch.setenv(VARIABLE, name)
        assert choose("auto", None).backend == found
        assert choose("reference", None).backend == "reference"  # the caller comes first


def test_a_backend_that_is_asked_for_and_cannot_compute_is_an_error(monkeypatch):
    with pytest.raises(KernelError, match=r"'triton' cannot be used: too old; leave it out"):
        choose("triton", "too old")
    monkeypatch.setenv(VARIABLE, "triton")
    with pytest.raises(KernelError, match=f"'triton' cannot be used: too old; unset {VARIABLE}"):
        choose("auto", "too old")


def test_an_unknown_name_is_an_error_wherever_it_comes_from(monkeypatch):
    for name in ("cuda", "sdpa"):
        with pytest.raises(KernelError, match=rf"backend is '{name}', expected one of \['auto'"):
            choose(name, None)
    with pytest.raises(KernelError, match="backend is 3, expected the name of one"):
        require_backend_name(3)
    monkeypatch.setenv(VARIABLE, "cuda")
    with pytest.raises(KernelError, match=f"{VARIABLE} is 'cuda', expected one of"):
        choose("auto", None)
    with pytest.raises(KernelError, match=f"{VARIABLE} is 'cuda', expected one of"):
        preferred(CPU)


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


def test_cpu_has_pytorchs_attention():
    assert preferred(CPU).backend == "sdpa"
    assert "on a CPU" in preferred(CPU).reason
    assert not pays(CPU)


@pytest.mark.usefixtures("gpu")
def test_gpu_has_the_triton_kernel():
    assert preferred(GPU).backend == "triton"
    assert "NVIDIA H200" in preferred(GPU).reason
    assert pays(GPU)
    assert attention_obstacle(GPU, torch.bfloat16, 128) is None


def test_gpu_without_triton_has_pytorchs_attention_and_says_why(monkeypatch):
    monkeypatch.setattr(backends, "triton_obstacle", lambda device: "Triton is not installed")
    assert preferred(GPU).backend == "sdpa"
    assert preferred(GPU).reason == "Triton is not installed"


@pytest.mark.parametrize("name", NAMES)
def test_environment_overrides_the_device(name, monkeypatch):
    monkeypatch.setenv(VARIABLE, name)
    for device in (CPU, GPU):
        assert preferred(device).backend == name
        assert "SPECLM_KERNELS asks for it" in preferred(device).reason
        assert pays(device) == (name != "sdpa")


def test_layers_that_the_kernel_does_not_take_are_named(monkeypatch):
    monkeypatch.setenv(VARIABLE, "reference")
    assert attention_obstacle(CPU, torch.float64, 40) is None
    monkeypatch.setenv(VARIABLE, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert attention_obstacle(CPU, torch.float32, 128) is None
    assert "heads of" in attention_obstacle(CPU, torch.float32, 40)
    assert "float16, bfloat16 and float32" in attention_obstacle(CPU, torch.float64, 128)
