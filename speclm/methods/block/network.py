"""Block heads: a small decoder that drafts a block of tokens in one pass."""

from collections.abc import Callable, Iterable, Sequence
from typing import Self, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from typing_extensions import override

from speclm.drafting.decoder_parts import FixedNorm, Norm, Product, Rotation, joined, rotated
from speclm.drafting.heads_network import HeadsNetwork
from speclm.methods.block.config import BlockConfig
from speclm.methods.block.layer import BlockLayer, ConfidenceHead, Context, MarkovHead


class BlockHeads(HeadsNetwork):
    """The draft network of DFlash, DSpark and JetSpec; holds no decoding state.

    A block begins at the anchor, the last committed token. The input is its embedding and, at each
    position after it, that of the mask token. Every layer attends to the block itself and to the
    context: the positions before the anchor, whose keys and values `context` computes from the
    target's features, once for each token. New heads are zero; see `init_weights_`.

    Source: Chen et al. 2026 (DFlash), and the code of DSpark and JetSpec.
    """

    config: BlockConfig
    _context_input: Product | None = None  # keys and values of all layers in one product
    _key_norms: FixedNorm

    @override
    def _add_parts(self) -> None:
        config, hidden, eps = self.config, self.config.hidden_size, self.config.rms_norm_eps
        self._add_embeddings()
        self.fc = nn.Linear(len(config.feature_layers) * hidden, hidden, bias=False)
        self.hidden_norm = Norm(hidden, eps=eps)
        self.layers = nn.ModuleList(BlockLayer(config) for _ in range(config.num_layers))
        self.norm = Norm(hidden, eps=eps)
        self._add_output()
        self.markov_head = None if config.markov is None else MarkovHead(config)
        self.confidence_head = ConfidenceHead(config) if config.has_confidence else None

    @override
    def train(self, mode: bool = True) -> Self:
        if mode:
            self._context_input = None
        return super().train(mode)

    @torch.no_grad()
    @override
    def fuse_(self) -> Self:
        super().fuse_()
        for layer in self._decoder_layers:
            for norm, part in layer.norms_and_parts:
                factors = norm.fold_()
                if factors is not None:
                    part.scale_input_(factors)
        self._context_input = joined(*self._context_parts())
        factors = self.hidden_norm.fold_()
        if factors is not None:
            self._context_input = self._context_input.scaled(factors)
        self._key_norms = FixedNorm(self._key_scales().detach(), self.config.rms_norm_eps)
        return self

    @property
    def _decoder_layers(self) -> Iterable[BlockLayer]:
        return cast("Iterable[BlockLayer]", self.layers)

    def _context_parts(self) -> list[nn.Linear]:
        return [part for layer in self._decoder_layers for part in layer.self_attn.context_parts]

    def _key_scales(self) -> Float[Tensor, "layers 1 1 1 head_dim"]:
        norms = [layer.self_attn.k_norm for layer in self._decoder_layers]
        scales = torch.stack([norm.weight for norm in norms if norm is not None])
        return scales[:, None, None, None]

    def context(
        self, features: Float[Tensor, "batch seq features"], rotation: Rotation
    ) -> tuple[
        Float[Tensor, "layers batch kv_heads seq head_dim"],
        Float[Tensor, "layers batch kv_heads seq head_dim"],
    ]:
        """Return the keys and values of committed tokens for all layers, in one product.

        Args:
            features: Hidden states of the layers read, joined in their order.
            rotation: Rotation of the position of each token.
        """
        config, (batch, seq) = self.config, features.shape[:2]
        states = features.to(self.dtype).flatten(0, 1)
        states = self.hidden_norm(self.fc(states) if self._input is None else self._input(states))
        if self._context_input is None:
            both = torch.cat([part(states) for part in self._context_parts()], dim=-1)
        else:
            both = self._context_input(states)
        both = both.view(batch, seq, config.num_layers, 2, -1, config.head_dim)
        keys, values = both.permute(3, 2, 0, 4, 1, 5).unbind(0)
        if self._context_input is None:
            keys = F.rms_norm(keys, (config.head_dim,), eps=config.rms_norm_eps)
            keys = keys * self._key_scales()
        else:
            keys = self._key_norms(keys)
        return rotated(keys, rotation), values

    def forward(
        self,
        embeds: Float[Tensor, "batch positions hidden"],
        rotation: Rotation,
        keys: Float[Tensor, "layers batch kv_heads kv_len head_dim"],
        values: Float[Tensor, "layers batch kv_heads kv_len head_dim"],
        masks: Sequence[Tensor | None],
        *,
        num_blocks: int = 1,
        has_room: bool = False,
    ) -> Float[Tensor, "batch drafts hidden"]:
        """Return the normed states at the positions that draft.

        Args:
            embeds: Embeddings of the blocks' tokens, see `embed_blocks`; one block after another.
            rotation: Rotation of their positions.
            keys: Result of `context`, of any number of positions.
            values: Result of `context`.
            masks: For each layer what each position sees, ``[batch or 1, 1, positions, seen]``,
                see `block_masks`: boolean, or added to the scores; None for all.
            num_blocks: Blocks of each row, of equal lengths. A block does not see the others.
            has_room: Whether the last entries of keys and values are for those of the only block,
                which are written there.
        """
        batch, length = embeds.shape[:2]
        hidden = embeds.to(self.dtype).flatten(0, 1)
        contexts = list(zip(keys.unbind(0), values.unbind(0), strict=True))
        rooms: list[Context] | None = None
        if has_room:
            parts = (part.narrow(3, part.shape[3] - length, length) for part in (keys, values))
            rooms = list(zip(*(part.unbind(0) for part in parts), strict=True))
        for index, layer in enumerate(self._decoder_layers):
            hidden = layer(
                hidden,
                rotation=rotation,
                context=contexts[index],
                room=None if rooms is None else rooms[index],
                mask=masks[index],
                num_blocks=num_blocks,
            )
        if not self.config.predicts_next:
            by_block = hidden.view(batch * num_blocks, -1, hidden.shape[1])
            hidden = by_block[:, 1:].flatten(0, 1)
        return self.norm(hidden).view(batch, -1, hidden.shape[1])  # type: ignore[no-any-return]

    def embed_blocks(
        self,
        anchors: Int[Tensor, "batch blocks"],
        *,
        num_positions: int,
        embedding: Callable[[Tensor], Tensor],
    ) -> Float[Tensor, "batch positions hidden"]:
        """Return the inputs of blocks, one block after another.

        Args:
            anchors: Token at the anchor of each block.
            num_positions: Positions of a block, the anchor's included.
            embedding: Looks up rows of the target's embedding matrix, as they are stored; called
                if the heads have no embeddings of their own.
        """
        padding, mask = (0, num_positions - 1), self.config.mask_token_id
        if anchors.shape[1] == 1:
            return self.embed(F.pad(anchors, padding, value=mask), embedding=embedding)
        tokens = F.pad(anchors.reshape(-1, 1), padding, value=mask)
        return self.embed(tokens.reshape(len(anchors), -1), embedding=embedding)

    def logits(
        self, hidden: Float[Tensor, "*rows hidden"], *, lm_head: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "*rows draft_vocab"]:
        """Return logits over the draft vocabulary, without the term of the Markov head.

        Args:
            hidden: Result of `forward`.
            lm_head: The target's map from hidden states to logits; called if the heads have no
                output matrix of their own.
        """
        return self._head_logits(hidden, lm_head)

    def confidence(
        self, hidden: Float[Tensor, "rows hidden"], previous: Int[Tensor, " rows"]
    ) -> Float[Tensor, " rows"]:
        """Return the probability that the draft token of each position is accepted.

        Args:
            hidden: Result of `forward`.
            previous: The token before the one that is drafted there, an id of the target.
        """
        assert self.confidence_head is not None, "the heads have no confidence head"
        embedded = None if self.markov_head is None else self.markov_head.embed(previous)
        return self.confidence_head(hidden, embedded).sigmoid()  # type: ignore[no-any-return]

    @override
    def _starts_at_zero(self, name: str) -> bool:
        return "markov_w2" in name


