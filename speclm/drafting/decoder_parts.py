"""Parts of small decoders: norms, projections and the gated feed-forward part.

Each can hold its weights in a second form, which decodes faster: the calls of a draft are so small
that their number is what they cost.
"""

import math
from abc import abstractmethod
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers.activations import ACT2FN
from typing_extensions import override

Rotation = tuple[Tensor, Tensor]
"""Cosines, and sines with the signs of the halves: ``[batch, 1, seq, head_dim]``, or without the
first two axes if all rows share them."""


def signed(cosines: Tensor, sines: Tensor) -> Rotation:
    """Return a rotation from the cosines and sines of positions, ``[batch, seq, head_dim]``."""
    first, second = sines.chunk(2, dim=-1)
    return cosines[:, None], torch.cat((-first, second), dim=-1)[:, None]


def rotated(
    states: Float[Tensor, "*axes seq head_dim"], rotation: Rotation, *, out: Tensor | None = None
) -> Float[Tensor, "*axes seq head_dim"]:
    """Rotate the pairs (i, i + half) of every head; the result is put in `out` if it is given."""
    cosines, sines = rotation
    swapped = states.roll(states.shape[-1] // 2, -1)
    return torch.addcmul(states * cosines, swapped, sines, out=out)


def by_head(
    states: Float[Tensor, "rows size"], *, batch: int, head_dim: int
) -> Float[Tensor, "batch heads seq head_dim"]:
    """Return the parts of each head; the rows of states are those of the batch, one by one."""
    seq = len(states) // batch
    if seq == 1:
        return states.view(batch, -1, 1, head_dim)
    return states.view(batch, seq, -1, head_dim).transpose(1, 2)


class Product:
    """A linear map of rows of states, in one call; its weights do not change."""

    def __init__(self, weight: Float[Tensor, "output input"], bias: Tensor | None) -> None:
        """Store a weight as `nn.Linear` has it, without a copy."""
        self._weight, self._bias = weight.t(), bias

    def __call__(
        self, states: Float[Tensor, "rows input"], *, out: Tensor | None = None
    ) -> Float[Tensor, "rows output"]:
        """Return the result, in `out` if it is given."""
        if self._bias is None:
            return torch.mm(states, self._weight, out=out)
        return torch.addmm(self._bias, states, self._weight, out=out)

    def added(
        self, residual: Float[Tensor, "rows output"], states: Float[Tensor, "rows input"]
    ) -> Float[Tensor, "rows output"]:
        """Return the result plus other states."""
        if self._bias is not None:
            residual = residual + self._bias
        return torch.addmm(residual, states, self._weight)

    def scaled(self, factors: Float[Tensor, " input"]) -> "Product":
        """Return a product that multiplies its input by some factors first."""
        return Product((self._weight * factors[:, None]).t(), self._bias)


def joined(*parts: nn.Linear) -> Product:
    """Return a product that gives the parts' outputs one after another; one part is not copied."""
    biases = [part.bias.detach() for part in parts if cast("Tensor | None", part.bias) is not None]
    if len(parts) == 1:
        return Product(parts[0].weight.detach(), biases[0] if biases else None)
    weight = torch.cat([part.weight.detach() for part in parts])
    return Product(weight, torch.cat(biases) if biases else None)


class CausalMasks:
    """Masks of new positions that see all cached ones and those before them, cut from one mask."""

    def __init__(self) -> None:
        """Start without a mask."""
        self._mask: Tensor | None = None
        self._num_cached = 0  # columns before the diagonal

    def cut(
        self, num_new: int, *, num_cached: int, like: Tensor
    ) -> Float[Tensor, "1 1 new kv_len"]:
        """Return what is added to the scores of each new position: 0 where it sees a key.

        Args:
            num_new: Number of new positions.
            num_cached: Number of positions before them.
            like: A tensor whose dtype and device are those of the mask.
        """
        made = self._mask
        if made is not None and (made.device, made.dtype) != (like.device, like.dtype):
            made = None  # the network was moved or cast
        if made is None or num_new > made.shape[2] or num_cached > self._num_cached:
            rows = max(num_new, 16 if made is None else made.shape[2])
            self._num_cached = max(256, 2 * num_cached)
            shape = (1, 1, rows, self._num_cached + rows)
            hidden = torch.full(shape, -torch.inf, dtype=like.dtype, device=like.device)
            self._mask = made = hidden.triu_(self._num_cached + 1)
        return made[:, :, :num_new, self._num_cached - num_cached : self._num_cached + num_new]


class FixedNorm:
    """RMS norm over the last axis, with weights that do not change."""

    def __init__(self, weight: Float[Tensor, "*heads size"], eps: float) -> None:
        """Prepare the weights, whose other axes are broadcast."""
        size = weight.shape[-1]
        self._weight: Tensor | None = weight
        self._eps, self._size = eps, size
        self._root: Tensor | None = None
        if weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64):
            # PyTorch has one kernel on accelerators, and on a CPU six calls where four do.
            self._weight = weight * math.sqrt(size)
            self._root = weight.new_tensor(math.sqrt(size * eps))

    @property
    def is_for_cpu(self) -> bool:
        """Whether this is the form for CPUs, which takes several weights as fast as one."""
        return self._root is not None

    def fold_(self) -> Tensor | None:
        """Leave out the weights from now on, which saves a call, and return them.

        What reads the norm's result has to be multiplied by them. None if they stay, because they
        cost no call of their own.
        """
        if self._root is None:
            return None
        weight, self._weight = self._weight, None
        return weight

    def __call__(self, states: Tensor) -> Tensor:
        """Return states divided by their root mean square, times the weights."""
        weight = self._weight
        if self._root is not None:
            lengths = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
            normed = states / torch.hypot(lengths, self._root)
            return normed if weight is None else normed * weight
        assert weight is not None, "only the form for CPUs leaves out the weights"
        if weight.ndim == 1:
            return F.rms_norm(states, (self._size,), weight, self._eps)
        return F.rms_norm(states, (self._size,), eps=self._eps) * weight


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

    def fold_(self) -> Tensor | None:
        """Leave out the weights of the second form, see `FixedNorm.fold_`."""
        return None if self._fixed is None else self._fixed.fold_()

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
                self.q_norm.weight.detach().expand(self.num_heads, 1, -1),
                self.k_norm.weight.detach().expand(self.num_kv_heads, 1, -1),
            )
            self._norms = FixedNorm(torch.cat(weights), cast("float", self.q_norm.eps))

    @override
    def separate_(self) -> None:
        self._input = self._norms = None

    def scale_input_(self, factors: Float[Tensor, " input"]) -> None:
        """Multiply the input by some factors from now on, in the second form."""
        assert self._input is not None, "the second form is not made"
        self._input = self._input.scaled(factors)

    def project(
        self, states: Float[Tensor, "rows input"], rotation: Rotation, *, batch: int
    ) -> tuple[
        Float[Tensor, "batch heads seq head_dim"],
        Float[Tensor, "batch kv_heads seq head_dim"],
        Float[Tensor, "batch kv_heads seq head_dim"],
    ]:
        """Return rotated queries and keys, and values.

        Args:
            states: States of all positions of each row of the batch, one row after another.
            rotation: Rotation of the positions.
            batch: Rows of the batch.
        """
        if self._input is None:
            maps = (self.q_proj, self.k_proj, self.v_proj)
            parts = torch.cat([part(states) for part in maps], dim=-1)
        else:
            parts = self._input(states)
        num_heads, num_kv_heads = self.num_heads, self.num_kv_heads
        heads = by_head(parts, batch=batch, head_dim=self.head_dim)
        both, values = heads.split_with_sizes((num_heads + num_kv_heads, num_kv_heads), dim=1)
        if self._norms is not None:
            both = self._norms(both)
        elif self.q_norm is not None and self.k_norm is not None:
            queries, keys = both.split_with_sizes((num_heads, num_kv_heads), dim=1)
            both = torch.cat((self.q_norm(queries), self.k_norm(keys)), dim=1)
        both = rotated(both, rotation)
        queries, keys = both.split_with_sizes((num_heads, num_kv_heads), dim=1)
        return queries, keys, values

    def add_output(
        self,
        residual: Float[Tensor, "rows hidden"],
        attended: Float[Tensor, "batch heads seq head_dim"],
    ) -> Float[Tensor, "rows hidden"]:
        """Return states plus the map of what the heads read."""
        if attended.shape[2] > 1:
            attended = attended.transpose(1, 2)
        states = attended.reshape(len(residual), -1)
        if self._input is None:
            return residual + self.o_proj(states)  # type: ignore[no-any-return]  # untyped call
        return self._output.added(residual, states)


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

    def scale_input_(self, factors: Float[Tensor, " hidden"]) -> None:
        """Multiply the input by some factors from now on, in the second form."""
        assert self._input is not None, "the second form is not made"
        self._input = self._input.scaled(factors)

    def forward(
        self, residual: Float[Tensor, "rows hidden"], states: Float[Tensor, "rows hidden"]
    ) -> Float[Tensor, "rows hidden"]:
        """Return states plus the part's output for other states."""
        if self._input is None:
            gated = self.activate(self.gate_proj(states)) * self.up_proj(states)
            return residual + self.down_proj(gated)  # type: ignore[no-any-return]  # untyped call
        gate, up = self._input(states).chunk(2, dim=-1)
        return self._output.added(residual, self.activate(gate) * up)
