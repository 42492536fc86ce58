"""A generation over a target that takes trees."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from typing_extensions import override

from speclm.cache.tree_cache import TreeCache
from speclm.target.handover import hand_over
from speclm.target.session import Session
from speclm.target.view import TargetView
from speclm.tree.topology import TreeTopology


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
