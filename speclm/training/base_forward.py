"""Forwards of a base that trains heads: its hidden states, and its logits from them."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from speclm.target import TargetFeatures, TargetView
from speclm.target.features import FeatureTap


@torch.no_grad()
def run_decoder(
    view: TargetView,
    input_ids: Int[Tensor, "batch seq"],
    attention_mask: Int[Tensor, "batch seq"],
    layers: tuple[int, ...],
) -> Float[Tensor, "batch seq features"]:
    """Run the decoder of a frozen base, and return hidden states of it on its device.

    Args:
        view: The base.
        input_ids: Texts, padded on the right.
        attention_mask: 1 at tokens, 0 at padding.
        layers: The hidden states wanted, joined in this order, see `TargetFeatures`.
    """
    taken: list[Tensor] = []
    tap = FeatureTap(TargetFeatures(layers), is_own=lambda: True, take=taken.append)
    with tap.on(view.decoder, view.num_layers):
        view.decoder(
            input_ids=input_ids.to(view.device),
            attention_mask=attention_mask.to(view.device),
            use_cache=False,
        )
    (states,) = taken
    return states


def base_logits(view: TargetView, states: Tensor) -> Tensor:
    """Return a base's logits for hidden states that may have another dtype or device."""
    return view.head_logits(states.to(view.device, view.model.dtype)).to(states.device)


def last_hidden(
    view: TargetView,
    input_ids: Int[Tensor, "batch seq"],
    attention_mask: Int[Tensor, "batch seq"],
) -> Float[Tensor, "tokens hidden"]:
    """Return the input of a model's output matrix, without computing logits."""
    output = view.decoder(
        input_ids=input_ids.to(view.device),
        attention_mask=attention_mask.to(view.device),
        use_cache=False,
    )
    hidden: Tensor = output[0]
    return hidden.flatten(0, 1)


def recompute_activations(model: PreTrainedModel) -> None:
    """Let a model recompute the activations of its layers in the backward pass."""
    # The second is its name in older versions of Transformers.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    next(getattr(model, name) for name in names if hasattr(model, name))()
