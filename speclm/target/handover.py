"""What a generation leaves in a key/value cache that outlives it."""

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache

from speclm.cache.exchange import export_cache
from speclm.cache.tree_cache import TreeCache
from speclm.target.view import TargetView


def hand_over(
    target: TargetView,
    cache: TreeCache,
    into: DynamicCache,
    sequences: Int[Tensor, "batch length"],
) -> None:
    """Extend a Transformers cache to what plain decoding of the same tokens leaves in it.

    That is all but the last token of every row: what is sampled last is never fed.

    Args:
        target: Model that the caches are of.
        cache: Cache whose last paths are committed; rows that ended early may be short.
        into: Cache that holds the first slots of the same rows, or none yet.
        sequences: Prompts and new tokens, ended rows padded on the right.
    """
    fed = sequences[:, :-1]
    fill_rows(target, cache, fed)
    export_cache(cache, into, length=fed.shape[1])


def fill_rows(target: TargetView, cache: TreeCache, tokens: Int[Tensor, "batch seq"]) -> None:
    """Run what the cache lacks of each row of `tokens` through the model, in one forward.

    Plain decoding feeds padding to rows that have ended, until the last one ends; this leaves the
    same in the cache. Pending nodes are forgotten. Nothing runs when no row lacks a token.
    """
    missing = [max(tokens.shape[1] - length, 0) for length in cache.host_lengths]
    num_nodes = max(missing)
    if num_nodes == 0:
        return
    cache.keep([[] for _ in missing])
    steps = torch.arange(num_nodes, device=tokens.device)
    # A row that lacks fewer repeats its last slot, at a position that the model surely has.
    slots = (cache.lengths[:, None] + steps).clamp_(max=tokens.shape[1] - 1)
    target.forward_nodes(
        tokens.gather(1, slots),
        (steps[:, None] >= steps)[None],
        slots - cache.lengths[:, None],
        cache,
        num_logits=1,
    )
    cache.keep([range(count) for count in missing])
