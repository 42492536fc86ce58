"""The outputs of EAGLE heads at committed positions, and below them at the nodes of a draft."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from speclm.acceptance import Accepted
from speclm.attention import TreeStep
from speclm.cache.fixed import seen_slots
from speclm.cache.tree_cache import TreeCache
from speclm.devices import upload
from speclm.drafting.decoder_parts import CausalMasks, Rotation
from speclm.drafting.interface import Prefill
from speclm.methods.eagle.layer import KeyValueStore
from speclm.methods.eagle.network import EagleHeads
from speclm.target import TargetView, product_weight


@dataclass(frozen=True, slots=True, eq=False)
class _Round:
    """What a round committed.

    Args:
        emitted: Tokens of each row.
        tokens: The same, padded with -1 to any width, if the device has them.
        features: The target's features that each token was chosen from.
    """

    emitted: list[list[int]]
    tokens: Int[Tensor, "batch path"] | None
    features: Float[Tensor, "batch path features"]

    def sent(self) -> Int[Tensor, "batch path"]:
        """Return `tokens`, padded with anything valid."""
        width = max(map(len, self.emitted))
        if self.tokens is None:
            padded = [row + [0] * (width - len(row)) for row in self.emitted]
            return upload(padded, self.features.device)
        tokens = self.tokens if self.tokens.shape[1] == width else self.tokens[:, :width]
        return tokens if min(map(len, self.emitted)) == width else tokens.clamp(min=0)


class EagleContext:
    """Keeps the heads' keys, values and last outputs at the committed tokens.

    Positions computed from draft tokens are dropped in every round.
    """

    def __init__(self, heads: EagleHeads, view: TargetView) -> None:
        """Create a context for any number of generations."""
        self._heads, self._view = heads, view
        self._causal = CausalMasks()
        self._prompt: Prefill | None = None  # until it is read
        self._rounds: list[_Round] = []  # since the last draft
        self.cache: TreeCache | None = None
        self.hidden: Float[Tensor, "batch hidden"] | None = None
        """Outputs at the position before each root."""

    def begin(self, prompt: Prefill) -> None:
        """Start a generation; its prompt is read by the first draft."""
        self._prompt, self.cache, self.hidden = prompt, None, None
        self._rounds = []

    def commit(self, accepted: Accepted) -> None:
        """Drop the nodes of the draft, and keep what was committed for the next one."""
        if self.cache is not None:
            self.cache.keep([[] for _ in accepted.emitted])
        assert accepted.features is not None
        if any(accepted.emitted):
            tokens = None if accepted.sent_path is None else accepted.tokens
            self._rounds.append(_Round(accepted.emitted, tokens, accepted.features))

    def catch_up(self) -> None:
        """Run the heads over the features of what was committed since the last draft."""
        if self.cache is None:
            assert self._prompt is not None, "propose before begin"
            self.cache, self._prompt = self._read_prompt(self._prompt), None
        if not self._rounds:
            return
        rounds, self._rounds = self._rounds, []
        counts = [sum(map(len, parts)) for parts in zip(*(r.emitted for r in rounds), strict=True)]
        tokens, features = _joined(rounds, counts)
        if len(counts) == 1 and not self.cache.has_padding:
            self.hidden = self._read_row(tokens[0], features[0])
        else:
            self.hidden = self._read_rows(tokens, features, counts)
        self.cache.keep([range(count) for count in counts])

    def start(self, widths: list[int]) -> "LevelRun":
        """Return a run of the heads from the roots, over levels of these widths."""
        assert self.cache is not None
        assert self.hidden is not None
        return LevelRun(
            self._heads,
            self.cache,
            hidden=self.hidden,
            widths=widths,
            maps=(self._embedding(), self._lm_head()),
            causal=self._causal,
        )

    def _embedding(self) -> Callable[[Tensor], Tensor]:
        """Return the look-up in the target's embeddings, without finding them every time."""
        if self._heads.embed_tokens is not None:
            return self._view.stored_embeddings
        weight = self._view.embedding_weight
        return lambda tokens: F.embedding(tokens, weight)

    def _lm_head(self) -> Callable[[Tensor], Tensor]:
        """Return the target's map to logits, without asking every time what it does."""
        own = self._heads.lm_head is not None
        weight = None if own else product_weight(self._view.model)
        if weight is None:
            return self._view.head_logits
        transposed = weight.t()
        return lambda hidden: hidden.to(transposed.dtype) @ transposed

    def _read_prompt(self, prompt: Prefill) -> TreeCache:
        """Run the heads over the prompt's features, each joined with the token after it."""
        features = prompt.features
        assert features is not None
        following = torch.cat([prompt.tokens[:, 1:], prompt.first_tokens[:, None]], dim=1)
        length = features.shape[1]  # only the last positions if a cache held the first ones
        padding = (prompt.num_padding - (prompt.tokens.shape[1] - length)).clamp(min=0)
        cache = TreeCache(num_layers=self._heads.config.num_layers, num_padding=padding)
        if length > 0:
            indices = torch.arange(length, device=padding.device)
            visible = (indices[:, None] >= indices) & (indices >= padding[:, None])[:, None]
            visible |= torch.eye(length, dtype=torch.bool, device=padding.device)
            hidden = self._run(following[:, -length:], features, visible, cache)
            cache.keep([list(range(length))] * len(padding))
            self.hidden = hidden[:, -1]
        return cache

    def _read_row(
        self, tokens: Int[Tensor, " new"], features: Float[Tensor, "new features"]
    ) -> Float[Tensor, "1 hidden"]:
        """Run the heads over new positions of the only row; return the last output."""
        heads, cache, num_new, mask = self._heads, self.cache, len(features), None
        assert cache is not None
        start = cache.tree_start
        if heads.config.sliding_window is None and num_new > 1:
            mask = self._causal.cut(num_new, num_cached=start, like=heads.fc.weight)
        cache.reserve(num_new)
        hidden: Tensor = heads(
            heads.fuse(features),
            heads.embed(tokens, embedding=self._view.stored_embeddings),
            rotation=heads.rotation_from(start, num_new),
            attention_mask=mask,
            past_key_values=cache,
            batch=1,
        )
        cache.append(num_new)
        return hidden[-1:]

    def _read_rows(
        self,
        tokens: Int[Tensor, "batch new"],
        features: Float[Tensor, "batch new features"],
        counts: list[int],
    ) -> Float[Tensor, "batch hidden"]:
        """Run the heads over new positions; return the last output of each row."""
        assert self.cache is not None
        num_new = tokens.shape[1]
        visible = torch.ones(1, num_new, num_new, dtype=torch.bool, device=tokens.device).tril()
        hidden = self._run(tokens, features, visible, self.cache)
        if min(counts) == num_new:
            return hidden[:, -1]
        sent = upload(counts, tokens.device)
        last = (sent - 1).clamp_(min=0)[:, None, None]
        newest = hidden.gather(1, last.expand(-1, -1, hidden.shape[2]))[:, 0]
        if self.hidden is None or min(counts) > 0:
            return newest
        return torch.where((sent > 0)[:, None], newest, self.hidden)

    def _run(
        self,
        tokens: Int[Tensor, "batch nodes"],
        features: Float[Tensor, "batch nodes features"],
        visible: Bool[Tensor, "rows nodes nodes"],
        cache: TreeCache,
    ) -> Float[Tensor, "batch nodes hidden"]:
        """Run the heads over consecutive positions of all rows, which become pending."""
        heads, num_nodes = self._heads, tokens.shape[1]
        cache.reserve(num_nodes)
        depths = torch.arange(num_nodes, device=tokens.device)[None]
        first = cache.lengths - cache.num_padding
        step = TreeStep(visible, depths, cache)
        output: Tensor = heads(
            heads.fuse(features),
            heads.embed(tokens, embedding=self._view.stored_embeddings),
            position_ids=(first[:, None] + depths).clamp(min=0),
            attention_mask=step.bias(heads.config.sliding_window, heads.dtype),
            past_key_values=cache,
        )
        cache.append(num_nodes)
        return output


