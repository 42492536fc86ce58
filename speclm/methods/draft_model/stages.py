"""Levels of a draft model as stages of fixed shapes, which an engine can compile or record."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad
from typing_extensions import override

from speclm.cache.tree_cache import TreeCache
from speclm.devices import upload
from speclm.engines import Engine, StageRunner
from speclm.engines.engine import Outputs
from speclm.methods.draft_model.network import DraftNetwork
from speclm.methods.draft_model.runs import LevelRun, NetworkRun
from speclm.methods.draft_model.structure import are_alike

UNSEEN = (1, 2, 4, 8, 16)
"""Numbers of unseen tokens that a stage is prepared for; more are read eagerly."""
WIDTHS = (1, 2, 4, 8, 16, 32)
"""Widths of a level that a stage is prepared for; wider drafts run eagerly."""


@dataclass(frozen=True, slots=True)
class Best:
    """Children that a stage ranks by their probability.

    Args:
        num_ranks: Number of them.
        num_columns: Number of leading columns of the logits that count.
    """

    num_ranks: int
    num_columns: int


class DraftStages(StageRunner):
    """Runs a network by an engine, once the stages have computed what the network does.

    Attributes:
        network: The network. Another one, for weights that have changed, needs other stages.
        unproven: Classes of stages that have not been compared yet.
    """

    def __init__(self, network: DraftNetwork, engine: Engine) -> None:
        """Prepare nothing yet."""
        super().__init__(engine, obstacle=engine.obstacle(network.device))
        self.network = network
        self.unproven: set[type[nn.Module]] = {ReadStage, LevelStage}
        self._pairs: dict[Best | None, tuple[ReadStage, LevelStage]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A copy is of another model object: its network is None, so it runs nothing.
        return vars(self) | {"_pairs": {}, "_stages": [], "_storage": {}}

    def pair(self, best: Best | None) -> tuple["ReadStage", "LevelStage"]:
        """Return the stages that rank some children."""
        if best not in self._pairs:
            self._pairs[best] = ReadStage(self.network, best), LevelStage(self.network, best)
        return self._pairs[best]

    def prove(
        self,
        stage: nn.Module,
        inputs: Sequence[Tensor],
        storage: Sequence[Tensor],
        *,
        eager: Callable[[], Tensor],
    ) -> Outputs:
        """Run a stage without the engine, and give up unless its logits are those of a network.

        Args:
            stage: The stage.
            inputs: Its inputs.
            storage: Its storage.
            eager: Runs the network, which overwrites what the stage has written.

        Returns:
            The network's logits, and what the stage returns next to its own if they agree.
        """
        start, found = perf_counter(), None
        try:
            found = stage(*inputs, *storage)
        except Exception as error:  # noqa: BLE001 - also the target's own code may run
            self.give_up(f"a draft over fixed shapes fails: {error}")
        self.engine.build_seconds += perf_counter() - start
        logits = eager()
        if found is None:
            return (logits,)
        if not are_alike(found[0].flatten(0, 1), logits.flatten(0, 1)):
            self.give_up("the draft model computes something else over fixed shapes")
            return (logits,)
        self.unproven.discard(type(stage))
        return (logits, *found[1:])


class StagedRun(LevelRun):
    """Runs stages in one draft, and a `NetworkRun` where an engine cannot.

    Until the stages have been compared, both run, and the network's results count.
    """

    def __init__(
        self,
        stages: DraftStages,
        cache: TreeCache,
        num_unseen: list[int],
        *,
        depth: int,
        width: int,
        best: Best | None,
    ) -> None:
        """Prepare a draft.

        Args:
            stages: The stages.
            cache: See `ModelRun`.
            num_unseen: See `ModelRun`.
            depth: Maximum levels below the root.
            width: Maximum nodes of a level; at most the last of `WIDTHS`.
            best: Which children to rank; None for none.
        """
        self._stages, self._cache, self._num_unseen = stages, cache, num_unseen
        self._read, self._level = stages.pair(best)
        self._depth, self._width = depth, _bucket(width, WIDTHS)
        self._num_read = _bucket(max(num_unseen), UNSEEN)
        cache.reserve(max(self._num_read, *num_unseen) + depth * self._width)
        self._storage = [*cache.parts(), *stages.network.rotation(cache.capacity)]
        counts = _counts(tuple(num_unseen), cache.lengths.device)
        self._rows = [counts, cache.lengths, cache.num_padding]
        self._seen = _nothing((len(num_unseen), self._width, cache.capacity), counts.device)
        self._num_pending, self._num_levels = cache.num_pending, 0
        self._fed: list[tuple[Tensor, ...]] = []
        is_read = cache.num_pending == 0  # otherwise the prompt's forward has read the roots
        needed = {ReadStage, LevelStage} if is_read else {LevelStage}
        is_proven = not needed & stages.unproven
        self._eager = None if is_proven and self._num_read else self._eagerly()

    @override
    def catch_up(self, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch 1 vocab"]:
        padded = tokens
        if tokens.shape[1] < self._num_read:
            padded = pad(tokens, (0, self._num_read - tokens.shape[1]))
        logits, *best = self._run(self._read, [padded, *self._rows], fed=(tokens,))
        self.best = (best[0], best[1]) if best else None
        return logits

    @override
    def below(
        self, tokens: Int[Tensor, "batch width"], parents: Int[Tensor, "batch width"]
    ) -> Float[Tensor, "batch width vocab"]:
        width = tokens.shape[1]
        if width < self._width:
            tokens, parents = (pad(part, (0, self._width - width)) for part in (tokens, parents))
        inputs = [tokens, parents, self._seen, _level(self._num_levels, tokens.device), *self._rows]
        self._num_levels += 1
        logits, *more = self._run(self._level, inputs, fed=(tokens, parents))
        self._seen = more[-1] if more else self._seen
        self.best = (more[0][:, :width], more[1][:, :width]) if len(more) > 1 else None
        return logits if width == self._width else logits[:, :width]

    def _run(self, stage: nn.Module, inputs: list[Tensor], *, fed: tuple[Tensor, ...]) -> Outputs:
        """Return the outputs of a stage; those after the logits only if it ran."""
        if self._eager is None:
            found = self._stages.run(stage, inputs, self._storage)
            if found is not None:
                self._cache.append(fed[0].shape[1])
                self._fed.append(fed)
                return found
            self._eager = self._eagerly()
        run = self._eager
        if not self._num_read or self._stages.obstacle is not None:
            return (_feed(run, fed),)
        return self._stages.prove(stage, inputs, self._storage, eager=lambda: _feed(run, fed))

    def _eagerly(self) -> NetworkRun:
        """Return a run of the network that has been fed what the stages have."""
        self._cache.num_pending = self._num_pending
        run = NetworkRun(
            self._stages.network,
            self._cache,
            self._num_unseen,
            depth=self._depth,
            max_nodes=self._depth * self._width,
            is_chain=self._width == 1,
        )
        for fed in self._fed:
            _feed(run, fed)
        return run


def _feed(run: NetworkRun, fed: tuple[Tensor, ...]) -> Float[Tensor, "batch width vocab"]:
    return run.catch_up(*fed) if len(fed) == 1 else run.below(*fed)


class _Stage(nn.Module):
    """What both stages share."""

    def __init__(self, network: DraftNetwork, best: Best | None) -> None:
        """Hold the network, and which children are ranked."""
        super().__init__()
        self._network, self._best = network, best


class ReadStage(_Stage):
    """Feeds the unseen tokens of each row, padded at their end."""

    @override
    def forward(
        self,
        tokens: Int[Tensor, "batch seq"],
        num_unseen: Int[Tensor, " batch"],
        lengths: Int[Tensor, " batch"],
        num_padding: Int[Tensor, " batch"],
        *storage: Tensor,
    ) -> Outputs:
        """Return the logits after the last token of each row, and the best children.

        Args:
            tokens: The tokens.
            num_unseen: Number of each row's tokens.
            lengths: Length of each row in the cache, padding included.
            num_padding: Padding at the start of each row.
            *storage: Keys and values of each layer, cosines and sines of all positions.
        """
        order = torch.arange(tokens.shape[1], device=tokens.device)
        slots, all_slots = lengths.amax() + order, _slots(storage)
        before = (all_slots >= num_padding[:, None]) & (all_slots < lengths[:, None])
        among = (all_slots >= slots[0]) & (all_slots <= slots[:, None])  # [seq, capacity]
        positions = ((lengths - num_padding)[:, None] + order).clamp(min=0)
        hidden = self._network.over_storage(
            tokens, positions, before[:, None] | among, at=slots, storage=storage
        )
        last = (num_unseen - 1)[:, None, None].expand(-1, 1, hidden.shape[2])
        return _scores(self._network.head(hidden.gather(1, last)), self._best)


class LevelStage(_Stage):
    """Feeds a level of a draft."""

    @override
    def forward(
        self,
        tokens: Int[Tensor, "batch width"],
        parents: Int[Tensor, "batch width"],
        seen: Bool[Tensor, "batch width capacity"],
        level: Int[Tensor, ""],
        num_unseen: Int[Tensor, " batch"],
        lengths: Int[Tensor, " batch"],
        num_padding: Int[Tensor, " batch"],
        *storage: Tensor,
    ) -> Outputs:
        """Return the logits after every node, the best children, and what the nodes see.

        Args:
            tokens: Token at each node.
            parents: Index of each node's parent in the level above.
            seen: Which keys of the draft each node of the level above sees; none at first.
            level: Number of the level, from 0 on.
            num_unseen: Number of each row's tokens that were fed before the draft's first level.
            lengths: Length of each row in the cache, padding included.
            num_padding: Padding at the start of each row.
            *storage: Keys and values of each layer, cosines and sines of all positions.
        """
        width, all_slots = tokens.shape[1], _slots(storage)
        start, longest = lengths.amax(), num_unseen.amax()
        slots = start + longest + level * width + torch.arange(width, device=tokens.device)
        above = seen.gather(1, parents[:, :, None].expand(-1, -1, seen.shape[2]))
        seen = above | (all_slots == slots[:, None])
        committed = (all_slots >= num_padding[:, None]) & (all_slots < lengths[:, None])
        unseen = (all_slots >= start) & (all_slots < start + num_unseen[:, None])
        positions = (lengths - num_padding + num_unseen + level).clamp(min=0)
        hidden = self._network.over_storage(
            tokens,
            positions[:, None].expand_as(tokens),
            (committed | unseen)[:, None] | seen,
            at=slots,
            storage=storage,
        )
        return *_scores(self._network.head(hidden), self._best), seen


def _scores(logits: Float[Tensor, "batch width vocab"], best: Best | None) -> Outputs:
    """Return logits, and log-probabilities and tokens of the best children."""
    if best is None:
        return (logits,)
    scores = logits[..., : best.num_columns].float()
    values, tokens = scores.topk(best.num_ranks, dim=-1)
    return logits, values - scores.logsumexp(-1, keepdim=True), tokens


def _slots(storage: Sequence[Tensor]) -> Int[Tensor, " capacity"]:
    return torch.arange(storage[0].shape[2], device=storage[0].device)


def _bucket(size: int, sizes: tuple[int, ...]) -> int:
    """Return the smallest of some sizes that is large enough; 0 if none is."""
    return next((bound for bound in sizes if bound >= size), 0)


@lru_cache(maxsize=64)
@torch.inference_mode(mode=False)
def _counts(values: tuple[int, ...], device: torch.device) -> Int[Tensor, " batch"]:
    return upload(values, device)


@lru_cache(maxsize=64)
@torch.inference_mode(mode=False)
def _level(number: int, device: torch.device) -> Int[Tensor, ""]:
    return torch.full((), number, dtype=torch.long, device=device)


@lru_cache(maxsize=8)
@torch.inference_mode(mode=False)
def _nothing(
    shape: tuple[int, int, int], device: torch.device
) -> Bool[Tensor, "batch width capacity"]:
    return torch.zeros(shape, dtype=torch.bool, device=device)
