"""The target's side of a call, from its prompt and the way that drafts are verified."""

import torch
from transformers.cache_utils import Cache, DynamicCache

from speclm.cache import import_cache, import_obstacle
from speclm.errors import UnsupportedModelError
from speclm.generation.regular import NeedsRegularGeneration, cached_length
from speclm.generation.request import Prompt, Setup
from speclm.self_check.verdict import Verification
from speclm.target import Session, position_shift
from speclm.target.chain_session import ChainSession
from speclm.target.session import TreeSession


def open_session(prompt: Prompt, setup: Setup) -> Session:
    """Return a session for a prompt; it continues from the caller's cache, if any.

    Raises:
        NeedsRegularGeneration: If it cannot use that cache, or images shift the positions
            of a model whose rotation depends on the length.
    """
    target, inputs, cache = setup.target, prompt.model_inputs, prompt.cache
    shift = position_shift(inputs.get("position_ids"), prompt.num_padding, num_tokens=prompt.length)
    if shift is not None and target.rotary_switch is not None:
        raise NeedsRegularGeneration("rope scaling by length, and positions that images shift")
    if setup.verification is Verification.CHAINS:
        own = inputs.keys() - prompt.images.keys() - {"inputs_embeds"}
        try:
            return ChainSession(
                target,
                {name: inputs[name] for name in own},
                images=prompt.images,
                num_cached=cached_length(cache),
                is_callers=cache is not None,
            )
        except UnsupportedModelError as error:
            raise NeedsRegularGeneration(str(error)) from error
    for made in inputs.values():
        if cache is None and isinstance(made, Cache) and type(made) is not DynamicCache:
            raise NeedsRegularGeneration(
                f"the model makes itself a cache of type {type(made).__name__}"
            )
    static = setup.static
    # Autocast chooses types by operation, and storage has one.
    is_cast = torch.is_autocast_enabled(prompt.num_padding.device.type)
    if static is not None and (static.obstacle is not None or shift is not None or is_cast):
        static = None
    tree_cache = target.new_cache(
        prompt.num_padding, allocate=None if static is None else static.allocate
    )
    tree_cache.position_shift = shift
    if cache is not None:
        obstacle = import_obstacle(
            cache,
            num_layers=target.num_layers,
            batch=len(prompt.num_padding),
            num_tokens=prompt.length,
        )
        if obstacle is not None:
            raise NeedsRegularGeneration(f"the given cache {obstacle}")
        import_cache(tree_cache, cache, room=prompt.length)
    return TreeSession(
        target,
        tree_cache,
        attention_mask=inputs.get("attention_mask"),
        position_ids=inputs.get("position_ids"),
        images=prompt.images,
        static=static,
    )