def _joined(
    rounds: Sequence[_Round], counts: list[int]
) -> tuple[Int[Tensor, "batch new"], Float[Tensor, "batch new features"]]:
    """Return tokens and features of some rounds, row by row; short rows end in anything valid.

    Args:
        rounds: The rounds.
        counts: Tokens of each row.
    """
    widths = [max(map(len, r.emitted)) for r in rounds]
    tokens = [r.sent() for r in rounds]
    features = [
        r.features if r.features.shape[1] == width else r.features.narrow(1, 0, width)
        for r, width in zip(rounds, widths, strict=True)
    ]
    if len(rounds) == 1:
        return tokens[0], features[0]
    all_tokens, all_features = torch.cat(tokens, dim=1), torch.cat(features, dim=1)
    if len(counts) == 1:
        return all_tokens, all_features
    rows: list[list[int]] = [[] for _ in counts]
    for r, first in zip(rounds, accumulate(widths, initial=0), strict=False):
        for own, emitted in zip(rows, r.emitted, strict=True):
            own.extend(range(first, first + len(emitted)))
    longest = max(counts)
    indices = upload([row + [0] * (longest - len(row)) for row in rows], all_tokens.device)
    of_features = indices[:, :, None].expand(-1, -1, all_features.shape[2])
    return all_tokens.gather(1, indices), all_features.gather(1, of_features)


