"""Inputs of a prompt besides its tokens: images, and their positions."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

_IMAGE_POSITIONS = frozenset(
    {"image_grid_thw", "mm_token_type_ids", "second_per_grid_ts", "video_grid_thw"}
)
"""Inputs that regular generation also passes after the prompt. Models compute position ids from
them, which `generate` has resolved."""


def images_obstacle(
    model: PreTrainedModel,
    tokens: Tensor,
    inputs: Mapping[str, Any],
    images: Mapping[str, Any],
) -> str | None:
    """Return why later tokens need a prompt's images, other than through the cache.

    Compares the model inputs that the model itself prepares for the next token.

    Args:
        model: The target.
        tokens: The prompts ``[batch, seq]``.
        inputs: Model inputs that `generate` has resolved.
        images: Those of the inputs that belong to images.

    Returns:
        None if only the forward over the prompt needs the images. Syncs.
    """
    later, positions = dict(inputs), inputs.get("position_ids")
    if positions is not None:
        positions = positions[..., -1:] + 1
        later["position_ids"] = torch.cat([inputs["position_ids"], positions], dim=-1)
    step = cast("Any", model).prepare_inputs_for_generation(
        tokens[:, -1:], next_sequence_length=1, is_first_iteration=False, **later
    )
    again = sorted(
        name for name in images if step.get(name) is not None and name not in _IMAGE_POSITIONS
    )
    if again:
        return f"model input {again[0]!r}"
    if positions is None:
        counts_itself = not _IMAGE_POSITIONS.isdisjoint(images)
    else:
        counts_itself = not torch.equal(step["position_ids"], positions)
    if counts_itself:
        return f"model input {min(images)!r}, after which the model counts positions itself"
    return None


def with_images(
    model: PreTrainedModel, tokens: Tensor, images: Mapping[str, Any], inputs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the inputs that regular generation passes to the model for a prompt.

    Args:
        model: The target.
        tokens: The prompts ``[batch, seq]``.
        images: Inputs only for the prompt.
        inputs: Inputs for every forward.
    """
    prepare = cast("Any", model).prepare_inputs_for_generation
    resolved: dict[str, Any] = prepare(
        tokens, use_cache=True, is_first_iteration=True, **inputs, **images
    )
    return resolved


def position_shift(
    position_ids: Tensor | None, num_padding: Tensor, *, num_tokens: int
) -> Tensor | None:
    """Return the difference between positions after a prompt and slots without padding.

    An image may take fewer positions than slots.

    Args:
        position_ids: Position ids of the prompt, from `generate`, ``[*axes, batch, seq]``.
        num_padding: Padding slots of each row.
        num_tokens: Slots of the prompt.

    Returns:
        Numbers to add, ``[*axes, batch]``; None if all positions count slots. Syncs.
    """
    if position_ids is None:
        return None
    shift = position_ids[..., -1] - (num_tokens - 1 - num_padding)
    is_counted = ~shift.any()
    if position_ids.shape[-1] == num_tokens:  # else they are only those of new slots
        slots = torch.arange(num_tokens, device=num_padding.device) - num_padding[:, None]
        is_counted &= ((position_ids == slots) | (slots < 0)).all()
    return None if bool(is_counted) else shift
