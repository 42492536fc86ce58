"""Runs of EAGLE heads as stages of fixed shapes, which an engine can compile or record."""

import operator
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from time import perf_counter

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import embedding, pad
from typing_extensions import override

from speclm.cache.fixed import seen_slots
from speclm.cache.tree_cache import TreeCache
from speclm.engines import Engine, StageRunner, agree
from speclm.engines.engine import Outputs
from speclm.methods.eagle.network import EagleHeads, LevelRun
from speclm.target import TargetView, product_weight

_LEVELS = 16  # the entries of a draft are those of a multiple of this


class EagleStages(StageRunner):
    """Runs heads by an engine, once the stages have computed what the heads do.

    Attributes:
        heads: The network.
        state: What must not change while the stages are used; see `weights_of`.
        unproven: Classes of stages that have not been compared yet.
    """

    def __init__(self, heads: EagleHeads, view: TargetView, engine: Engine) -> None:
        """Prepare nothing yet."""
        obstacle = engine.obstacle(heads.fc.weight.device) or _obstacle(heads, view)
        super().__init__(engine, obstacle=obstacle)
        self.heads, self.state = heads, weights_of(heads, view)
        self.unproven: set[type[nn.Module]] = {ReadStage, LevelStage}
        self._view = view
        self._pairs: dict[int | None, tuple[ReadStage, LevelStage]] = {}

    def pair(self, num_ranks: int | None) -> tuple["ReadStage", "LevelStage"]:
        """Return the stages that rank some children; None for those that return logits."""
        if num_ranks not in self._pairs:
            matrices = _matrices(self.heads, self._view)
            self._pairs[num_ranks] = (
                ReadStage(self.heads, matrices, num_ranks),
                LevelStage(self.heads, matrices, num_ranks),
            )
        return self._pairs[num_ranks]

    def tried(
        self, stage: nn.Module, inputs: Sequence[Tensor], storage: Sequence[Tensor]
    ) -> Outputs | None:
        """Run a stage without the engine; None if it fails, for which it gives up."""
        start = perf_counter()
        try:
            found: Outputs = stage(*inputs, *storage)
        except Exception as error:  # noqa: BLE001 - also the target's own code may run
            self.give_up(f"a draft over fixed shapes fails: {error}")
            return None
        self.engine.build_seconds += perf_counter() - start
        return found

    def compare(self, stage: nn.Module, found: Tensor, expected: Tensor) -> None:
        """Count a stage as proven if outputs agree, and give up if they do not."""
        if self.obstacle is not None:
            return
        if agree(found, expected):
            self.unproven.discard(type(stage))
        else:
            self.give_up("the heads compute something else over fixed shapes")


