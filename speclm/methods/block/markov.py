"""Small heads on the states of a block: the term of the previous token, and the confidence."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from speclm.methods.block.config import BlockConfig


class MarkovHead(nn.Module):
    """Adds to the logits of a position what the token before it says.

    The term is a product of low rank. Vanilla: of the previous token alone. Gated: the state of the
    position gates the token's embedding. Rnn: a recurrent state carries the earlier tokens of the
    block.

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
        """Return what `markov_w2` maps to the term, and the next state; see `bias`."""
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

    def bias(
        self,
        previous: Int[Tensor, "*rows"],
        hidden: Float[Tensor, "*rows hidden"],
        state: Float[Tensor, "*rows rank"] | None = None,
    ) -> tuple[Float[Tensor, "*rows draft_vocab"], Float[Tensor, "*rows rank"] | None]:
        """Return the term of some positions, and the state for those after them.

        Args:
            previous: The token before each, an id of the target.
            hidden: Result of `BlockHeads.forward` there; the vanilla head does not read it.
            state: State after the position before, of an rnn; None at the first of a block.
        """
        code, state = self.code(previous, hidden, state)
        return self.markov_w2(code), state


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
