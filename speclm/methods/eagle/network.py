"""EAGLE heads: a small decoder that continues the target's hidden states."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Self, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from typing_extensions import override

from speclm.cache.fixed import seen_slots
from speclm.cache.tree_cache import TreeCache
from speclm.drafting.decoder_parts import CausalMasks, Norm, Rotation
from speclm.drafting.heads_network import HeadsNetwork, copy_tensors
from speclm.methods.eagle.config import EagleConfig
from speclm.methods.eagle.layer import EagleLayer, KeyValueStore

if TYPE_CHECKING:
    from speclm.methods.eagle.checkpoint import EagleCheckpoint


class EagleHeads(HeadsNetwork):
    """The draft network of EAGLE-1, 2 and 3; holds no decoding state.

    The input at a position joins the target's features there with the embedding of the next token.
    The output predicts the features at the next position: `logits` maps it to the token after
    that one, and it is the hidden state of the next call. Layers are Llama's. New heads are zero;
    see `init_weights_`.

    Source: Li et al. 2024 (EAGLE, EAGLE-2), Li et al. 2025 (EAGLE-3).
    """

    config: EagleConfig
    _rows: tuple[tuple[int, int, int], Tensor] | None = None

    @override
    def _add_parts(self) -> None:
        config, hidden = self.config, self.config.hidden_size
        is_eagle3 = config.kind == "eagle3"
        width = config.num_features * config.target_hidden_size if is_eagle3 else 2 * hidden

        def norm(size: int) -> Norm:
            return Norm(size, eps=config.rms_norm_eps)

        self._add_embeddings()
        sizes = [config.target_hidden_size] * (config.num_features if config.fc_norm else 0)
        self.feature_norms = nn.ModuleList(map(norm, sizes))
        self.feature_norm = norm(width) if config.norm_before_fc else None
        self.fc = nn.Linear(width, hidden, bias=config.fc_bias)
        self.layers = nn.ModuleList(
            EagleLayer(config, index=index) for index in range(config.num_layers)
        )
        self.norm = norm(hidden) if is_eagle3 else None
        self._add_output()

    @override
    def fuse_(self) -> Self:
        super().fuse_()
        for layer in self.layers:
            cast("EagleLayer", layer).fold_()
        return self

    def fuse(self, features: Float[Tensor, "*rows features"]) -> Float[Tensor, "*rows hidden"]:
        """Return the hidden states that replace the target's features as input.

        Args:
            features: For EAGLE-3 the hidden states of the layers read, joined in their order; for
                EAGLE-1 the last one, after the final norm, which is returned as it is.
        """
        features = features.to(self.dtype)
        if self.config.kind == "eagle":
            return features
        if self.feature_norms:
            parts = features.chunk(self.config.num_features, dim=-1)
            normed = [norm(part) for norm, part in zip(self.feature_norms, parts, strict=True)]
            features = torch.cat(normed, dim=-1)
        elif self.feature_norm is not None:
            features = self.feature_norm(features)
        if self._input is None or features.ndim != 2:
            return F.linear(features, self.fc.weight, self.fc.bias)
        return self._input(features)

    def _joined(self, pairs: Float[Tensor, "rows pair"]) -> Float[Tensor, "rows hidden"]:
        """Map embeddings and features to the input of EAGLE-1's first layer."""
        if self._input is None:
            return self.fc(pairs)  # type: ignore[no-any-return]  # a Linear's call is untyped
        return self._input(pairs)

    def forward(
        self,
        hidden: Float[Tensor, "*rows hidden"],
        embeddings: Float[Tensor, "*rows hidden"],
        *,
        position_ids: Int[Tensor, "rows seq"] | None = None,
        rotation: Rotation | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: KeyValueStore | None = None,
        batch: int | None = None,
    ) -> Float[Tensor, "*rows hidden"]:
        """Return the hidden states of the next position.

        Args:
            hidden: Result of `fuse`, or of this method at the previous positions:
                ``[batch, seq, hidden]``, or the same states without the first axis, if `batch` is
                given.
            embeddings: Embeddings of the token after each position, see `embed`.
            position_ids: Positions of the features, not of the tokens; a single row if all rows
                share them.
            rotation: Result of `rotation` for those positions, in place of `position_ids`.
            attention_mask: ``[batch or 1, 1, seq, kv_len]``, added to the scores, or boolean, true
                where a position is seen; each position must see at least one. None if each sees all
                earlier positions within the config's window and there is no padding.
            past_key_values: Cache of keys and values; None to attend to this call only.
            batch: Rows of the batch, if the states of all rows follow one another.
        """
        shape = hidden.shape
        hidden, embeddings = hidden.to(self.dtype), embeddings.to(self.dtype)
        if batch is None:
            batch, hidden, embeddings = shape[0], hidden.flatten(0, 1), embeddings.flatten(0, 1)
        if self.config.kind == "eagle":
            hidden = self._joined(torch.cat((embeddings, hidden), dim=-1))
        if rotation is None:
            assert position_ids is not None, "neither position_ids nor rotation is given"
            rotation = self.rotation(position_ids)
        for layer in self.layers:
            hidden = layer(
                hidden,
                embeddings,
                batch=batch,
                rotation=rotation,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
            )
        if self.config.norm_output and self.norm is not None:
            hidden = self.norm(hidden)
        return hidden if hidden.shape == shape else hidden.view(*shape[:-1], -1)

    def logits(
        self, hidden: Float[Tensor, "*rows hidden"], *, lm_head: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "*rows draft_vocab"]:
        """Return logits over the draft vocabulary.

        Args:
            hidden: Result of `forward`.
            lm_head: The target's map from hidden states to the logits of the tokens that are
                drafted, see `among_drafted`; called if the heads have no output matrix of their
                own.
        """
        if self.norm is not None and not self.config.norm_output:
            hidden = self.norm(hidden)
        logits = self._head_logits(hidden, lm_head)
        scale = self.config.logit_scale
        return logits if scale == 1 else logits * scale

    def among_drafted(self, lm_head: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return the target's map from hidden states to logits for the draft vocabulary only."""
        columns = self.draft_columns
        if columns is None or self.lm_head is not None:
            return lm_head
        return lambda hidden: lm_head(hidden).index_select(-1, columns)

    def drafted_rows(
        self, weight: Float[Tensor, "vocab hidden"]
    ) -> Float[Tensor, "draft_vocab hidden"]:
        """Return the rows of the target's output matrix for the draft vocabulary.

        They are copied once for a matrix, and again after it has changed.
        """
        columns = self.draft_columns
        if columns is None:
            return weight
        version = 0 if weight.is_inference() else weight._version
        state = weight.data_ptr(), version, columns.data_ptr()
        if self._rows is None or self._rows[0] != state:
            self._rows = state, weight.index_select(0, columns.to(weight.device))
        return self._rows[1]


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

    def best(self, num: int) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and columns of the best children, ``[batch, width, num]``."""
        found = self.logits.float().log_softmax(-1).topk(num, dim=-1)
        return found.values, found.indices

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
            above = (levels[:, None] >= levels).expand(self._batch, -1, -1)
            rows = levels.expand(self._batch, -1), above, cache.lengths, cache.num_padding
            mask = self._additive(seen_slots(*rows, capacity=reach, window=window))
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
        entries = storage.narrow(3, start, num_levels).zero_()  # NaN under a mask would spread
        self._level_of = cache
        self._parts = storage.narrow(3, 0, start + num_levels).unbind(0)
        self._entries = [part.split_with_sizes([1] * num_levels, 2) for part in entries.unbind(0)]

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, /) -> tuple[Tensor, Tensor]:
        """Write the keys and values of a level, and return those of all levels."""
        level, first = self._level_of.num_pending, 2 * layer_idx
        self._entries[first][level].copy_(keys)
        self._entries[first + 1][level].copy_(values)
        return self._parts[first], self._parts[first + 1]


def build_eagle(
    checkpoint: "EagleCheckpoint",
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> EagleHeads:
    """Return the heads of a checkpoint, with copies of its tensors.

    Args:
        checkpoint: Result of `read_eagle`.
        dtype: Dtype of the weights; None for the checkpoint's.
        device: Device of the weights; None for the CPU.
    """
    heads = EagleHeads(checkpoint.config, device=torch.device("meta"))
    target = device or torch.device("cpu")
    state = copy_tensors(checkpoint.tensors, dtype=dtype or checkpoint.dtype, device=target)
    heads.load_state_dict(state, assign=True)
    return heads.to(target)