class StagedRun:
    """Runs the stage of each level of a draft, and a `LevelRun` once an engine cannot.

    Until the stage has been compared, both run, and the results of the `LevelRun` count.
    """

    def __init__(
        self,
        stages: EagleStages,
        cache: TreeCache,
        *,
        roots: Outputs,
        shape: tuple[int, int],
        num_ranks: int | None,
        eager: Callable[[], LevelRun],
    ) -> None:
        """Start at the roots.

        Args:
            stages: The stages.
            cache: Cache of the heads; no node may be pending.
            roots: Outputs at the position before each root, and what a stage knows of its children.
            shape: Number of levels, and nodes of each, which are padded.
            num_ranks: Children that are ranked; None to return logits.
            eager: Returns a `LevelRun` from the roots.
        """
        self._stages, self._cache, self._make_eager = stages, cache, eager
        self._stage = stages.pair(num_ranks)[1]
        hidden, self._scores = roots[0], roots[1:]
        (num_levels, self._width), batch = shape, len(hidden)
        entries = room_for(num_levels, self._width)
        cache.reserve(entries)
        self._storage = cache.parts()
        self._above = hidden[:, None].expand(-1, self._width, -1).contiguous()
        self._seen = nothing_seen(batch, self._width, entries, hidden.device)
        self._used = 1  # nodes of the last level that are no padding
        self._fed: list[tuple[Tensor, Tensor]] = []
        self._is_compared = LevelStage in stages.unproven
        self._is_staged = not self._is_compared
        self._eager: LevelRun | None = None
        if self._is_compared or not self._scores:  # the roots may have been read eagerly
            self._eager = eager()
        if self._is_compared:  # both write to other entries
            self._storage = [part.clone() for part in self._storage]

    @property
    def logits(self) -> Float[Tensor, "batch width draft_vocab"]:
        """Logits after every node of the last level."""
        if len(self._scores) == 1:
            return self._scores[0][:, : self._used]
        assert self._eager is not None, "the stages rank children and return no logits"
        return self._eager.logits

    def best(self, num: int) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and columns of the best children, ``[batch, width, num]``."""
        if len(self._scores) == 2:
            return self._scores[0][:, : self._used], self._scores[1][:, : self._used]
        assert self._eager is not None, "the stages return logits and rank no children"
        return self._eager.best(num)

    def below(
        self, tokens: Int[Tensor, "batch width"], parents: Int[Tensor, "batch width"]
    ) -> None:
        """Feed the next level, see `LevelRun.below`."""
        stages, width = self._stages, self._width
        inputs = [
            padded(tokens, width),
            padded(parents, width),
            laid_out(self._above),
            self._seen,
            number(len(self._fed), tokens.device),
            self._cache.lengths,
            self._cache.num_padding,
        ]
        self._fed.append((tokens, parents))
        self._used, self._scores = tokens.shape[1], ()
        if self._is_staged:
            found = stages.run(self._stage, inputs, self._storage)
            if found is not None:
                self._cache.append(width)
                self._above, self._seen, *scores = found
                self._scores = tuple(scores)
                return
            self._is_staged, self._cache.num_pending = False, 0
            self._eager = self._make_eager()
            for fed in self._fed[:-1]:
                self._eager.below(*fed)
        assert self._eager is not None
        self._eager.below(tokens, parents)
        if self._is_compared and stages.obstacle is None:
            self._compare(self._eager, inputs)

    def _compare(self, eager: LevelRun, inputs: list[Tensor]) -> None:
        """Run the stage too, and compare what it computes of the level."""
        found = self._stages.tried(self._stage, inputs, self._storage)
        if found is None:
            return
        self._above, self._seen, *scores = found
        expected = eager.hidden.view(len(self._above), self._used, -1)
        self._stages.compare(self._stage, self._above[:, : self._used], expected)
        expected = eager.logits if len(scores) == 1 else eager.best(scores[0].shape[2])[0]
        self._stages.compare(self._stage, scores[0][:, : self._used], expected)


def weights_of(heads: EagleHeads, view: TargetView) -> list[object]:
    """Return the addresses of all weights, which recorded stages read, and their second form."""
    tensors = [*heads.parameters(), *heads.buffers(), *_matrices(heads, view)]
    return [heads.form, *map(Tensor.data_ptr, tensors)]


def _matrices(heads: EagleHeads, view: TargetView) -> tuple[Tensor, Tensor]:
    """Return embeddings and output matrix, the target's where the heads have none."""
    own, head = heads.embed_tokens, heads.lm_head
    weight = product_weight(view.model) if head is None else head.weight.detach()
    if head is None and weight is not None:
        weight = heads.drafted_rows(weight)
    embeddings = view.embedding_weight if own is None else own.weight
    return embeddings.detach(), heads.fc.weight[:0].detach() if weight is None else weight


def _obstacle(heads: EagleHeads, view: TargetView) -> str | None:
    """Return why heads have no stages; None if they may."""
    if heads.rotates_by_length:
        return "rotations of the heads depend on the length of the text"
    if heads.lm_head is None and product_weight(view.model) is None:
        return "the target's head does more than multiply"
    return None


