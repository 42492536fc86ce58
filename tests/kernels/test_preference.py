"""What models use on which device, and how to override it."""

import pytest
import torch

from speclm.errors import KernelError
from speclm.kernels import preference
from speclm.kernels.preference import attention_obstacle, pays, preferred

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the checks answer as on a GPU."""
    monkeypatch.setattr(preference, "triton_obstacle", lambda device, dtype=None: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")


@pytest.fixture(autouse=True)
def _left_to_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPECLM_KERNELS", raising=False)


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
    monkeypatch.setattr(preference, "triton_obstacle", lambda device: "Triton is not installed")
    assert preferred(GPU).backend == "sdpa"
    assert preferred(GPU).reason == "Triton is not installed"


@pytest.mark.parametrize("name", ["triton", "sdpa", "reference"])
def test_environment_overrides_the_device(name, monkeypatch):
    monkeypatch.setenv("SPECLM_KERNELS", name)
    for device in (CPU, GPU):
        assert preferred(device).backend == name
        assert "SPECLM_KERNELS asks for it" in preferred(device).reason
        assert pays(device) == (name != "sdpa")


def test_unknown_name_in_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv("SPECLM_KERNELS", "tritno")
    with pytest.raises(KernelError, match=r"SPECLM_KERNELS is 'tritno', expected one of"):
        preferred(CPU)


def test_layers_that_the_kernel_does_not_take_are_told_apart(monkeypatch):
    monkeypatch.setenv("SPECLM_KERNELS", "reference")
    assert attention_obstacle(CPU, torch.float64, 40) is None
    monkeypatch.setenv("SPECLM_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert attention_obstacle(CPU, torch.float32, 128) is None
    assert "heads of" in attention_obstacle(CPU, torch.float32, 40)
    assert "float16, bfloat16 and float32" in attention_obstacle(CPU, torch.float64, 128)
