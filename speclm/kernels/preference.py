"""Whether the forwards of models go through kernels, or through PyTorch alone."""

import torch

from speclm.kernels.backends import (
    NAMES,
    VARIABLE,
    Choice,
    forced_backend,
    head_obstacle,
    triton_obstacle,
)


def preferred(device: torch.device) -> Choice:
    """Return what computes attention of trees in models on a device, and why.

    On a GPU that is the Triton kernel. On a CPU it is PyTorch's attention with a mask that is made
    once for all layers. The environment variable ``SPECLM_KERNELS`` overrides both.

    Raises:
        KernelError: If the variable holds no backend's name.
    """
    asked = forced_backend(NAMES)
    if asked is not None:
        return Choice(asked, f"{VARIABLE} asks for it")
    if device.type == "cpu":
        return Choice("sdpa", "the model is on a CPU")
    obstacle = triton_obstacle(device)
    if obstacle is not None:
        return Choice("sdpa", obstacle)
    return Choice("triton", f"the model is on {torch.cuda.get_device_name(device)}")


def pays(device: torch.device) -> bool:
    """Whether models on a device are better off with kernels of ours."""
    return preferred(device).backend != "sdpa"


def attention_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Say why layers of a kind cannot be computed by the preferred kernel; None where they can."""
    if preferred(device).backend == "reference":
        return None
    return triton_obstacle(device, dtype) or head_obstacle(head_dim)
