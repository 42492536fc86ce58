"""Opens the target's side of a generation, from what Transformers resolved for the model."""

from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from speclm.cache import import_cache
from speclm.errors import UnsupportedModelError
from speclm.generation.delegation import NeedsRegularGeneration, num_slots, require_importable
from speclm.self_check.verdict import Verification
from speclm.target import Session, TargetView, position_shift
from speclm.target.chain_session import ChainSession
from speclm.target.session import TreeSession


def meets_switch(
    target: TargetView, num_padding: Int[Tensor, " batch"], *, start: int, end: int
) -> bool:
    """Return whether the rotation of keys may change while rows grow from `start` to `end` slots.

    Raises:
        NeedsRegularGeneration: If regular generation then reads the text again.
    """
    switch = target.rotary_switch
    if switch is None:
        return False
    shortest = int(num_padding.min())
    is_met = switch.is_met(start - 1 - shortest, end - 1 - shortest)
    # Whether to read again is decided by slots, how to rotate by positions.
    if switch.reads_again and (is_met or switch.is_met(start - 1, end - 1)):
        raise NeedsRegularGeneration(
            f"within max_length the text may outgrow {switch.num_positions} positions, where this "
            "model reads it again"
        )
    return is_met


def open_session(
    target: TargetView,
    backend: Verification,
    inputs: dict[str, Any],
    images: dict[str, Any],
    num_padding: Int[Tensor, " batch"],
    *,
    given: Any,
    num_tokens: int,
) -> Session:
    """Return a session of the backend, with what a cache that was passed in holds.

    Raises:
        NeedsRegularGeneration: If the backend cannot use that cache, or positions switch rotations
            elsewhere than slots.
    """
    batch = len(num_padding)
    shift = position_shift(inputs.get("position_ids"), num_padding, num_tokens=num_tokens)
    if shift is not None and target.rotary_switch is not None:
        raise NeedsRegularGeneration("rope scaling by length, and positions that images shift")
    if backend is Verification.CHAINS:
        inputs = {
            name: value
            for name, value in inputs.items()
            if name != "inputs_embeds" and name not in images
        }
        try:
            return ChainSession(
                target,
                inputs,
                images=images,
                num_cached=num_slots(given),
                is_callers=given is not None,
            )
        except UnsupportedModelError as error:
            raise NeedsRegularGeneration(str(error)) from error
    for made in inputs.values():
        if given is None and isinstance(made, Cache) and type(made) is not DynamicCache:
            raise NeedsRegularGeneration(
                f"the model makes itself a cache of type {type(made).__name__}"
            )
    cache = target.new_cache(num_padding)
    cache.position_shift = shift
    if given is not None:
        require_importable(given, target.num_layers, batch=batch, num_tokens=num_tokens)
        import_cache(cache, given, room=num_tokens)
    return TreeSession(
        target,
        cache,
        attention_mask=inputs.get("attention_mask"),
        position_ids=inputs.get("position_ids"),
        images=images,
    )
