"""Runs EAGLE heads down the levels of one draft."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from speclm.cache.tree_cache import TreeCache
from speclm.methods.eagle.network import EagleHeads


class LevelRun:
    """What is the same at all levels of a draft, and what one level leaves to the next.

    Slot depths and positions of all levels are known before the first, so that rotations are
    computed once; a level's mask is its parents' rows of the one above.
    """

    def __init__(
        self,
        heads: EagleHeads,
        cache: TreeCache,
        *,
        hidden: Float[Tensor, "batch hidden"],
        widths: list[int],
        embedding: Callable[[Tensor], Tensor],
    ) -> None:
        """Start at the roots.

        Args:
            heads: The network.
            cache: Its committed slots; no node may be pending.
            hidden: Output of the slot before each root.
            widths: Most nodes of each level to come.
            embedding: See `EagleHeads.embed`.
        """
        self._heads, self._cache, self._embedding = heads, cache, embedding
        self.hidden: Float[Tensor, "batch nodes hidden"] = hidden[:, None]
        """Outputs of the nodes that were fed last; at first, of the slot before the root."""
        self._level = 0
        self._seen = self._seen_by_root(widths)
        if widths:
            cache.reserve(sum(widths))
            first = cache.lengths - cache.num_padding
            depths = torch.arange(len(widths), device=first.device)
            self._rotation = heads.rotation((first[:, None] + depths).clamp(min=0))

    def below(
        self, tokens: Int[Tensor, "batch width"], parents: Int[Tensor, "batch width"]
    ) -> Float[Tensor, "batch width hidden"]:
        """Feed the next level, whose nodes become pending.

        Args:
            tokens: The target's tokens.
            parents: Place of each one's parent among the nodes fed last.
        """
        level, width = self._level, tokens.shape[1]
        size = self.hidden.shape[2]
        above = self.hidden.gather(1, parents[:, :, None].expand(-1, -1, size))
        cosines, sines = self._rotation
        self.hidden = self._heads(
            above,
            self._heads.embed(tokens, embedding=self._embedding),
            rotation=(cosines[:, level : level + 1], sines[:, level : level + 1]),
            attention_mask=self._bias(parents),
            past_key_values=self._cache,
        )
        self._cache.append(width)
        self._level += 1
        return self.hidden

    def _seen_by_root(self, widths: list[int]) -> Float[Tensor, "batch 1 slots"] | None:
        """Return the mask of all slots of the draft in scores; None for chains that see all."""
        cache, window = self._cache, self._heads.config.sliding_window
        reach = cache.tree_start + len(widths)
        is_whole = not cache.is_ragged and not cache.has_padding
        if is_whole and max(widths, default=1) == 1 and (window is None or reach <= window):
            return None
        lengths = cache.lengths[:, None]
        slots = torch.arange(cache.tree_start + sum(widths), device=lengths.device)
        sees = (slots >= cache.num_padding[:, None]) & (slots < lengths)
        if window is not None:
            levels = [level for level, width in enumerate(widths) for _ in range(width)]
            pending = lengths + torch.tensor(levels, device=lengths.device, dtype=torch.long)
            prefix = slots[: cache.tree_start].expand(len(lengths), -1)
            self._places = torch.cat([prefix, pending], dim=1)  # of a row, padding included
        seen = torch.zeros(sees.shape, dtype=self._heads.dtype, device=sees.device)
        return seen.masked_fill_(~sees, torch.finfo(seen.dtype).min)[:, None]

    def _bias(
        self, parents: Int[Tensor, "batch width"]
    ) -> Float[Tensor, "batch 1 width kv_len"] | None:
        if self._seen is None:
            return None
        cache, width = self._cache, parents.shape[1]
        own = cache.tree_start + cache.num_pending
        seen = self._seen.gather(1, parents[:, :, None].expand(-1, -1, self._seen.shape[2]))
        seen.narrow(2, own, width).diagonal(dim1=1, dim2=2).zero_()
        window = self._heads.config.sliding_window
        if window is not None:
            behind = cache.lengths[:, None] + self._level - self._places
            seen.masked_fill_((behind >= window)[:, None], torch.finfo(seen.dtype).min)
        self._seen = seen
        return seen.narrow(2, 0, own + width)[:, None]
