"""EAGLE heads: a small decoder that continues the target's hidden states."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import LlamaConfig
from typing_extensions import override

from speclm.cache.tree_cache import TreeCache
from speclm.drafting.decoder import Rotation, make_rotary
from speclm.errors import OptionError
from speclm.methods.eagle.config import EagleConfig
from speclm.methods.eagle.layer import EagleLayer, KeyValueStore

if TYPE_CHECKING:
    from speclm.methods.eagle.checkpoint import EagleCheckpoint

_INIT_STD = 0.02  # that of Llama


class EagleHeads(nn.Module):
    """The draft network of EAGLE-1, 2 and 3; holds no decoding state.

    The input at a position joins the target's features there with the embedding of the next token.
    The output predicts the features at the next position: `logits` maps it to the token after
    that one, and it is the hidden state of the next call. Layers are Llama's, built from
    Transformers' modules. New heads are zero; see `init_weights_`.

    Source: Li et al. 2024 (EAGLE, EAGLE-2), Li et al. 2025 (EAGLE-3).
    """

    draft_columns: Int[Tensor, " draft_vocab"] | None
    """Target token of each column of the logits; None if the vocabularies are equal."""

    def __init__(
        self,
        config: EagleConfig,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Allocate heads of the given sizes."""
        super().__init__()
        self.config = config
        self._llama = _llama_config(config)
        with torch.device("meta"):  # draws no random numbers
            self._add_parts()
        self.rotary = make_rotary(self.config)
        if dtype is not None:
            self.to(dtype=dtype)
        if device is None or device.type != "meta":
            self.to_empty(device=device or torch.device("cpu"))
            self._clear_()

    def _add_parts(self) -> None:
        config, hidden = self.config, self.config.hidden_size
        is_eagle3 = config.kind == "eagle3"
        width = config.num_features * config.target_hidden_size if is_eagle3 else 2 * hidden

        def norm(size: int) -> nn.RMSNorm:
            return nn.RMSNorm(size, eps=config.rms_norm_eps)

        self.embed_tokens: nn.Embedding | None = None
        if config.has_own_embeddings:
            self.embed_tokens = nn.Embedding(config.vocab_size, hidden)
        sizes = [config.target_hidden_size] * (config.num_features if config.fc_norm else 0)
        self.feature_norms = nn.ModuleList(map(norm, sizes))
        self.feature_norm = norm(width) if config.norm_before_fc else None
        self.fc = nn.Linear(width, hidden, bias=config.fc_bias)
        self.layers = nn.ModuleList(
            EagleLayer(config, self._llama, index=index) for index in range(config.num_layers)
        )
        self.norm = norm(hidden) if is_eagle3 else None
        self.lm_head: nn.Linear | None = None
        if config.has_own_lm_head:
            self.lm_head = nn.Linear(hidden, config.draft_vocab_size, bias=False)
        columns = torch.empty(config.draft_vocab_size, dtype=torch.int64, device="meta")
        self.register_buffer("draft_columns", columns if config.has_draft_vocab else None)

    @override
    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Casting the weights rounds the frequencies too, and `to_empty` loses them.
        device = self.fc.weight.device
        self.rotary = make_rotary(self.config).train(self.training)
        if device.type != "meta":
            self.rotary.to(device)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights and of all outputs."""
        return self.fc.weight.dtype

    def fuse(
        self, features: Float[Tensor, "batch seq features"]
    ) -> Float[Tensor, "batch seq hidden"]:
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
        return F.linear(features, self.fc.weight, self.fc.bias)

    def forward(
        self,
        hidden: Float[Tensor, "batch seq hidden"],
        embeddings: Float[Tensor, "batch seq hidden"],
        *,
        position_ids: Int[Tensor, "rows seq"] | None = None,
        rotation: Rotation | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: KeyValueStore | None = None,
    ) -> Float[Tensor, "batch seq hidden"]:
        """Return the hidden states of the next position.

        Args:
            hidden: Result of `fuse`, or of this method at the previous positions.
            embeddings: Embeddings of the token after each position, see `embed`.
            position_ids: Positions of the features, not of the tokens; a single row if all rows
                share them.
            rotation: Result of `rotation` for those positions, in place of `position_ids`.
            attention_mask: ``[batch or 1, 1, seq, kv_len]``, added to the scores, or boolean, true
                where a position is seen; each position must see at least one. None if each sees all
                earlier positions within the config's window and there is no padding.
            past_key_values: Cache of keys and values; None to attend to this call only.
        """
        hidden, embeddings = hidden.to(self.dtype), embeddings.to(self.dtype)
        if self.config.kind == "eagle":
            hidden = self.fc(torch.cat((embeddings, hidden), dim=-1))
        if rotation is None:
            assert position_ids is not None, "neither position_ids nor rotation is given"
            rotation = self.rotation(position_ids)
        for layer in self.layers:
            hidden = layer(
                hidden,
                embeddings,
                rotation=rotation,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
            )
        if self.config.norm_output and self.norm is not None:
            hidden = self.norm(hidden)
        return hidden

    def rotation(self, position_ids: Int[Tensor, "rows seq"]) -> Rotation:
        """Return the cosines and sines of positions."""
        found: Rotation = self.rotary(self.fc.weight, position_ids)  # it reads the dtype only
        return found

    def logits(
        self, hidden: Float[Tensor, "*rows hidden"], *, lm_head: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "*rows draft_vocab"]:
        """Return logits over the draft vocabulary.

        Args:
            hidden: Result of `forward`.
            lm_head: The target's map from hidden states to logits; called if the heads have no
                output matrix of their own.
        """
        if self.norm is not None and not self.config.norm_output:
            hidden = self.norm(hidden)
        logits = lm_head(hidden) if self.lm_head is None else self.lm_head(hidden)
        scale = self.config.logit_scale
        return logits if scale == 1 else logits * scale

    def embed(
        self, tokens: Int[Tensor, "*rows"], *, embedding: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "*rows hidden"]:
        """Return the embeddings of the target's tokens.

        Args:
            tokens: Ids of the target.
            embedding: Looks up rows of the target's embedding matrix, as they are stored; called
                if the heads have no embeddings of their own.
        """
        return embedding(tokens) if self.embed_tokens is None else self.embed_tokens(tokens)

    def target_ids(self, draft_ids: Int[Tensor, "*rows"]) -> Int[Tensor, "*rows"]:
        """Return the target's ids for ids of the draft vocabulary."""
        return draft_ids if self.draft_columns is None else self.draft_columns[draft_ids]

    @torch.no_grad()
    def set_draft_columns_(self, columns: Int[Tensor, " draft_vocab"]) -> None:
        """Choose the target's tokens that the heads may draft.

        Raises:
            OptionError: If the heads have no draft vocabulary or one of another size, or the tokens
                are not increasing ids of the target.
        """
        mine, vocab_size = self.draft_columns, self.config.vocab_size
        if mine is None or columns.shape != mine.shape:
            raise OptionError(
                f"columns are {len(columns)}, expected draft_vocab_size, "
                f"{self.config.draft_vocab_size}, below vocab_size, {vocab_size}; build the heads "
                "with another draft_vocab_size"
            )
        is_increasing = bool((columns[1:] > columns[:-1]).all())
        if not is_increasing or columns[0] < 0 or columns[-1] >= vocab_size:
            raise OptionError(
                f"columns run from {int(columns.min())} to {int(columns.max())}, expected "
                f"increasing ids below {vocab_size}, each once; sort them"
            )
        mine.copy_(columns)

    @torch.no_grad()
    def init_weights_(
        self,
        *,
        lm_weight: Float[Tensor, "vocab hidden"] | None = None,
        embeddings: Float[Tensor, "vocab hidden"] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Initialise with small random matrices, norms of one, and no biases.

        Args:
            lm_weight: The target's output matrix; the heads' own matrix gets its rows of the draft
                vocabulary.
            embeddings: The target's embeddings, for heads that have their own.
            generator: Source of the random numbers, on the CPU.
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                drawn = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
                parameter.copy_(drawn.normal_(std=_INIT_STD, generator=generator))
            else:
                parameter.fill_(_constant(name))
        if self.lm_head is not None and lm_weight is not None:
            columns = slice(None) if self.draft_columns is None else self.draft_columns
            self.lm_head.weight.copy_(lm_weight[columns])
        if self.embed_tokens is not None and embeddings is not None:
            self.embed_tokens.weight.copy_(embeddings)

    @torch.no_grad()
    def _clear_(self) -> None:
        for name, parameter in self.named_parameters():
            parameter.fill_(_constant(name))
        if self.draft_columns is not None:
            self.draft_columns.copy_(
                torch.arange(len(self.draft_columns), device=self.draft_columns.device)
            )


class LevelRun:
    """Runs heads over the levels of a draft, one after another.

    Rotations of all levels are computed once. The mask of a level is made of its parents' rows in
    the mask of the level above.
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
            cache: Cache of the heads; no node may be pending.
            hidden: Output at the position before each root.
            widths: Maximum nodes of each level.
            embedding: See `EagleHeads.embed`.
        """
        self._heads, self._cache, self._embedding = heads, cache, embedding
        self.hidden: Float[Tensor, "batch nodes hidden"] = hidden[:, None]
        """Outputs of the last level; at first, of the position before the root."""
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
            parents: Index of each token's parent in the last level.
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

    def _seen_by_root(self, widths: list[int]) -> Float[Tensor, "batch 1 kv_len"] | None:
        """Return the root's additive mask over all keys; None for chains that see every key."""
        cache, window = self._cache, self._heads.config.sliding_window
        reach = cache.tree_start + len(widths)
        is_whole = not cache.is_ragged and not cache.has_padding
        if is_whole and max(widths, default=1) == 1 and (window is None or reach <= window):
            return None
        lengths = cache.lengths[:, None]
        kv_indices = torch.arange(cache.tree_start + sum(widths), device=lengths.device)
        sees = (kv_indices >= cache.num_padding[:, None]) & (kv_indices < lengths)
        if window is not None:
            levels = [level for level, width in enumerate(widths) for _ in range(width)]
            pending = lengths + torch.tensor(levels, device=lengths.device, dtype=torch.long)
            prefix = kv_indices[: cache.tree_start].expand(len(lengths), -1)
            self._positions = torch.cat([prefix, pending], dim=1)  # of a row, padding included
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
            distance = cache.lengths[:, None] + self._level - self._positions
            seen.masked_fill_((distance >= window)[:, None], torch.finfo(seen.dtype).min)
        self._seen = seen
        return seen.narrow(2, 0, own + width)[:, None]


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
    state = {
        name: tensor.to(
            target,
            (dtype or checkpoint.dtype) if tensor.is_floating_point() else tensor.dtype,
            copy=True,  # of files that are mapped
        )
        for name, tensor in checkpoint.tensors.items()
    }
    heads.load_state_dict(state, assign=True)
    return heads.to(target)


def _constant(name: str) -> float:
    return 1.0 if "norm" in name else 0.0


def _llama_config(config: EagleConfig) -> LlamaConfig:
    """Return the config for Transformers' modules; attention is not one of them."""
    return LlamaConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=1,  # so that any hidden_size passes
        head_dim=config.head_dim,
        hidden_act=config.hidden_act,
        rms_norm_eps=config.rms_norm_eps,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters=dict(config.rope_parameters),
    )
