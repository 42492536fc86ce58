"""What a prompt consists of next to its tokens: images, and inputs that say where they are."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

_PLACES = frozenset({"image_grid_thw", "mm_token_type_ids", "second_per_grid_ts", "video_grid_thw"})
"""Inputs that regular generation goes on to hand over, though text has no images. Models take
positions from them, which `generate` has resolved."""


def images_obstacle(
    model: PreTrainedModel,
    tokens: Tensor,
    inputs: Mapping[str, Any],
    images: Mapping[str, Any],
) -> str | None:
    """Say what of a prompt's images matters to the tokens behind it, other than through the cache.

    The model is asked what it would be given with the next token.

    Args:
        model: The target.
        tokens: The prompts ``[batch, seq]``.
        inputs: What `generate` resolved for the model.
        images: Those among the inputs that text does not have.

    Returns:
        None when the forward over the prompt is all that needs the images. Syncs.
    """
    later, positions = dict(inputs), inputs.get("position_ids")
    if positions is not None:
        positions = positions[..., -1:] + 1
        later["position_ids"] = torch.cat([inputs["position_ids"], positions], dim=-1)
    step = cast("Any", model).prepare_inputs_for_generation(
        tokens[:, -1:], next_sequence_length=1, is_first_iteration=False, **later
    )
    again = sorted(name for name in images if step.get(name) is not None and name not in _PLACES)
    if again:
        return f"model input {again[0]!r}"
    if positions is None:
        counts_itself = not _PLACES.isdisjoint(images)
    else:
        counts_itself = not torch.equal(step["position_ids"], positions)
    if counts_itself:
        return f"model input {min(images)!r}, behind which the model counts positions itself"
    return None


def with_images(
    model: PreTrainedModel, tokens: Tensor, images: Mapping[str, Any], inputs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what regular generation gives the model for a prompt.

    Args:
        model: The target.
        tokens: The prompts ``[batch, seq]``.
        images: What is for the prompt alone.
        inputs: What is for every forward.
    """
    prepare = cast("Any", model).prepare_inputs_for_generation
    resolved: dict[str, Any] = prepare(
        tokens, use_cache=True, is_first_iteration=True, **inputs, **images
    )
    return resolved


def position_shift(
    position_ids: Tensor | None, num_padding: Tensor, *, num_tokens: int
) -> Tensor | None:
    """Return how far positions behind a prompt are from counting slots without padding.

    An image may take fewer positions than slots.

    Args:
        position_ids: Of the prompt, as `generate` resolves them, ``[*axes, batch, seq]``.
        num_padding: Padding slots of each row.
        num_tokens: Slots of the prompt.

    Returns:
        Numbers to add, ``[*axes, batch]``; None where positions count slots throughout. Syncs.
    """
    if position_ids is None:
        return None
    shift = position_ids[..., -1] - (num_tokens - 1 - num_padding)
    is_counted = ~shift.any()
    if position_ids.shape[-1] == num_tokens:  # else they are of new slots only
        slots = torch.arange(num_tokens, device=num_padding.device) - num_padding[:, None]
        is_counted &= ((position_ids == slots) | (slots < 0)).all()
    return None if bool(is_counted) else shift
