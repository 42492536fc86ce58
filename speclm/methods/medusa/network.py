"""Medusa heads: each drafts one later token from one hidden state of the target."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from speclm.config import MAX_DEPTH, require_count, require_size
from speclm.methods.medusa.checkpoint import MedusaCheckpoint
from speclm.tree.static import RankPaths

Layer = tuple[Tensor, Tensor | None]
"""Weight ``[heads, hidden in, hidden out]`` and bias of a layer."""

MAX_HEADS = MAX_DEPTH
"""Maximum number of heads; a tree is not deeper."""


@dataclass(frozen=True, slots=True)
class MedusaHeadsConfig:
    """Sizes and switches that Medusa heads are built from.

    Args:
        hidden_size: Width of the target's hidden states.
        vocab_size: Width of the target's logits.
        num_heads: Heads; head i drafts the token i + 2 positions after the hidden state.
        num_layers: Residual layers of each head.
        has_own_lm_head: Whether each head ends in an output matrix of its own; otherwise the
            target's is used.
        has_bias: Whether the residual layers have a bias.

    Raises:
        OptionError: If a value is out of range.
    """

    hidden_size: int
    vocab_size: int
    num_heads: int = 5
    num_layers: int = 1
    has_own_lm_head: bool = False
    has_bias: bool = True

    def __post_init__(self) -> None:
        for name in ("hidden_size", "vocab_size", "num_layers"):
            require_size(name, getattr(self, name))
        require_count("num_heads", self.num_heads, low=1, high=MAX_HEADS)


class MedusaHeads(nn.Module):
    """A stack of residual layers for each head; all heads are computed together.

    Every layer maps x to ``x + SiLU(W x + b)``. Parameters are stacked over heads, so a layer is
    one batched product. New heads return their input, because their weights are zero.

    Source: Cai et al. 2024 (Medusa), section 2.1.
    """

    def __init__(
        self,
        config: MedusaHeadsConfig,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Allocate heads of the given sizes."""
        super().__init__()
        self.config = config
        layers, heads, hidden = config.num_layers, config.num_heads, config.hidden_size

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, dtype=dtype, device=device))

        self.weight = zeros(layers, heads, hidden, hidden)
        self.bias = zeros(layers, heads, hidden) if config.has_bias else None
        self.lm_weight = zeros(heads, config.vocab_size, hidden) if config.has_own_lm_head else None
        self._views: tuple[tuple[object, ...], list[Layer]] | None = None

    @property
    def num_heads(self) -> int:
        """Number of draft tokens ahead."""
        return self.config.num_heads

    @torch.no_grad()
    def init_weights_(
        self,
        lm_weight: Float[Tensor, "vocab hidden"] | None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        """Initialise the heads so that they repeat the target's own prediction.

        Args:
            lm_weight: The target's output matrix, copied to heads that have their own.
            generator: Source of the small random weights of all layers but the last; layers that
                all start at zero would stay equal to each other.
        """
        if self.lm_weight is not None and lm_weight is not None:
            self.lm_weight.copy_(lm_weight.to(self.lm_weight).expand_as(self.lm_weight))
        self.weight.zero_()
        if self.bias is not None:
            self.bias.zero_()
        if self.config.num_layers > 1:
            bound = 1 / math.sqrt(self.config.hidden_size)
            first = torch.empty(self.weight[:-1].shape, dtype=torch.float32, device="cpu")
            self.weight[:-1].copy_(first.uniform_(-bound, bound, generator=generator))

    def forward(
        self,
        hidden: Float[Tensor, "rows hidden"],
        *,
        lm_head: Callable[[Tensor], Tensor],
        num_heads: int | None = None,
    ) -> Float[Tensor, "rows heads vocab"]:
        """Return the logits of the first `num_heads` heads.

        Args:
            hidden: Hidden states of the target after its final norm.
            lm_head: The target's map from hidden states to logits; called if the heads have no
                output matrix of their own.
            num_heads: Heads to compute; None for all.
        """
        used = self.num_heads if num_heads is None else min(num_heads, self.num_heads)
        states = hidden.to(self.weight.dtype).expand(used, -1, -1)
        for weight, bias in self._layers(used):
            if bias is None:
                change = torch.bmm(states, weight)
            else:
                change = torch.baddbmm(bias, states, weight)
            states = states + F.silu(change)  # [heads, rows, hidden]
        if self.lm_weight is None:
            return lm_head(states.transpose(0, 1))
        return torch.bmm(states, self.lm_weight[:used].transpose(1, 2)).transpose(0, 1)

    def _layers(self, num_heads: int) -> list[Layer]:
        """Return the layers of the first heads. Without gradients, the views are made once."""
        key = num_heads, self.weight.data_ptr(), self.weight.dtype
        if self._views is not None and self._views[0] == key and not self.weight.requires_grad:
            return self._views[1]
        weights = self.weight[:, :num_heads].transpose(2, 3).unbind(0)
        biases: Sequence[Tensor | None] = [None] * len(weights)
        if self.bias is not None:
            biases = self.bias[:, :num_heads, None].unbind(0)
        layers = list(zip(weights, biases, strict=True))
        self._views = None if self.weight.requires_grad else (key, layers)
        return layers


def build_medusa(
    checkpoint: MedusaCheckpoint, *, vocab_size: int, dtype: torch.dtype, device: torch.device
) -> MedusaHeads:
    """Return the heads of a checkpoint, ready to draft.

    Args:
        checkpoint: Result of `read_medusa`.
        vocab_size: Width of the target's logits, for heads that do not show it.
        dtype: Dtype of the weights.
        device: Device of the weights.
    """
    config = MedusaHeadsConfig(
        hidden_size=checkpoint.hidden_size,
        vocab_size=checkpoint.vocab_size or vocab_size,
        num_heads=checkpoint.num_heads,
        num_layers=checkpoint.num_layers,
        has_own_lm_head=checkpoint.has_own_lm_head,
        has_bias=checkpoint.has_bias,
    )
    heads = MedusaHeads(config, device=torch.device("meta"))
    heads.load_state_dict(checkpoint.stacked(dtype=dtype, device=device), assign=True)
    return heads.eval().requires_grad_(requires_grad=False)


def medusa_checkpoint(
    heads: MedusaHeads, *, base_name_or_path: str | None = None, choices: RankPaths | None = None
) -> MedusaCheckpoint:
    """Return heads as a checkpoint that shares their memory.

    Args:
        heads: Trained heads.
        base_name_or_path: The model that they were trained on, if it is to be recorded.
        choices: Static tree that is to be stored with them.
    """
    return MedusaCheckpoint.of_stacked(
        **heads.state_dict(),
        vocab_size=heads.config.vocab_size,
        base_name_or_path=base_name_or_path,
        choices=choices,
    )
