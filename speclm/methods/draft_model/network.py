"""Draft models like Llama, run on their own weights with few calls."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from speclm.cache.tree_cache import TreeCache
from speclm.drafting.decoder_parts import FixedNorm, Product, Rotation, rotated, signed

MAPS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Weights = list[list[Product]]
"""Products of each layer, in the order of `MAPS`, and of the head.

They hold views for one draft: held longer, they would outlive a model that is moved."""


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
        self._buffer: _Buffer | None = None
        windows = [layer.window for layer in self._layers if layer.window is not None]
        self.window: int | None = min(windows, default=None)
        """Number of positions from which on a layer does not see all of them; None if all do."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a copied proposer makes one for its own model

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights and of all outputs."""
        return self._embedding.weight.dtype

    @torch.no_grad()
    def weights(self) -> Weights:
        """Return views of the weights as they are now."""
        parts = [*(layer.maps for layer in self._layers), [self._head]]
        return [[Product(part.weight, part.bias) for part in layer] for layer in parts]

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
        weights: Weights,
        *,
        rotation: Rotation,
        bias: Float[Tensor, "mask_rows 1 width kv_len"] | None,
        cache: TreeCache,
    ) -> Float[Tensor, "rows hidden"]:
        """Run tokens, which become pending in the cache.

        Args:
            tokens: Tokens of the model.
            weights: Result of `weights`.
            rotation: Rotation of their positions.
            bias: Added to the scores of attention; None if each token sees all keys.
            cache: A cache that a forward of the model has written.

        Returns:
            Hidden states after the final norm, all rows one after another; see `logits`.
        """
        batch, width = tokens.shape
        cache.reserve(width)
        storage = cache.storage
        assert storage is not None, "a draft before the prompt"
        first = cache.tree_start + cache.num_pending
        written = storage.narrow(3, first, width).transpose(2, 3).unbind()
        seen = storage.narrow(3, 0, first + width).unbind()
        groups = self._layers[0].num_heads // self._layers[0].num_kv_heads
        if bias is not None and width > 1 and groups > 1:
            bias = bias.repeat(1, 1, groups, 1)
        states = F.embedding(tokens.flatten(), self._embedding.weight)
        buffer = self._room(states, batch=batch)
        for index, (layer, products) in enumerate(zip(self._layers, weights[:-1], strict=True)):
            own = slice(2 * index, 2 * index + 2)
            step = _Step(buffer, rotation, bias, written=written[own], seen=seen[own])
            states = layer(states, products, step)
        cache.append(width)
        return self._norm(states)

    def _room(self, states: Float[Tensor, "rows hidden"], *, batch: int) -> "_Buffer":
        """Return the buffer of the last call if the states have the same shape."""
        layer, shape = self._layers[0], (batch, states.shape[0] // batch)
        if self._buffer is None or self._buffer.by_head.shape[:2] != shape:
            heads, size = (layer.num_heads, layer.num_kv_heads), layer.head_dim
            with torch.inference_mode(mode=False):  # or it could not be written outside of one
                both = states.new_empty(states.shape[0], sum(heads) * size)
            queries, keys = torch.split(both, [count * size for count in heads], dim=1)
            self._buffer = _Buffer(queries, keys, both.view(*shape, -1, size))
        return self._buffer

    @torch.no_grad()
    def logits(
        self, hidden: Float[Tensor, "rows hidden"], weights: Weights, *, batch: int
    ) -> Float[Tensor, "batch width vocab"]:
        """Return the logits for results of `forward`, or for some of their rows."""
        logits = weights[-1][0](hidden)
        return logits.view(batch, -1, logits.shape[1])


@dataclass(frozen=True, slots=True, eq=False)
class _Buffer:
    """Room for the queries and keys of a layer, which are rotated together.

    Args:
        queries: ``[batch * width, heads * head_dim]``.
        keys: ``[batch * width, kv_heads * head_dim]``.
        by_head: Both, ``[batch, width, heads + kv_heads, head_dim]``.
    """

    queries: Tensor
    keys: Tensor
    by_head: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """What a layer needs next to the states.

    Args:
        buffer: Room for queries and keys.
        rotation: Rotation of the positions.
        bias: Added to the scores; None if all keys are seen.
        written: Where keys and values go, ``[batch, width, kv_heads, head_dim]``.
        seen: All keys and values, ``[batch, kv_heads, kv_len, head_dim]``.
    """

    buffer: _Buffer
    rotation: Rotation
    bias: Tensor | None
    written: tuple[Tensor, ...]
    seen: tuple[Tensor, ...]


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
        to_queries, to_keys, to_values, from_heads, gate, up, down = products
        normed = self._input_norm(states)
        to_queries(normed, out=step.buffer.queries)
        to_keys(normed, out=step.buffer.keys)
        both = step.buffer.by_head
        if self._head_norm is not None:
            both = self._head_norm(both)
        both = rotated(both, step.rotation)
        queries, keys = torch.split_with_sizes(both, [self.num_heads, self.num_kv_heads], dim=2)
        step.written[0].copy_(keys)
        step.written[1].copy_(to_values(normed).view(keys.shape))
        states = from_heads.added(states, self._attended(queries, step))
        normed = self._norm(states)
        gated = self._activate(gate(normed)).mul_(up(normed))
        return down.added(states, gated)

    def _attended(
        self, queries: Float[Tensor, "batch width heads head_dim"], step: _Step
    ) -> Float[Tensor, "rows heads_times_dim"]:
        """Attend; the query heads of a key head become further queries, which see the same."""
        (batch, width), kv_heads = queries.shape[:2], self.num_kv_heads
        if width == 1:
            queries = queries.view(batch, kv_heads, -1, self.head_dim)
        else:
            queries = queries.transpose(1, 2).reshape(batch, kv_heads, -1, self.head_dim)
        keys, values = step.seen
        attended = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=step.bias, scale=self._scale
        )
        if width == 1:
            return attended.reshape(batch, -1)
        by_head = attended.reshape(batch, self.num_heads, width, -1)
        return by_head.transpose(1, 2).reshape(batch * width, -1)


def fixed(norm: Any) -> FixedNorm:
    """Return the norm of a module."""
    return FixedNorm(norm.weight.detach(), float(norm.variance_epsilon))


class LevelRun(ABC):
    """Runs a draft model in one draft."""

    @abstractmethod
    def catch_up(self, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch 1 vocab"]:
        """Feed the unseen tokens, padded at their end, and return the logits after the last."""

    @abstractmethod
    def below(
        self, tokens: Int[Tensor, "batch width"], parents: Int[Tensor, "batch width"]
    ) -> Float[Tensor, "batch width vocab"]:
        """Feed the next level and return its logits.

        Args:
            tokens: Its tokens.
            parents: Index of each one's parent in the last level.
        """


class NetworkRun(LevelRun):
    """Runs a network in one draft: first the tokens that it has not seen, then level by level.

    Rotations of all levels are looked up once. The mask of a level is made of its parents' rows in
    the mask of the level above.
    """

    def __init__(
        self,
        network: DraftNetwork,
        cache: TreeCache,
        num_unseen: list[int],
        *,
        depth: int,
        max_nodes: int,
        is_chain: bool,
    ) -> None:
        """Prepare a draft.

        Args:
            network: The network.
            cache: See `ModelRun`.
            num_unseen: See `ModelRun`.
            depth: Maximum levels below the root.
            max_nodes: Maximum nodes that are fed below the root.
            is_chain: Whether no level has siblings.
        """
        self._network, self._cache, self._weights = network, cache, network.weights()
        self._num_unseen, self._level = num_unseen, 0
        longest, start = max(num_unseen), cache.tree_start
        is_even = min(num_unseen) == longest
        self._sees_all = is_even and not cache.is_ragged and not cache.has_padding
        counts = torch.tensor(num_unseen, device=cache.lengths.device, dtype=torch.long)
        cosines, sines = network.rotation(start + longest + depth)
        if self._sees_all:
            cosines, sines = (p.narrow(1, start, longest + depth) for p in (cosines, sines))
        else:
            order = torch.arange(max(longest, depth), device=counts.device).expand(len(counts), -1)
            depths = torch.cat([order[:, :longest], counts[:, None] + order[:, :depth]], dim=1)
            first = cache.lengths - cache.num_padding
            positions = (first[:, None] + depths).clamp_(min=0)
            cosines, sines = cosines[0, positions], sines[0, positions]
        sizes = [longest, *[1] * depth]
        by_level = torch.split(cosines, sizes, dim=1), torch.split(sines, sizes, dim=1)
        self._rotations = list(zip(*by_level, strict=True))
        self._seen = None
        if not (self._sees_all and is_chain):
            self._seen = self._seen_by_root(counts, start + longest + max_nodes)

    @override
    def catch_up(self, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch 1 vocab"]:
        (batch, longest), bias = tokens.shape, self._causal_bias(tokens.shape[1])
        hidden = self._run(tokens, bias)
        if longest > 1:
            hidden = last_of(hidden.view(batch, longest, -1), self._num_unseen)[:, 0]
        return self._network.logits(hidden, self._weights, batch=batch)

    @override
    def below(
        self, tokens: Int[Tensor, "batch width"], parents: Int[Tensor, "batch width"]
    ) -> Float[Tensor, "batch width vocab"]:
        self._level += 1
        hidden = self._run(tokens, self._bias(parents))
        return self._network.logits(hidden, self._weights, batch=len(tokens))

    def _run(self, tokens: Tensor, bias: Tensor | None) -> Float[Tensor, "rows hidden"]:
        rotation = self._rotations[self._level]
        return self._network.forward(
            tokens, self._weights, rotation=rotation, bias=bias, cache=self._cache
        )

    def _nothing(self, *shape: int) -> Tensor:
        """Return an additive mask under which nothing is seen."""
        dtype, device = self._network.dtype, self._cache.lengths.device
        return torch.full(shape, torch.finfo(dtype).min, dtype=dtype, device=device)

    def _seen_by_root(
        self, num_unseen: Int[Tensor, " batch"], kv_len: int
    ) -> Float[Tensor, "batch 1 kv_len"]:
        cache, start = self._cache, self._cache.tree_start
        seen = self._nothing(len(num_unseen), 1, kv_len)
        if self._sees_all:
            seen[:, :, : start + max(self._num_unseen)] = 0
            return seen
        kv_indices = torch.arange(kv_len, device=num_unseen.device)
        sees = (kv_indices >= cache.num_padding[:, None]) & (kv_indices < cache.lengths[:, None])
        sees |= (kv_indices >= start) & (kv_indices < start + num_unseen[:, None])
        return seen.masked_fill_(sees[:, None], 0)

    def _causal_bias(self, num_new: int) -> Float[Tensor, "mask_rows 1 new kv_len"] | None:
        if self._sees_all and num_new == 1:
            return None
        start = self._cache.tree_start
        if self._sees_all:
            return self._nothing(1, 1, num_new, start + num_new).triu_(1 + start)
        assert self._seen is not None
        before = self._seen[:, :, :start].expand(-1, num_new, -1)
        among = self._nothing(1, num_new, num_new).triu_(1).expand(len(before), -1, -1)
        return torch.cat([before, among], dim=2)[:, None]

    def _bias(
        self, parents: Int[Tensor, "batch width"]
    ) -> Float[Tensor, "batch 1 width kv_len"] | None:
        if self._seen is None:
            return None
        cache, width = self._cache, parents.shape[1]
        own = cache.tree_start + cache.num_pending
        if width > 1 or self._seen.shape[1] > 1:
            indices = parents[:, :, None].expand(-1, -1, self._seen.shape[2])
            self._seen = self._seen.gather(1, indices)
        self._seen.narrow(2, own, width).diagonal(dim1=1, dim2=2).zero_()
        return self._seen.narrow(2, 0, own + width)[:, None]


def last_of(
    states: Float[Tensor, "batch seq size"], counts: list[int]
) -> Float[Tensor, "batch 1 size"]:
    """Return the last state of each row, whose length is given."""
    if min(counts) == states.shape[1]:
        return states[:, -1:]
    return states[range(len(counts)), [count - 1 for count in counts]][:, None]
