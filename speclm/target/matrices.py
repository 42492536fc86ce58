"""The embeddings and the output matrix of a model, which may be quantised or offloaded."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from speclm.errors import UnsupportedModelError


def head_shape(model: PreTrainedModel) -> tuple[int, int]:
    """Return the widths of a model's logits and of the hidden states that its head reads."""
    head, config = _head(model), model.config.get_text_config()
    weight = stored_matrix(head)
    if weight is not None:
        return weight.shape[0], weight.shape[1]
    sizes = getattr(head, "out_features", None), getattr(head, "in_features", None)
    return sizes[0] or int(config.vocab_size), sizes[1] or int(config.hidden_size)


def embedding_matrix(model: PreTrainedModel) -> Float[Tensor, "vocab hidden"]:
    """Return the weight of a model's embeddings.

    Raises:
        UnsupportedModelError: If it is quantised or offloaded.
    """
    return _require_matrix(model.get_input_embeddings(), "embeddings", model)


def output_matrix(model: PreTrainedModel) -> Float[Tensor, "vocab hidden"]:
    """Return the weight of a model's head.

    Raises:
        UnsupportedModelError: If it is quantised or offloaded.
    """
    return _require_matrix(_head(model), "output embeddings", model)


def stored_matrices(model: PreTrainedModel) -> dict[str, Tensor | None]:
    """Return embeddings and output matrix, as `EagleCheckpoint.share` takes them."""
    embeddings = stored_matrix(model.get_input_embeddings())
    return {"embeddings": embeddings, "lm_weight": stored_matrix(_head(model))}


def stored_matrix(module: nn.Module | None) -> Tensor | None:
    """Return the weight of a head or of embeddings; None where it is not a matrix of numbers.

    Quantised modules have codes instead, under any name.
    """
    weight = getattr(module, "weight", None)  # a method in PyTorch's own quantised modules
    is_matrix = isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point()
    return weight if is_matrix else None


def _head(model: PreTrainedModel) -> nn.Module | None:
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return head


def _require_matrix(module: nn.Module | None, role: str, model: PreTrainedModel) -> Tensor:
    weight = stored_matrix(module)
    if weight is None or weight.is_meta:
        name = model.config.name_or_path or type(model).__name__
        found = "quantised" if weight is None else "offloaded"
        raise UnsupportedModelError(
            f"{role} of {name} are a {type(module).__name__}, {found}, expected a module whose "
            "weight is a matrix of floating point numbers in memory, because heads compute with "
            "it; load the base with this module as it is, or take heads with a matrix of their own"
        )
    return weight


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
