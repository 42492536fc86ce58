"""Parts of small decoders: norms, projections and the gated feed-forward part.

Each can hold its weights in a second form, which decodes faster: the calls of a draft are so small
that their number is what they cost.
"""

import math
from abc import abstractmethod
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.activations import ACT2FN
from typing_extensions import override

Rotation = tuple[Tensor, Tensor]
"""Cosines, and sines with the signs of the halves: ``[batch, seq, 1, head_dim]``."""

Product = tuple[Tensor, Tensor | None]
"""Weight and bias of a linear map."""


def signed(cosines: Tensor, sines: Tensor) -> Rotation:
    """Return a rotation from the cosines and sines of positions, ``[batch, seq, head_dim]``."""
    first, second = sines.chunk(2, dim=-1)
    return cosines[:, :, None], torch.cat((-first, second), dim=-1)[:, :, None]


def rotated(
    states: Float[Tensor, "batch seq heads head_dim"], rotation: Rotation
) -> Float[Tensor, "batch seq heads head_dim"]:
    """Rotate the pairs (i, i + half) of every head."""
    cosines, sines = rotation
    return torch.addcmul(states * cosines, states.roll(states.shape[-1] // 2, -1), sines)


def joined(*parts: nn.Linear) -> Product:
    """Return a product that gives the parts' outputs one after another; one part is not copied."""
    biases = [part.bias.detach() for part in parts if cast("Tensor | None", part.bias) is not None]
    if len(parts) == 1:
        return parts[0].weight.detach(), biases[0] if biases else None
    weight = torch.cat([part.weight.detach() for part in parts])
    return weight, torch.cat(biases) if biases else None


class CausalMasks:
    """Masks of new positions that see all cached ones and those before them, cut from one mask."""

    def __init__(self) -> None:
        """Start without a mask."""
        self._mask: Tensor | None = None
        self._num_cached = 0  # columns before the diagonal

    def cut(
        self, num_new: int, *, num_cached: int, device: torch.device
    ) -> Bool[Tensor, "1 1 new kv_len"]:
        """Return which keys each new position sees."""
        made = self._mask
        if made is not None and made.device != device:  # the network was moved
            made = None
        if made is None or num_new > made.shape[2] or num_cached > self._num_cached:
            rows = max(num_new, 16 if made is None else made.shape[2])
            self._num_cached = max(256, 2 * num_cached)
            made = torch.ones(1, 1, rows, self._num_cached + rows, dtype=torch.bool, device=device)
            self._mask = made = made.tril_(self._num_cached)
        return made[:, :, :num_new, self._num_cached - num_cached : self._num_cached + num_new]


class FixedNorm:
    """RMS norm over the last axis, with weights that do not change."""

    def __init__(self, weight: Float[Tensor, "*heads size"], eps: float) -> None:
        """Prepare the weights; those of several heads are one after another."""
        size = weight.shape[-1]
        self._weight, self._eps, self._size = weight, eps, size
        self._root: Tensor | None = None
        if weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64):
            # PyTorch has one kernel on accelerators, and on a CPU six calls where four do.
            self._weight = weight * math.sqrt(size)
            self._root = weight.new_tensor(math.sqrt(size * eps))

    def __call__(self, states: Tensor) -> Tensor:
        """Return states divided by their root mean square, times the weights."""
        if self._root is None and self._weight.ndim == 1:
            return F.rms_norm(states, (self._size,), self._weight, self._eps)
        if self._root is None:
            return F.rms_norm(states, (self._size,), eps=self._eps) * self._weight
        lengths = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
        return states / torch.hypot(lengths, self._root) * self._weight


class Fusable(nn.Module):
    """A part with a second form of its weights."""

    @abstractmethod
    def fuse_(self) -> None:
        """Make the second form; it does not follow the weights."""

    @abstractmethod
    def separate_(self) -> None:
        """Drop it."""


class Norm(nn.RMSNorm, Fusable):
    """RMS norm of hidden states."""

    _fixed: FixedNorm | None = None

    @override
    def fuse_(self) -> None:
        self._fixed = FixedNorm(self.weight.detach(), cast("float", self.eps))

    @override
    def separate_(self) -> None:
        self._fixed = None

    @override
    def forward(self, x: Tensor) -> Tensor:
        if self._fixed is not None:
            return self._fixed(x)
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class Projections(Fusable):
    """Queries, keys and values of grouped attention, and the map of its output.

    Keys and queries may be normed head by head.
    """

    _input: Product | None = None
    _output: Product
    _norms: FixedNorm | None = None

    def __init__(
        self,
        *,
        input_size: int,
        hidden_size: int,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int,
        biases: tuple[bool, bool],
        norm_eps: float | None,
    ) -> None:
        """Add the maps.

        Args:
            input_size: Width of the states that are read.
            hidden_size: Width of the output.
            head_dim: Width of a head.
            num_heads: Heads of the queries.
            num_kv_heads: Heads of keys and values.
            biases: Whether the maps of the input have biases, and that of the output.
            norm_eps: Added to the mean square in the norms; None for no norms.
        """
        super().__init__()
        bias, output_bias = biases
        self.head_dim, self.num_heads, self.num_kv_heads = head_dim, num_heads, num_kv_heads
        q_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
        self.q_proj = nn.Linear(input_size, q_size, bias=bias)
        self.k_proj = nn.Linear(input_size, kv_size, bias=bias)
        self.v_proj = nn.Linear(input_size, kv_size, bias=bias)
        self.o_proj = nn.Linear(q_size, hidden_size, bias=output_bias)
        self.q_norm = self.k_norm = None
        if norm_eps is not None:
            self.q_norm = nn.RMSNorm(head_dim, eps=norm_eps)
            self.k_norm = nn.RMSNorm(head_dim, eps=norm_eps)

    @override
    def fuse_(self) -> None:
        self._input = joined(self.q_proj, self.k_proj, self.v_proj)
        self._output = joined(self.o_proj)
        if self.q_norm is not None and self.k_norm is not None:
            weights = (
                self.q_norm.weight.detach().expand(self.num_heads, -1),
                self.k_norm.weight.detach().expand(self.num_kv_heads, -1),
            )
            self._norms = FixedNorm(torch.cat(weights), cast("float", self.q_norm.eps))

    @override
    def separate_(self) -> None:
        self._input = self._norms = None

    def project(
        self, states: Float[Tensor, "batch seq input"], rotation: Rotation
    ) -> tuple[
        Float[Tensor, "batch heads seq head_dim"],
        Float[Tensor, "batch kv_heads seq head_dim"],
        Float[Tensor, "batch kv_heads seq head_dim"],
    ]:
        """Return rotated queries and keys, and values."""
        by_head, num_rotated = (*states.shape[:2], -1, self.head_dim), self.num_heads
        num_rotated += self.num_kv_heads
        if self._input is None:
            queries, keys = self.q_proj(states).view(by_head), self.k_proj(states).view(by_head)
            if self.q_norm is not None and self.k_norm is not None:
                queries, keys = self.q_norm(queries), self.k_norm(keys)
            both, values = torch.cat((queries, keys), dim=2), self.v_proj(states).view(by_head)
        else:
            everything = F.linear(states, *self._input).view(by_head)
            both, values = everything[:, :, :num_rotated], everything[:, :, num_rotated:]
            if self._norms is not None:
                both = self._norms(both)
        both = rotated(both, rotation).transpose(1, 2)
        return both[:, : self.num_heads], both[:, self.num_heads :], values.transpose(1, 2)

    def output(
        self, attended: Float[Tensor, "batch heads seq head_dim"]
    ) -> Float[Tensor, "batch seq hidden"]:
        """Map what the heads read to hidden states."""
        states = attended.transpose(1, 2).flatten(2)
        if self._input is None:
            return self.o_proj(states)  # type: ignore[no-any-return]  # a Linear's call is untyped
        return F.linear(states, *self._output)


class GatedMLP(Fusable):
    """The gated feed-forward part."""

    _input: Product | None = None
    _output: Product

    def __init__(self, *, hidden_size: int, inner_size: int, activation: str) -> None:
        """Add the maps."""
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.down_proj = nn.Linear(inner_size, hidden_size, bias=False)
        self.activate = ACT2FN[activation]

    @override
    def fuse_(self) -> None:
        self._input, self._output = joined(self.gate_proj, self.up_proj), joined(self.down_proj)

    @override
    def separate_(self) -> None:
        self._input = None

    def forward(self, states: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows hidden"]:
        """Run the part."""
        if self._input is None:
            gated = self.activate(self.gate_proj(states)) * self.up_proj(states)
            return self.down_proj(gated)  # type: ignore[no-any-return]  # untyped call
        gate, up = F.linear(states, *self._input).chunk(2, dim=-1)
        return F.linear(self.activate(gate) * up, *self._output)