def block_masks(
    config: BlockConfig,
    is_seen: Bool[Tensor, "batch blocks kv_len"],
    *,
    context_positions: Int[Tensor, "rows kv_len"],
    anchors: Int[Tensor, "batch blocks"],
    num_positions: int,
) -> tuple[Bool[Tensor, "batch 1 positions seen"], ...]:
    """Return for each layer what each position of each block sees.

    Args:
        config: Config of the heads.
        is_seen: Which of the context's entries belong to the text before each anchor.
        context_positions: Position of each entry of the context; a single row if all rows share
            them.
        anchors: Position of each anchor.
        num_positions: Positions of a block.

    Returns:
        Columns are the context's entries, then the positions of the block itself. Layers of one
        kind share their mask.
    """
    device, (batch, num_blocks) = is_seen.device, is_seen.shape[:2]
    within = torch.arange(num_positions, device=device)
    ahead = within[:, None] - within  # [positions, positions]
    distance = None
    made: dict[tuple[int | None, bool], Tensor] = {}
    for window, is_causal in zip(config.windows, config.is_causal, strict=True):
        if (window, is_causal) in made:
            continue
        own = ahead >= 0 if is_causal else torch.ones_like(ahead, dtype=torch.bool)
        seen = is_seen[:, :, None].expand(-1, -1, num_positions, -1)
        if window is not None:
            if distance is None:
                first = anchors[:, :, None] - context_positions[:, None]  # [batch, blocks, kv_len]
                distance = first[:, :, None] + within[:, None]
            seen = seen & (distance < window)
            own = own & (ahead.abs() < window)
        own = own.expand(batch, num_blocks, -1, -1)
        made[window, is_causal] = torch.cat((seen, own), dim=-1).flatten(1, 2)[:, None]
    return tuple(made[key] for key in zip(config.windows, config.is_causal, strict=True))