class LevelRun:
    """Runs heads over the levels of a draft, one after another.

    What is known of all levels beforehand is computed once: their rotations, and the masks of
    chains. The mask of a level of a tree is made of its parents' rows in that of the level above.
    """

    def __init__(
        self,
        heads: EagleHeads,
        cache: TreeCache,
        *,
        hidden: Float[Tensor, "batch hidden"],
        widths: list[int],
        maps: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]],
        causal: CausalMasks,
    ) -> None:
        """Start at the roots.

        Args:
            heads: The network.
            cache: Cache of the heads; no node may be pending.
            hidden: Output at the position before each root.
            widths: Maximum nodes of each level.
            maps: The target's embeddings and output, see `EagleHeads.embed` and `logits`.
            causal: Masks of chains.
        """
        self._heads, self._cache, self._causal = heads, cache, causal
        self._embedding, self._lm_head = maps
        self._batch = len(hidden)
        self.hidden: Float[Tensor, "nodes hidden"] = hidden
        """Outputs of the last level, row by row; at first, of the position before the root."""
        self._level = 0
        self._is_chain = max(widths, default=1) == 1
        self._masks: Sequence[Tensor] = ()  # of each level of a chain
        if widths:
            cache.reserve(sum(widths))
            self._rotations = self._rotations_of(len(widths))
            self._store: KeyValueStore = cache
            if self._is_chain:
                self._store = _ChainStore(cache, len(widths))
                self._masks = self._chain_masks(len(widths))
            else:
                self._seen = self._seen_by_root(sum(widths))

    @property
    def logits(self) -> Float[Tensor, "batch width draft_vocab"]:
        """Logits after every node of the last level, computed anew."""
        logits = self._heads.logits(self.hidden, lm_head=self._lm_head)
        return logits.view(self._batch, -1, logits.shape[1])

    def below(
        self, tokens: Int[Tensor, "batch width"], parents: Int[Tensor, "batch width"]
    ) -> None:
        """Feed the next level, whose nodes become pending.

        Args:
            tokens: The target's tokens.
            parents: Index of each token's parent in the last level.
        """
        width, above = tokens.shape[1], self.hidden
        if width > 1 or len(above) > self._batch:
            by_row = above.view(self._batch, -1, above.shape[1])
            indices = parents[:, :, None].expand(-1, -1, above.shape[1])
            above = by_row.gather(1, indices).flatten(0, 1)
        self.hidden = self._heads(
            above,
            self._heads.embed(tokens.reshape(-1), embedding=self._embedding),
            rotation=self._rotations[self._level],
            attention_mask=self._masks[self._level] if self._is_chain else self._bias(parents),
            past_key_values=self._store,
            batch=self._batch,
        )
        self._cache.append(width)
        self._level += 1

    def _rotations_of(self, num_levels: int) -> list[Rotation]:
        cache = self._cache
        if not cache.is_ragged and not cache.has_padding:
            rotation = self._heads.rotation_from(cache.tree_start, num_levels)
            return list(zip(*(part.unbind(-2) for part in rotation), strict=True))
        first = cache.lengths - cache.num_padding
        depths = torch.arange(num_levels, device=first.device)
        rotation = self._heads.rotation((first[:, None] + depths).clamp(min=0))
        return list(
            zip(*(part.split_with_sizes([1] * num_levels, dim=2) for part in rotation), strict=True)
        )

    def _chain_masks(self, num_levels: int) -> Sequence[Float[Tensor, "rows 1 1 kv_len"]]:
        """Return the additive mask of each level over the keys of all levels."""
        cache, window = self._cache, self._heads.config.sliding_window
        reach = cache.tree_start + num_levels
        is_whole = not cache.is_ragged and not cache.has_padding
        if is_whole and (window is None or reach <= window):
            weight = self._heads.fc.weight
            mask = self._causal.cut(num_levels, num_cached=cache.tree_start, like=weight)
        else:
            levels = torch.arange(num_levels, device=cache.lengths.device)
            above = levels[:, None] >= levels
            nodes = levels[None], above[None], cache.lengths, cache.num_padding
            mask = self._additive(seen_slots(*nodes, capacity=reach, window=window))
        return mask.split_with_sizes([1] * num_levels, dim=2)

    def _seen_by_root(self, num_nodes: int) -> Float[Tensor, "batch 1 kv_len"]:
        """Return the root's additive mask over all keys."""
        cache, window = self._cache, self._heads.config.sliding_window
        lengths = cache.lengths[:, None]
        kv_indices = torch.arange(cache.tree_start + num_nodes, device=lengths.device)
        sees = (kv_indices >= cache.num_padding[:, None]) & (kv_indices < lengths)
        if window is not None:  # positions in a row, padding included; those of nodes come later
            self._positions = kv_indices.repeat(len(lengths), 1)
        return self._additive(sees)[:, None]

    def _additive(self, sees: Bool[Tensor, "*rows kv_len"]) -> Float[Tensor, "*rows kv_len"]:
        mask = torch.zeros(sees.shape, dtype=self._heads.dtype, device=sees.device)
        return mask.masked_fill_(~sees, torch.finfo(mask.dtype).min)

    def _bias(self, parents: Int[Tensor, "batch width"]) -> Float[Tensor, "batch 1 width kv_len"]:
        """Return the mask of the next level of a tree."""
        cache, width = self._cache, parents.shape[1]
        own = cache.tree_start + cache.num_pending
        seen = self._seen.gather(1, parents[:, :, None].expand(-1, -1, self._seen.shape[2]))
        seen.narrow(2, own, width).diagonal(dim1=1, dim2=2).zero_()
        window = self._heads.config.sliding_window
        if window is not None:
            position = cache.lengths[:, None] + self._level
            self._positions[:, own : own + width] = position
            distance = position - self._positions
            seen.masked_fill_((distance >= window)[:, None], torch.finfo(seen.dtype).min)
        self._seen = seen
        return seen.narrow(2, 0, own + width)[:, None]


class _ChainStore:
    """Writes keys and values of chains into a cache, at entries that are cut out beforehand.

    All levels read the entries of all levels, of which a mask hides the later ones.
    """

    def __init__(self, cache: TreeCache, num_levels: int) -> None:
        storage, start = cache.storage, cache.tree_start
        assert storage is not None, "a chain starts after the first position"
        slots = storage.narrow(3, start, num_levels).zero_()  # NaN under a mask would spread
        self._level_of = cache
        self._parts = storage.narrow(3, 0, start + num_levels).unbind(0)
        self._slots = [part.split_with_sizes([1] * num_levels, 2) for part in slots.unbind(0)]

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, /) -> tuple[Tensor, Tensor]:
        """Write the keys and values of a level, and return those of all levels."""
        level, first = self._level_of.num_pending, 2 * layer_idx
        self._slots[first][level].copy_(keys)
        self._slots[first + 1][level].copy_(values)
        return self._parts[first], self._parts[first + 1]
