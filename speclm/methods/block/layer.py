"""Parts of block heads: decoder layers, and the small heads on their states.

The layers are Qwen3's, which also attend to injected keys and values.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from speclm.drafting.decoder_parts import GatedMLP, Norm, Projections, Rotation
from speclm.methods.block.config import BlockConfig

_TERM_BYTES = 2**25

Context = tuple[Tensor, Tensor]
"""Keys and values of one layer, each ``[batch, kv_heads, kv_len, head_dim]``."""


class BlockAttention(Projections):
    """Grouped attention of blocks to themselves and to a context that they share."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__(
            input_size=config.hidden_size,
            hidden_size=config.hidden_size,
            head_dim=config.head_dim,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            biases=(config.has_attention_bias, config.has_attention_bias),
            norm_eps=config.rms_norm_eps,
        )

    @property
    def context_parts(self) -> tuple[nn.Linear, nn.Linear]:
        """The projections that the context's keys and values come from."""
        return self.k_proj, self.v_proj

    def forward(
        self,
        residual: Float[Tensor, "rows hidden"],
        states: Float[Tensor, "rows hidden"],
        *,
        rotation: Rotation,
        context: Context,
        room: Context | None,
        mask: Tensor | None,
        num_blocks: int,
    ) -> Float[Tensor, "rows hidden"]:
        """Return the residual plus what is read; see `BlockLayer.forward`."""
        batch = context[0].shape[0]
        queries, keys, values = self.project(states, rotation, batch=batch)
        if num_blocks > 1:
            attended = _attend_blocks(queries, context, (keys, values), mask, num_blocks)
            return self.add_output(residual, attended)
        if room is None:
            all_keys, all_values = (
                torch.cat(pair, dim=2) for pair in zip(context, (keys, values), strict=True)
            )
        else:
            room[0].copy_(keys)
            room[1].copy_(values)
            all_keys, all_values = context
        attended = F.scaled_dot_product_attention(
            queries,
            all_keys,
            all_values,
            attn_mask=mask,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )
        return self.add_output(residual, attended)


def _attend_blocks(
    queries: Tensor, context: Context, own: Context, mask: Tensor | None, num_blocks: int
) -> Tensor:
    """Attend with several blocks in a row, without copies of the context for each block."""
    batch, q_heads, length, dim = queries.shape
    kv_heads, kv_len = context[0].shape[1:3]
    by_group = (batch, kv_heads, q_heads // kv_heads)
    in_blocks = (num_blocks, length // num_blocks)
    queries = queries * dim**-0.5
    # The queries of all blocks and of a group share one product with the context.
    to_context = queries.reshape(batch, kv_heads, -1, dim) @ context[0].transpose(-1, -2)
    own_keys, own_values = (
        part.reshape(batch, kv_heads, 1, *in_blocks, dim) for part in own
    )  # 1: shared by a group
    to_own = queries.reshape(*by_group, *in_blocks, dim) @ own_keys.transpose(-1, -2)
    scores = torch.cat(
        (to_context.view(*by_group, length, kv_len), to_own.view(*by_group, length, -1)), dim=-1
    )
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, None], torch.finfo(scores.dtype).min)
    precise = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=precise).to(own_values.dtype)
    from_context = weights[..., :kv_len].reshape(batch, kv_heads, -1, kv_len) @ context[1]
    from_own = weights[..., kv_len:].reshape(*by_group, *in_blocks, -1) @ own_values
    shape = (batch, q_heads, length, dim)
    attended: Tensor = from_context.view(shape) + from_own.view(shape)
    return attended


