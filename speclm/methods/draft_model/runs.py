"""Runs of a draft model in one draft: by its network, or by its own forward."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from speclm.cache.tree_cache import TreeCache
from speclm.devices import upload
from speclm.drafting.levels import seen_below
from speclm.methods.draft_model.network import DraftNetwork
from speclm.target import TargetView


class LevelRun(ABC):
    """Runs a draft model in one draft.

    Attributes:
        best: Log-probabilities and tokens of the best children of the nodes that were fed last, if
            the run ranks them.
    """

    best: tuple[Float[Tensor, "batch width ranks"], Int[Tensor, "batch width ranks"]] | None = None

    @abstractmethod
    def catch_up(self, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch 1 vocab"]:
        """Feed the unseen tokens, padded at their end, and return the logits after the last."""

    @abstractmethod
    def below(
        self, tokens: Int[Tensor, "batch width"], parents: Int[Tensor, "batch width"]
    ) -> Float[Tensor, "batch width vocab"]:
        """Feed the next level and return its logits.

        Args:
            tokens: Its tokens.
            parents: Index of each one's parent in the last level.
        """


class NetworkRun(LevelRun):
    """Runs a network in one draft: first the tokens that it has not seen, then level by level.

    Rotations of all levels are looked up once. The mask of a level is made of its parents' rows in
    the mask of the level above.
    """

    def __init__(
        self,
        network: DraftNetwork,
        cache: TreeCache,
        num_unseen: list[int],
        *,
        depth: int,
        max_nodes: int,
        is_chain: bool,
    ) -> None:
        """Prepare a draft.

        Args:
            network: The network.
            cache: See `ModelRun`.
            num_unseen: See `ModelRun`.
            depth: Maximum levels below the root.
            max_nodes: Maximum nodes that are fed below the root.
            is_chain: Whether no level has siblings.
        """
        self._network, self._cache = network, cache
        self._num_unseen, self._level = num_unseen, 0
        longest, start = max(num_unseen), cache.tree_start
        self._views = network.views(cache, num_new=longest - cache.num_pending + max_nodes)
        is_even = min(num_unseen) == longest
        self._sees_all = is_even and not cache.is_ragged and not cache.has_padding
        cosines, sines = network.rotation(start + longest + depth)
        if self._sees_all:
            cosines, sines = (p.narrow(1, start, longest + depth) for p in (cosines, sines))
        else:
            counts = upload(num_unseen, cache.lengths.device)
            positions = self._positions(counts, depth=depth)
            cosines, sines = cosines[0, positions], sines[0, positions]
        sizes = [longest, *[1] * depth]
        by_level = torch.split(cosines, sizes, dim=1), torch.split(sines, sizes, dim=1)
        self._rotations = list(zip(*by_level, strict=True))
        self._seen = None
        if not self._sees_all:
            self._seen = self._seen_by_root(counts, start + longest + max_nodes)
        elif not is_chain:
            self._seen = self._nothing(len(num_unseen), 1, start + longest + max_nodes)
            self._seen[:, :, : start + longest] = 0

    @override
    def catch_up(self, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch 1 vocab"]:
        (batch, longest), bias = tokens.shape, self._causal_bias(tokens.shape[1])
        hidden = self._run(tokens, bias)
        if longest > 1:
            hidden = last_of(hidden.view(batch, longest, -1), self._num_unseen)[:, 0]
        return self._network.logits(hidden, self._views, batch=batch)

    @override
    def below(
        self, tokens: Int[Tensor, "batch width"], parents: Int[Tensor, "batch width"]
    ) -> Float[Tensor, "batch width vocab"]:
        self._level += 1
        hidden = self._run(tokens, self._bias(parents))
        return self._network.logits(hidden, self._views, batch=len(tokens))

    def _run(self, tokens: Tensor, bias: Tensor | None) -> Float[Tensor, "rows hidden"]:
        rotation = self._rotations[self._level]
        return self._network.forward(
            tokens, self._views, rotation=rotation, bias=bias, cache=self._cache
        )

    def _positions(
        self, num_unseen: Int[Tensor, " batch"], *, depth: int
    ) -> Int[Tensor, "batch positions"]:
        """Return the positions of the longest row's unseen tokens, then those of each level."""
        cache, longest = self._cache, max(self._num_unseen)
        order = torch.arange(max(longest, depth), device=num_unseen.device)
        order = order.expand(len(num_unseen), -1)
        depths = torch.cat([order[:, :longest], num_unseen[:, None] + order[:, :depth]], dim=1)
        first = cache.lengths - cache.num_padding
        return (first[:, None] + depths).clamp_(min=0)

    def _nothing(self, *shape: int) -> Tensor:
        """Return an additive mask under which nothing is seen."""
        dtype, device = self._network.dtype, self._cache.lengths.device
        return torch.full(shape, torch.finfo(dtype).min, dtype=dtype, device=device)

    def _seen_by_root(
        self, num_unseen: Int[Tensor, " batch"], kv_len: int
    ) -> Float[Tensor, "batch 1 kv_len"]:
        cache, start = self._cache, self._cache.tree_start
        seen = self._nothing(len(num_unseen), 1, kv_len)
        kv_indices = torch.arange(kv_len, device=num_unseen.device)
        sees = (kv_indices >= cache.num_padding[:, None]) & (kv_indices < cache.lengths[:, None])
        sees |= (kv_indices >= start) & (kv_indices < start + num_unseen[:, None])
        return seen.masked_fill_(sees[:, None], 0)

    def _causal_bias(self, num_new: int) -> Float[Tensor, "mask_rows 1 new kv_len"] | None:
        if self._sees_all and num_new == 1:
            return None
        start = self._cache.tree_start
        if self._sees_all:
            return self._nothing(1, 1, num_new, start + num_new).triu_(1 + start)
        assert self._seen is not None
        before = self._seen[:, :, :start].expand(-1, num_new, -1)
        among = self._nothing(1, num_new, num_new).triu_(1).expand(len(before), -1, -1)
        return torch.cat([before, among], dim=2)[:, None]

    def _bias(
        self, parents: Int[Tensor, "batch width"]
    ) -> Float[Tensor, "batch 1 width kv_len"] | None:
        if self._seen is None:
            return None
        cache, width = self._cache, parents.shape[1]
        own = cache.tree_start + cache.num_pending
        if width > 1 or self._seen.shape[1] > 1:
            indices = parents[:, :, None].expand(-1, -1, self._seen.shape[2])
            self._seen = self._seen.gather(1, indices)
        self._seen.narrow(2, own, width).diagonal(dim1=1, dim2=2).zero_()
        return self._seen.narrow(2, 0, own + width)[:, None]