def room_for(num_levels: int, width: int) -> int:
    """Return the number of entries of the cache that a draft takes."""
    return -(-num_levels // _LEVELS) * _LEVELS * width


class _Stage(nn.Module):
    """What both stages share."""

    def __init__(
        self, heads: EagleHeads, matrices: tuple[Tensor, Tensor], num_ranks: int | None
    ) -> None:
        """Hold the network.

        Args:
            heads: The network.
            matrices: Embeddings and output matrix.
            num_ranks: Children that are ranked; None to return logits.
        """
        super().__init__()
        self._heads, self._num_ranks = heads, num_ranks
        self._embeddings, self._output = matrices

    def _run(
        self,
        hidden: Float[Tensor, "rows hidden"],
        tokens: Int[Tensor, "batch nodes"],
        positions: Int[Tensor, "batch nodes"],
        sees: Bool[Tensor, "batch 1 nodes capacity"],
        store: "_Storage",
    ) -> Float[Tensor, "batch nodes hidden"]:
        heads = self._heads
        mask = torch.zeros(sees.shape, dtype=heads.dtype, device=sees.device)
        output: Tensor = heads(
            hidden,
            embedding(tokens.flatten(), self._embeddings),
            rotation=heads.rotation(positions.clamp(min=0)),
            attention_mask=mask.masked_fill(~sees, torch.finfo(mask.dtype).min),
            past_key_values=store,
            batch=len(tokens),
        )
        return output.view(*tokens.shape, -1)

    def _scores(self, hidden: Float[Tensor, "batch nodes hidden"]) -> Outputs:
        """Return log-probabilities and columns of the best children, or logits."""
        flat = hidden.flatten(0, 1)
        logits = self._heads.logits(flat, lm_head=self._multiplied)
        logits = logits.view(*hidden.shape[:2], -1)
        if self._num_ranks is None:
            return (logits,)
        best = logits.float().log_softmax(-1).topk(self._num_ranks, dim=-1)
        return best.values, best.indices

    def _multiplied(self, hidden: Tensor) -> Tensor:
        return hidden.to(self._output.dtype) @ self._output.t()


class ReadStage(_Stage):
    """Runs over new positions of each row, padded at their end."""

    @override
    def forward(
        self,
        tokens: Int[Tensor, "batch new"],
        features: Float[Tensor, "batch new features"],
        counts: Int[Tensor, " batch"],
        before: Float[Tensor, "batch hidden"],
        lengths: Int[Tensor, " batch"],
        num_padding: Int[Tensor, " batch"],
        *storage: Tensor,
    ) -> Outputs:
        """Return the last output of each row, and what `_scores` does.

        Args:
            tokens: Token after each position.
            features: The target's features at each position.
            counts: New positions of each row.
            before: Outputs that rows without new positions keep.
            lengths: Length of each row in the cache, padding included.
            num_padding: Padding at the start of each row.
            *storage: Keys and values of each layer, ``[batch, kv_heads, capacity, head_dim]``.
        """
        config, order = self._heads.config, torch.arange(tokens.shape[1], device=tokens.device)
        sees = seen_slots(
            order.expand(len(tokens), -1),
            (order[:, None] >= order).expand(len(tokens), -1, -1),
            lengths,
            num_padding,
            capacity=storage[0].shape[2],
            window=config.sliding_window,
        )
        hidden = self._run(
            self._heads.fuse(features.flatten(0, 1)),
            tokens,
            (lengths - num_padding)[:, None] + order,
            sees,
            _Storage(storage, lengths.amax() + order),
        )
        last = (counts - 1).clamp(min=0)[:, None, None].expand(-1, 1, hidden.shape[2])
        newest = torch.where(counts[:, None] > 0, hidden.gather(1, last)[:, 0], before)
        return newest, *self._scores(newest[:, None])


class LevelStage(_Stage):
    """Runs over one level of a draft, whose nodes are written after those of the levels above."""

    @override
    def forward(
        self,
        tokens: Int[Tensor, "batch width"],
        parents: Int[Tensor, "batch width"],
        above: Float[Tensor, "batch width hidden"],
        seen: Bool[Tensor, "batch width entries"],
        level: Int[Tensor, ""],
        lengths: Int[Tensor, " batch"],
        num_padding: Int[Tensor, " batch"],
        *storage: Tensor,
    ) -> Outputs:
        """Return outputs, which entries of the draft each node sees, and what `_scores` does.

        Args:
            tokens: Token at each node.
            parents: Index of its parent in the level above.
            above: Outputs of that level.
            seen: The entries that its nodes see.
            level: Levels before this one.
            lengths: Length of each row in the cache, padding included.
            num_padding: Padding at the start of each row.
            *storage: Keys and values of each layer, ``[batch, kv_heads, capacity, head_dim]``.
        """
        width, entries, window = tokens.shape[1], seen.shape[2], self._heads.config.sliding_window
        of_draft = torch.arange(entries, device=tokens.device)
        own = level * width + torch.arange(width, device=tokens.device)
        seen = seen.gather(1, parents[:, :, None].expand(-1, -1, entries))
        seen = seen | (own[:, None] == of_draft)
        indices = parents[:, :, None].expand(-1, -1, above.shape[2])
        start, in_cache = lengths.amax(), torch.arange(storage[0].shape[2], device=tokens.device)
        node = (in_cache - start).clamp(min=0, max=entries - 1)  # in each entry
        is_node = (in_cache >= start) & (in_cache < start + entries)
        is_committed = (in_cache >= num_padding[:, None]) & (in_cache < lengths[:, None])
        sees = is_committed[:, None] | (is_node & seen[:, :, node])
        depth = lengths[:, None] + level
        if window is not None:
            positions = torch.where(is_node, lengths[:, None] + node // width, in_cache)
            sees = sees & (depth - positions < window)[:, None]
        hidden = self._run(
            above.gather(1, indices).flatten(0, 1),
            tokens,
            (depth - num_padding[:, None]).expand(-1, width),
            sees[:, None],
            _Storage(storage, start + own),
        )
        return hidden, seen, *self._scores(hidden)


class _Storage:
    """Writes keys and values to some entries of storage of fixed size, and returns all of it."""

    def __init__(self, storage: Sequence[Tensor], entries: Int[Tensor, " nodes"]) -> None:
        self._storage, self._entries = storage, entries

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, /) -> tuple[Tensor, Tensor]:
        """Write the keys and values of a layer's nodes."""
        all_keys, all_values = self._storage[2 * layer_idx], self._storage[2 * layer_idx + 1]
        all_keys.index_copy_(2, self._entries, keys)
        all_values.index_copy_(2, self._entries, values)
        return all_keys, all_values


def padded(part: Tensor, num: int) -> Tensor:
    """Return a tensor whose second axis ends in zeros, so that it has `num` entries."""
    missing = num - part.shape[1]
    if missing == 0:
        return laid_out(part)
    return pad(part, (*[0] * (2 * (part.ndim - 2)), 0, missing))


def laid_out(part: Tensor) -> Tensor:
    """Return a tensor with the strides of a new one, which compiled code is made for."""
    strides = tuple(accumulate(reversed(part.shape[1:]), operator.mul, initial=1))[::-1]
    return part if part.stride() == strides else part.clone(memory_format=torch.contiguous_format)


@lru_cache(maxsize=128)
def number(value: int, device: torch.device) -> Int[Tensor, ""]:
    """Return a number on a device, sent once."""
    return torch.tensor(value, device=device, dtype=torch.long)


@lru_cache(maxsize=64)
def nothing_seen(batch: int, width: int, entries: int, device: torch.device) -> Tensor:
    """Return the `seen` of the roots, which are no nodes of a draft."""
    return torch.zeros(batch, width, entries, dtype=torch.bool, device=device)