class BlockLayer(nn.Module):
    """One decoder layer. Its norm of the input does not apply to the context."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = Norm(hidden, eps=eps)
        self.self_attn = BlockAttention(config)
        self.post_attention_layernorm = Norm(hidden, eps=eps)
        self.mlp = GatedMLP(
            hidden_size=hidden, inner_size=config.intermediate_size, activation=config.hidden_act
        )

    @property
    def norms_and_parts(self) -> tuple[tuple[Norm, BlockAttention | GatedMLP], ...]:
        """The norms, and what reads them."""
        return (
            (self.input_layernorm, self.self_attn),
            (self.post_attention_layernorm, self.mlp),
        )

    def forward(
        self,
        hidden: Float[Tensor, "rows hidden"],
        *,
        rotation: Rotation,
        context: Context,
        room: Context | None,
        mask: Tensor | None,
        num_blocks: int,
    ) -> Float[Tensor, "rows hidden"]:
        """Run the layer.

        Args:
            hidden: States of all positions of each row of the batch, one row after another.
            rotation: Rotation of the positions.
            context: Keys and values of the context.
            room: The last entries of the context, if they are for the block's own keys and values.
            mask: See `BlockHeads.forward`.
            num_blocks: The same.
        """
        hidden = self.self_attn(
            hidden,
            self.input_layernorm(hidden),
            rotation=rotation,
            context=context,
            room=room,
            mask=mask,
            num_blocks=num_blocks,
        )
        return self.mlp(hidden, self.post_attention_layernorm(hidden))  # type: ignore[no-any-return]


class MarkovHead(nn.Module):
    """Adds to the logits of a position what the token before it says.

    The term is a product of low rank. Vanilla: only the previous token counts. Gated: the state of
    the position gates the token's embedding. Rnn: a recurrent state carries the earlier tokens of
    the block.

    Source: the code of DSpark.
    """

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        rank, hidden = config.markov_rank, config.hidden_size
        self.kind, self.rank = config.markov, rank
        self.markov_w1 = nn.Embedding(config.vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, config.draft_vocab_size, bias=False)
        if self.kind == "gated":
            self.gate_proj = nn.Linear(hidden + rank, rank)
        elif self.kind == "rnn":
            self.joint_proj = nn.Linear(2 * rank + hidden, 3 * rank)

    def embed(self, previous: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows rank"]:
        """Return the embeddings of tokens, ids of the target."""
        return self.markov_w1(previous)  # type: ignore[no-any-return]  # untyped call

    def code(
        self,
        previous: Int[Tensor, "*rows"],
        hidden: Float[Tensor, "*rows hidden"],
        state: Float[Tensor, "*rows rank"] | None = None,
    ) -> tuple[Float[Tensor, "*rows rank"], Float[Tensor, "*rows rank"] | None]:
        """Return what `markov_w2` maps to the term, and the next state.

        Args:
            previous: The token before each position, an id of the target.
            hidden: Result of `BlockHeads.forward` there; the vanilla head does not read it.
            state: State after the position before, of an rnn; None at the first of a block.
        """
        embedded = self.embed(previous)
        if self.kind == "vanilla":
            return embedded, None
        if self.kind == "gated":
            gate = self.gate_proj(torch.cat((hidden, embedded), dim=-1)).sigmoid()
            return gate * embedded, None
        if state is None:
            state = torch.zeros_like(embedded)
        joined = self.joint_proj(torch.cat((state, embedded, hidden), dim=-1))
        gate, candidate, output = joined.chunk(3, dim=-1)
        gate = gate.sigmoid()
        return output.tanh(), gate * state + (1 - gate) * candidate.tanh()

    def matrix(self, batch: int) -> Float[Tensor, "batch rank draft_vocab"]:
        """Return a view of the output matrix for `added`."""
        return self.markov_w2.weight.t().expand(batch, -1, -1)

    def added(
        self,
        logits: Float[Tensor, "batch 1 draft_vocab"],
        code: Float[Tensor, "batch width rank"],
        matrix: Float[Tensor, "batch rank draft_vocab"],
    ) -> Float[Tensor, "batch width draft_vocab"]:
        """Return logits plus the term of each code, in one call if their dtypes agree."""
        if logits.dtype != matrix.dtype:  # logits may be the target's
            return code @ matrix + logits
        return torch.baddbmm(logits, code, matrix)


class MarkovTerms:
    """Terms of a vanilla Markov head, kept for the tokens that were asked for.

    Texts repeat their tokens, and on a CPU the product for a token takes longer than anything else
    at a level of a tree.
    """

    def __init__(self, markov: MarkovHead) -> None:
        """Start without any term."""
        weight = markov.markov_w2.weight
        num_rows = max(_TERM_BYTES // (weight.element_size() * len(weight)), 1)
        self._markov, self._marks = markov, _marks(markov)
        with torch.inference_mode(mode=False):  # or they could not be written outside of one
            self._rows = weight.new_empty(num_rows, 1, len(weight))
        self._indices: dict[int, int] = {}  # row of each token

    @property
    def is_current(self) -> bool:
        """Whether the head's weights are those of the terms."""
        return self._marks == _marks(self._markov)

    def of(self, tokens: Int[Tensor, "batch width"]) -> Float[Tensor, "batch width draft_vocab"]:
        """Return the terms after some tokens, ids of the target; reads them on the host."""
        wanted = [token for row in tokens.tolist() for token in row]
        new = list({token: None for token in wanted if token not in self._indices})
        if len(self._indices) + len(new) > len(self._rows):  # start afresh
            self._indices.clear()
            new = list(dict.fromkeys(wanted))
        if len(new) > len(self._rows):
            return self._compute(tokens)
        if new:
            first = len(self._indices)
            terms = self._compute(tokens.new_tensor(new))
            self._rows.narrow(0, first, len(new)).copy_(terms[:, None])
            self._indices.update(zip(new, range(first, first + len(new)), strict=True))
        indices = [self._indices[token] for token in wanted]
        if len(indices) == 1:
            return self._rows.narrow(0, indices[0], 1)
        return self._rows[tokens.new_tensor(indices)].view(*tokens.shape, -1)

    def _compute(self, tokens: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows draft_vocab"]:
        return self._markov.markov_w2(self._markov.embed(tokens))  # type: ignore[no-any-return]


def _marks(module: nn.Module) -> list[object]:
    return [
        (weight.data_ptr(), weight.dtype, None if weight.is_inference() else weight._version)
        for weight in module.parameters()
    ]


class ConfidenceHead(nn.Module):
    """Estimates the logit of a draft token's acceptance.

    It reads the state of a position and the Markov head's embedding of the token before it.
    """

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.hidden_size + config.markov_rank, 1)

    def forward(
        self,
        hidden: Float[Tensor, "*rows hidden"],
        embedded: Float[Tensor, "*rows rank"] | None,
    ) -> Float[Tensor, "*rows"]:
        """Return the logit of each position."""
        states = hidden if embedded is None else torch.cat((hidden, embedded), dim=-1)
        return self.proj(states).squeeze(-1)  # type: ignore[no-any-return]  # untyped call