class ModelRun(LevelRun):
    """Calls the model itself."""

    def __init__(
        self, view: TargetView, cache: TreeCache, num_unseen: list[int], *, is_chain: bool
    ) -> None:
        """Prepare a draft.

        Args:
            view: The draft model.
            cache: Its cache; at most the roots are pending.
            num_unseen: Number of each row's last tokens, the root among them, that are pending or
                will be after `catch_up`.
            is_chain: Whether no level has siblings.
        """
        device, longest = cache.lengths.device, max(num_unseen)
        self._view, self._cache, self._num_unseen, self._level = view, cache, num_unseen, 0
        # In a chain, if all rows have equally many unseen tokens, every node sees all that is
        # pending.
        self._is_chain = is_chain and min(num_unseen) == longest
        self._counts = upload(num_unseen, device)
        self._depths = torch.arange(longest, device=device).expand(len(num_unseen), -1)
        self._seen = (self._depths < self._counts[:, None])[:, None]  # by the root

    @override
    def catch_up(self, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch 1 vocab"]:
        longest = tokens.shape[1]
        causal = torch.ones(1, longest, longest, dtype=torch.bool, device=tokens.device).tril()
        logits = self._view.forward_nodes(tokens, causal, self._depths[:1], self._cache)
        return last_of(logits, self._num_unseen)

    @override
    def below(
        self, tokens: Int[Tensor, "batch width"], parents: Int[Tensor, "batch width"]
    ) -> Float[Tensor, "batch width vocab"]:
        if not self._is_chain:
            self._seen = seen_below(self._seen, parents)
        depths = (self._counts + self._level)[:, None].expand_as(tokens)
        self._depths, self._level = torch.cat([self._depths, depths], dim=1), self._level + 1
        seen = None if self._is_chain else self._seen
        return self._view.forward_nodes(tokens, seen, self._depths, self._cache)


def last_of(
    states: Float[Tensor, "batch seq size"], counts: list[int]
) -> Float[Tensor, "batch 1 size"]:
    """Return the last state of each row, whose length is given."""
    if min(counts) == states.shape[1]:
        return states[:, -1:]
    rows = torch.arange(len(counts), device=states.device)
    return states[rows, upload([count - 1 for count in counts], states.device)][:, None]
