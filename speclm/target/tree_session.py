"""What a generation leaves in a key/value cache that outlives it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from typing_extensions import override

from speclm.cache.exchange import export_cache
from speclm.cache.tree_cache import TreeCache
from speclm.target.session import Session
from speclm.target.view import TargetView
from speclm.tree.topology import TreeTopology


def hand_over(
    target: TargetView,
    cache: TreeCache,
    into: DynamicCache,
    sequences: Int[Tensor, "batch length"],
) -> None:
    """Extend a Transformers cache to what regular generation of the same tokens leaves in it.

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

    Regular generation feeds padding to rows that have ended, until the last one ends; this leaves
    the same in the cache. Pending nodes are forgotten. Nothing runs when no row lacks a token.
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


class TreeSession(Session):
    """Verifies trees with tree attention over a cache of its own."""

    needs_lockstep = False

    def __init__(
        self,
        target: TargetView,
        cache: TreeCache,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        images: Mapping[str, Any] | None = None,
    ) -> None:
        """Start a generation.

        Args:
            target: The model.
            cache: Empty, or filled with the same number of slots in every row.
            attention_mask: Of the prompt, as Transformers takes it; None when nothing is padding.
            position_ids: Of the prompt, as Transformers takes them; None for the usual ones.
            images: Other inputs of the prompt.
        """
        self._target, self._cache = target, cache
        self._attention_mask, self._position_ids = attention_mask, position_ids
        self._images = images
        self._num_cached = cache.tree_start

    @property
    @override
    def num_cached(self) -> int:
        return self._num_cached

    @property
    @override
    def merges_prompt(self) -> bool:
        return not self._images and self._cache.position_shift is None

    @override
    def prefill(
        self, tokens: Int[Tensor, "batch seq"] | Float[Tensor, "batch seq hidden"]
    ) -> Float[Tensor, "batch 1 vocab"]:
        logits = self._target.prefill(
            tokens,
            self._cache,
            attention_mask=self._attention_mask,
            position_ids=self._position_ids,
            images=self._images,
        )
        self._cache.split(self._cache.tree_start - 1, num_pending=1)
        return logits[:, None]

    @override
    def verify(
        self,
        tokens: Int[Tensor, "batch nodes"],
        topology: TreeTopology,
        *,
        prompt: Int[Tensor, "batch seq"] | None = None,
        max_length: int | None = None,
    ) -> Float[Tensor, "batch nodes vocab"]:
        return self._target.forward_tree(
            tokens, topology, self._cache, prompt=prompt, max_length=max_length
        )

    @override
    def keep(self, paths: Sequence[Sequence[int]]) -> None:
        self._cache.keep(paths)

    @override
    def hand_over(self, into: DynamicCache, sequences: Int[Tensor, "batch length"]) -> None:
        hand_over(self._target, self._cache, into, sequences)

    @override
    def abandon(self) -> None:
        """Has nothing of the caller's: caches are imported by copy."""
