"""Where a model computes, which is not where its weights lie when accelerate offloads them."""

import torch
from torch import nn
from transformers import PreTrainedModel


def device_of(model: PreTrainedModel) -> torch.device:
    """Return the device that a model's inputs are fed on."""
    device = model.device
    if device.type != "meta":
        return device
    # The outermost hook may leave it to those of the modules inside.
    used = (_execution_device(module) for module in model.modules())
    return next((found for found in used if found is not None), device)


def _execution_device(module: nn.Module) -> torch.device | None:
    """Return where accelerate runs a module, None where its hooks do not say."""
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):  # one, or several in a row
        device = getattr(each, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return None
