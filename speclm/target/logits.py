"""How a model gets from hidden states to logits."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from speclm.errors import UnsupportedModelError
from speclm.forking import temporary
from speclm.target.matrices import stored_matrix

_HEAD_SETTINGS = (
    "final_logit_softcapping",
    "lm_head_multiplier",
    "logit_scale",
    "logits_scale",
    "logits_scaling",
    "logits_soft_cap",
    "output_multiplier",
)
"""Names under which configs hold what a model does to its head's product, or before it."""


def find_decoder(model: PreTrainedModel) -> nn.Module:
    """Return the module whose output a model's head reads.

    Raises:
        UnsupportedModelError: If there is none.
    """
    found: nn.Module = cast("Any", model).get_decoder()
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if found is not model and found is not head:
        return found
    for child in model.children():  # the model goes by other names than Transformers looks for
        if isinstance(child, PreTrainedModel):
            return child
    raise UnsupportedModelError(
        f"{type(model).__name__} has no decoder next to its head, so there are no hidden states to "
        "guess from; guess with a draft model or n-grams"
    )


def logits_from(
    model: PreTrainedModel, hidden: Float[Tensor, "*rows hidden"]
) -> Float[Tensor, "*rows vocab"]:
    """Return the logits that a model computes from hidden states after the final norm.

    The hidden states may have another dtype than the model's.
    """
    weight = stored_matrix(model.get_output_embeddings())  # type: ignore[no-untyped-call]
    flat = hidden.reshape(1, -1, hidden.shape[-1]).to(
        model.dtype if weight is None else weight.dtype
    )
    if _has_plain_head(model):
        head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        logits: Tensor = head(flat)
    else:  # the model's own code knows its softcap or scale
        with _stubbed(find_decoder(model), flat):
            logits = model(input_ids=flat.new_zeros(flat.shape[:2], dtype=torch.long)).logits
    return logits.view(*hidden.shape[:-1], logits.shape[-1])  # there may be no rows


def _has_plain_head(model: PreTrainedModel) -> bool:
    """Whether logits are the head's product and nothing else."""
    config = model.config.get_text_config()
    return all(getattr(config, name, None) in {None, 1.0} for name in _HEAD_SETTINGS)


def replaced_forward(module: nn.Module) -> object:
    """Return the `forward` that a module object was given in place of its class's, if any."""
    found = module.__dict__.get("forward")
    return found if found is None else getattr(found, "stands_for", found)


@contextmanager
def _stubbed(decoder: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Let a decoder return the given hidden states to this thread, whatever it is called with."""
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
