"""The head of a model: its matrices, and logits from hidden states."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from speclm.errors import UnsupportedModelError
from speclm.forking import temporary

_HEAD_SETTINGS = (
    "final_logit_softcapping",
    "lm_head_multiplier",
    "logit_scale",
    "logits_scale",
    "logits_scaling",
    "logits_soft_cap",
    "output_multiplier",
)
"""Settings of configs that change the product of the head, or its input."""


def find_decoder(model: PreTrainedModel) -> nn.Module:
    """Return the module whose output a model's head reads.

    Raises:
        UnsupportedModelError: If there is none.
    """
    found: nn.Module = cast("Any", model).get_decoder()
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if found is not model and found is not head:
        return found
    for child in model.children():  # the model uses names that Transformers does not look for
        if isinstance(child, PreTrainedModel):
            return child
    raise UnsupportedModelError(
        f"{type(model).__name__} has no decoder next to its head, so there are no hidden states to "
        "draft from; draft with a draft model or n-grams"
    )


def logits_from(
    model: PreTrainedModel, hidden: Float[Tensor, "*rows hidden"]
) -> Float[Tensor, "*rows vocab"]:
    """Return the logits that a model computes from hidden states after the final norm.

    The hidden states may have another dtype than the model's.
    """
    weight = stored_matrix(model.get_output_embeddings())  # type: ignore[no-untyped-call]
    flat = hidden.reshape(-1, hidden.shape[-1]).to(model.dtype if weight is None else weight.dtype)
    if _has_plain_head(model):
        head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        logits: Tensor = head(flat)
    else:  # the model's own code applies its softcap or scale
        with _stubbed(find_decoder(model), flat[None]):
            logits = model(input_ids=flat.new_zeros(1, len(flat), dtype=torch.long)).logits
    return logits.view(*hidden.shape[:-1], logits.shape[-1])  # there may be no rows


def _has_plain_head(model: PreTrainedModel) -> bool:
    """Return whether logits are only the product of the head."""
    config = model.config.get_text_config()
    return all(getattr(config, name, None) in {None, 1.0} for name in _HEAD_SETTINGS)


def product_weight(model: PreTrainedModel) -> Float[Tensor, "vocab hidden"] | None:
    """Return the matrix with which a head only multiplies hidden states; None if it does more."""
    head = _head(model)
    if type(head) is not nn.Linear or type(head.weight) is not nn.Parameter:
        return None
    if head._forward_hooks or head._forward_pre_hooks or replaced_forward(head):
        return None
    has_bias = cast("Tensor | None", head.bias) is not None
    is_product = not has_bias and not head.weight.is_meta and _has_plain_head(model)
    return head.weight.detach() if is_product else None


def logits_map(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """Return `logits_from` for one model as it is now, with which each call takes less time."""
    weight = product_weight(model)
    if weight is None:
        return partial(logits_from, model)
    transposed = weight.t()
    return lambda hidden: hidden.to(transposed.dtype) @ transposed


def embedding_map(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """Return the look-up of rows in a model's stored embeddings, as they are now.

    Raises:
        UnsupportedModelError: If they are quantised or offloaded.
    """
    weight = embedding_matrix(model)
    return lambda tokens: F.embedding(tokens, weight)


def replaced_forward(module: nn.Module) -> object:
    """Return the `forward` that was set on a module object, if any."""
    found = module.__dict__.get("forward")
    return found if found is None else getattr(found, "stands_for", found)


@contextmanager
def _stubbed(decoder: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Make a decoder return the given hidden states in this thread, whatever its inputs."""
    before = vars(decoder).get("forward")  # somebody's wrapper
    own, thread = decoder.forward, threading.current_thread()

    def forward(*arguments: Any, **named: Any) -> Any:
        if threading.current_thread() is not thread:
            return own(*arguments, **named)
        # Mixtures of experts read more of the output; the fields are None in either case.
        return MoeModelOutputWithPast(last_hidden_state=hidden)

    cast("Any", forward).stands_for = before

    def restore() -> None:
        if vars(decoder).get("forward") is not forward:
            return
        if before is None:
            del decoder.forward  # an instance attribute that hid the class's method
        else:
            decoder.forward = before

    with temporary(restore):
        decoder.forward = forward
        yield


def head_shape(model: PreTrainedModel) -> tuple[int, int]:
    """Return the width of a model's logits and of the hidden states that its head reads."""
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
    """Return embeddings and output matrix as arguments of `EagleCheckpoint.share`."""
    embeddings = stored_matrix(model.get_input_embeddings())
    return {"embeddings": embeddings, "lm_weight": stored_matrix(_head(model))}


def stored_matrix(module: nn.Module | None) -> Tensor | None:
    """Return the weight of a head or of embeddings; None if it is quantised."""
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
    """Return the device for a model's inputs."""
    device = model.device
    if device.type != "meta":
        return device
    # The outermost hook may leave the device to hooks of inner modules.
    used = (_execution_device(module) for module in model.modules())
    return next((found for found in used if found is not None), device)


def _execution_device(module: nn.Module) -> torch.device | None:
    """Return the device on which accelerate runs a module; None if its hooks name none."""
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):  # one, or several in a row
        device = getattr(each, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return None
