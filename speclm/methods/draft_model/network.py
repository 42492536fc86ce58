"""Draft models like Llama, run on their own weights with few calls."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from speclm.cache.tree_cache import TreeCache
from speclm.drafting.decoder_parts import FixedNorm, Product, Rotation, rotated, signed

MAPS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_MAX_BUFFERS = 8


@dataclass(frozen=True, slots=True, eq=False)
class DraftViews:
    """Views for one draft. Held longer, they would outlive a model that is moved.

    Args:
        products: Products of each layer, in the order of `MAPS`, and of the head.
        written: Where keys and values are written.
        seen: The same, as attention reads them: keys and values of each layer in turn.
    """

    products: list[list[Product]]
    written: Float[Tensor, "layers two batch capacity kv_heads head_dim"]
    seen: Float[Tensor, "keys_and_values batch kv_heads capacity head_dim"]


class DraftNetwork:
    """Runs the tokens of a level through a model of the Llama pattern.

    A call of the model itself spends most of its time on masks, hooks and small operations. Here a
    level has no mask unless it needs one, rotations come from a table, and states have two axes.
    Weights are the model's own parameters; only those of norms are copied.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Look up the parts of a model without an obstacle."""
        decoder: Any = model.model
        config = model.config
        self._embedding: nn.Embedding = decoder.embed_tokens
        self._rotary: nn.Module = decoder.rotary_emb
        self._head: nn.Linear = cast("Any", model).lm_head
        self._layers = [_Layer(layer) for layer in decoder.layers[: config.num_hidden_layers]]
        self._norm = fixed(decoder.norm)
        self._table: Rotation | None = None
        self._buffers: dict[tuple[int, ...], _Buffer] = {}  # by rows and width
        windows = [layer.window for layer in self._layers if layer.window is not None]
        self.window: int | None = min(windows, default=None)
        """Number of positions from which on a layer does not see all of them; None if all do."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a copied proposer makes one for its own model

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self._embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights and of all outputs."""
        return self._embedding.weight.dtype

    @torch.no_grad()
    def views(self, cache: TreeCache, *, num_new: int) -> DraftViews:
        """Return views of the weights as they are now, and of a cache.

        Args:
            cache: A cache that a forward of the model has written.
            num_new: Tokens to make room for; the views are valid until more are written.
        """
        cache.reserve(num_new)
        storage = cache.storage
        assert storage is not None, "a draft before the prompt"
        parts = [*(layer.maps for layer in self._layers), [self._head]]
        products = [[Product(part.weight, part.bias) for part in layer] for layer in parts]
        written = storage.view(-1, 2, *storage.shape[1:]).transpose(3, 4)
        return DraftViews(products, written, storage)

    @torch.no_grad()
    def rotation(self, num_positions: int) -> Rotation:
        """Return the rotations of at least the first positions, ``[1, positions, 1, head_dim]``."""
        if self._table is None or self._table[0].shape[1] < num_positions:
            weight = self._embedding.weight  # the rotary module reads its dtype and device only
            positions = torch.arange(max(256, 2 * num_positions), device=weight.device)
            cosines, sines = signed(*self._rotary(weight, positions[None]))
            self._table = cosines.transpose(1, 2), sines.transpose(1, 2)
        return self._table

    @torch.no_grad()
    def forward(
        self,
        tokens: Int[Tensor, "batch width"],
        views: DraftViews,
        *,
        rotation: Rotation,
        bias: Float[Tensor, "mask_rows 1 width kv_len"] | None,
        cache: TreeCache,
    ) -> Float[Tensor, "rows hidden"]:
        """Run tokens, which become pending in the cache.

        Args:
            tokens: Tokens of the model.
            views: Result of `views`, with room for the tokens.
            rotation: Rotation of their positions.
            bias: Added to the scores of attention; None if each token sees all keys.
            cache: The cache of the views.

        Returns:
            Hidden states after the final norm, all rows one after another; see `logits`.
        """
        batch, width = tokens.shape
        first = cache.tree_start + cache.num_pending
        written = views.written.narrow(3, first, width).unbind()
        seen = views.seen.narrow(3, 0, first + width).unbind()
        groups = self._layers[0].num_heads // self._layers[0].num_kv_heads
        if bias is not None and width > 1 and groups > 1:
            bias = bias.repeat(1, 1, groups, 1)
        states = F.embedding(tokens.flatten(), self._embedding.weight)
        buffer = self._room(states, batch=batch)
        for index, layer in enumerate(self._layers):
            own = seen[2 * index : 2 * index + 2]
            step = _Step(buffer, rotation, bias, written=written[index], seen=own)
            states = layer(states, views.products[index], step)
        cache.append(width)
        return self._norm(states)

    @torch.no_grad()
    def over_storage(
        self,
        tokens: Int[Tensor, "batch width"],
        positions: Int[Tensor, "batch width"],
        seen: Bool[Tensor, "batch width capacity"],
        *,
        at: Int[Tensor, " width"],
        storage: Sequence[Tensor],
    ) -> Float[Tensor, "batch width hidden"]:
        """Return what `forward` does, with storage of fixed size and nothing read by the host.

        Args:
            tokens: Tokens of the model.
            positions: Their positions.
            seen: Which keys of the storage each of them sees.
            at: Where in the storage their keys and values are written.
            storage: Keys and values of each layer, and cosines and sines of all positions.
        """
        batch, width = tokens.shape
        *parts, cosines, sines = storage
        rotation = cosines[0, positions], sines[0, positions]
        bias = torch.zeros(seen.shape, dtype=self.dtype, device=seen.device)
        bias = bias.masked_fill(~seen, torch.finfo(self.dtype).min)[:, None]
        groups = self._layers[0].num_heads // self._layers[0].num_kv_heads
        if width > 1 and groups > 1:
            bias = bias.repeat(1, 1, groups, 1)
        states = F.embedding(tokens.flatten(), self._embedding.weight)
        for layer, keys, values in zip(self._layers, parts[::2], parts[1::2], strict=True):
            step = _FixedStep(rotation, bias, at, seen=(keys, values))
            states = layer.over_storage(states, step, batch=batch)
        return self._norm(states).view(batch, width, -1)

    @torch.no_grad()
    def head(self, hidden: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows vocab"]:
        """Return the logits for hidden states."""
        return F.linear(hidden, self._head.weight, self._head.bias)

    def _room(self, states: Float[Tensor, "rows hidden"], *, batch: int) -> "_Buffer":
        """Return a buffer for states, that of an earlier call if their shape was the same."""
        layer, shape = self._layers[0], (batch, states.shape[0] // batch)
        if shape not in self._buffers:
            if len(self._buffers) == _MAX_BUFFERS:
                self._buffers.clear()
            heads = (layer.num_heads, layer.num_kv_heads, layer.num_kv_heads)
            with torch.inference_mode(mode=False):  # or it could not be written outside of one
                room = states.new_empty(*shape, sum(heads), layer.head_dim)
                self._buffers[shape] = _buffer(room, heads)
        return self._buffers[shape]

    @torch.no_grad()
    def logits(
        self, hidden: Float[Tensor, "rows hidden"], views: DraftViews, *, batch: int
    ) -> Float[Tensor, "batch width vocab"]:
        """Return the logits for results of `forward`, or for some of their rows."""
        logits = views.products[-1][0](hidden)
        return logits.view(batch, -1, logits.shape[1])


@dataclass(frozen=True, slots=True, eq=False)
class _Buffer:
    """Room for the queries, keys and values of a layer, in this order, and views of it.

    Args:
        parts: The three, ``[batch * width, heads * head_dim]`` each.
        rotated: Queries and keys, ``[batch, width, heads + kv_heads, head_dim]``.
        stored: Keys and values, ``[2, batch, width, kv_heads, head_dim]``.
        asked: Queries by key head, ``[batch, kv_heads, groups, head_dim]`` if the width is 1, else
            ``[batch, heads, width, head_dim]``.
    """

    parts: tuple[Tensor, ...]
    rotated: Tensor
    stored: Tensor
    asked: Tensor


def _buffer(
    room: Float[Tensor, "batch width all_heads head_dim"], heads: tuple[int, int, int]
) -> _Buffer:
    """Return the views of a buffer with some heads of queries, keys and values."""
    batch, width, _, size = room.shape
    sizes = [count * size for count in heads]
    parts = torch.split_with_sizes(room.view(batch * width, -1), sizes, dim=1)
    stored = room.narrow(2, heads[0], 2 * heads[1]).view(batch, width, 2, heads[1], size)
    asked = room.narrow(2, 0, heads[0]).transpose(1, 2)
    if width == 1:
        asked = room.narrow(2, 0, heads[0]).view(batch, heads[1], -1, size)
    rotated_part = room.narrow(2, 0, heads[0] + heads[1])
    return _Buffer(tuple(parts), rotated_part, stored.permute(2, 0, 1, 3, 4), asked)


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """What a layer needs next to the states.

    Args:
        buffer: Room for queries and keys.
        rotation: Rotation of the positions.
        bias: Added to the scores; None if all keys are seen.
        written: Where keys and values go, ``[2, batch, width, kv_heads, head_dim]``.
        seen: All keys and values, ``[batch, kv_heads, kv_len, head_dim]`` each.
    """

    buffer: _Buffer
    rotation: Rotation
    bias: Tensor | None
    written: Tensor
    seen: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _FixedStep:
    """What a layer needs next to the states if its storage has a fixed size.

    Args:
        rotation: Rotation of the positions.
        bias: Added to the scores.
        at: Where keys and values go.
        seen: The storage, ``[batch, kv_heads, capacity, head_dim]`` each.
    """

    rotation: Rotation
    bias: Tensor
    at: Tensor
    seen: tuple[Tensor, Tensor]


class _Layer:
    """A decoder layer."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.maps: list[nn.Linear] = [
            getattr(mlp if name in mlp._modules else attention, name) for name in MAPS
        ]
        self._activate = mlp.act_fn
        self._scale, self.head_dim = float(attention.scaling), int(attention.head_dim)
        self.num_heads = attention.q_proj.out_features // self.head_dim
        self.num_kv_heads = attention.k_proj.out_features // self.head_dim
        self.window: int | None = getattr(attention, "sliding_window", None)
        if not hasattr(attention, "sliding_window"):  # Mistral's reads it from the config
            self.window = getattr(attention.config, "sliding_window", None)
        self._input_norm = fixed(layer.input_layernorm)
        self._norm = fixed(layer.post_attention_layernorm)
        self._head_norm: FixedNorm | None = None
        if hasattr(attention, "q_norm"):
            parts = (attention.q_norm, self.num_heads), (attention.k_norm, self.num_kv_heads)
            weights = [norm.weight.detach().expand(count, -1) for norm, count in parts]
            self._head_norm = FixedNorm(torch.cat(weights), attention.q_norm.variance_epsilon)

    def __call__(
        self, states: Float[Tensor, "rows hidden"], products: list[Product], step: _Step
    ) -> Float[Tensor, "rows hidden"]:
        *projections, from_heads, gate, up, down = products
        normed, buffer = self._input_norm(states), step.buffer
        for project, part in zip(projections, buffer.parts, strict=True):
            project(normed, out=part)
        both = buffer.rotated
        if self._head_norm is not None:
            both = self._head_norm(both)
        rotated(both, step.rotation, out=buffer.rotated)
        step.written.copy_(buffer.stored)
        (batch, width), queries = buffer.rotated.shape[:2], buffer.asked
        if width > 1:
            queries = queries.reshape(batch, self.num_kv_heads, -1, self.head_dim)
        states = from_heads.added(states, self._attended(queries, step, width=width))
        normed = self._norm(states)
        gated = self._activate(gate(normed)).mul_(up(normed))
        return down.added(states, gated)

    def over_storage(
        self, states: Float[Tensor, "rows hidden"], step: _FixedStep, *, batch: int
    ) -> Float[Tensor, "rows hidden"]:
        """Compute the same over storage of a fixed size, which is written in place."""
        width = len(states) // batch
        normed = self._input_norm(states)
        *projected, values = (F.linear(normed, m.weight, m.bias) for m in self.maps[:3])
        both = torch.cat(projected, dim=1).view(batch, width, -1, self.head_dim)
        if self._head_norm is not None:
            both = self._head_norm(both)
        both = rotated(both, step.rotation)
        queries, keys = torch.split_with_sizes(both, [self.num_heads, self.num_kv_heads], dim=2)
        for part, new in zip(step.seen, (keys, values.view_as(keys)), strict=True):
            part.index_copy_(2, step.at, new.transpose(1, 2))
        queries = queries.transpose(1, 2).reshape(batch, self.num_kv_heads, -1, self.head_dim)
        attended = self._attended(queries, step, width=width)
        from_heads, gate, up, down = self.maps[3:]
        states = states + F.linear(attended, from_heads.weight, from_heads.bias)
        normed = self._norm(states)
        gated = self._activate(F.linear(normed, gate.weight, gate.bias))
        gated = gated * F.linear(normed, up.weight, up.bias)
        return states + F.linear(gated, down.weight, down.bias)

    def _attended(
        self,
        queries: Float[Tensor, "batch kv_heads queries head_dim"],
        step: _Step | _FixedStep,
        *,
        width: int,
    ) -> Float[Tensor, "rows heads_times_dim"]:
        """Attend; the query heads of a key head are further queries, which see the same."""
        keys, values = step.seen
        attended = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=step.bias, scale=self._scale
        )
        if width == 1:
            return attended.reshape(len(queries), -1)
        by_head = attended.reshape(len(queries), self.num_heads, width, -1)
        return by_head.transpose(1, 2).reshape(len(queries) * width, -1)


def fixed(norm: Any) -> FixedNorm:
    """Return the norm of a module."""
    return FixedNorm(norm.weight.detach(), float(norm.variance_epsilon))
