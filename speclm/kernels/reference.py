"""The kernels in PyTorch: the definition of what they compute."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from speclm.kernels.inputs import TreeAttentionInputs
from speclm.tree.words import pack_words, unpack_words

_BLOCK = 512
"""Keys that are read in one step."""


def tree_attention_reference(
    inputs: TreeAttentionInputs,
) -> tuple[Float[Tensor, "batch nodes q_heads head_dim"], Float[Tensor, "batch q_heads nodes"]]:
    """Compute attention of tree nodes, one block of keys after the other.

    Scores and sums are float32, or float64 for float64 inputs. Slots that no node sees may hold
    any value. A deterministic call computes each node separately, from the slots that it sees.

    Returns:
        The output, and the logarithm of the softmax's denominator, sinks included.
    """
    if inputs.deterministic:
        return _node_by_node(inputs)
    accumulate = torch.float64 if inputs.query.dtype == torch.float64 else torch.float32
    batch, groups, nodes = inputs.batch, inputs.groups, inputs.num_nodes
    query = inputs.query.to(accumulate) * inputs.scale
    softmax = _OnlineSoftmax(
        query.view(batch, inputs.kv_heads, groups, nodes, -1), softcap=inputs.softcap
    )
    lengths = inputs.prefix_lengths.long()
    starts = torch.zeros_like(lengths) if inputs.prefix_starts is None else inputs.prefix_starts
    begins = lengths if inputs.tree_starts is None else inputs.tree_starts.long()
    depths = inputs.depths.long().expand(batch, -1)
    positions = lengths[:, None] + depths[:, -nodes:]  # [batch, nodes]
    for first in range(0, inputs.kv_len, _BLOCK):
        slots = torch.arange(first, min(first + _BLOCK, inputs.kv_len), device=query.device)
        is_live = (slots >= starts[:, None]) & (slots < lengths[:, None])  # [batch, slots]
        sees = is_live[:, None].expand(-1, nodes, -1)
        if inputs.window is not None:
            sees = sees & (positions[:, :, None] - slots < inputs.window)
        softmax.add(*_gather(inputs, slots.expand(batch, -1), is_live, accumulate), sees)
    sees = unpack_words(inputs.ancestor_words, num_bits=inputs.num_slots).expand(batch, -1, -1)
    if inputs.window is not None:
        sees = sees & (depths[:, -nodes:, None] - depths[:, None] < inputs.window)
    slots = begins[:, None] + torch.arange(inputs.num_slots, device=query.device)
    is_live = torch.ones_like(slots, dtype=torch.bool)
    softmax.add(*_gather(inputs, slots, is_live, accumulate), sees)
    output, lse = softmax.finish(inputs.sinks)
    output = output.flatten(1, 2).transpose(1, 2).to(inputs.query.dtype)
    return output.contiguous(), lse.flatten(1, 2)


def keep_path_reference(
    storage: Tensor,
    paths: Int[Tensor, "batch path"],
    *,
    prefix_lengths: Int[Tensor, " batch"],
    tree_starts: Int[Tensor, " batch"] | None,
) -> None:
    """Move the slots on each row's path to the end of its prefix, in every layer; syncs."""
    begins = prefix_lengths if tree_starts is None else tree_starts
    rows, offsets = (paths >= 0).nonzero(as_tuple=True)
    sources = begins[rows] + paths[rows, offsets]
    targets = prefix_lengths[rows] + offsets
    storage[:, rows, :, targets] = storage[:, rows, :, sources]


def tree_words_reference(
    parents: Int[Tensor, "rows nodes"],
) -> tuple[Int[Tensor, "rows nodes words"], Int[Tensor, "rows nodes"]]:
    """Return the ancestor words and the depths of trees given as parents."""
    rows, nodes = parents.shape
    own = torch.arange(nodes, device=parents.device).expand(rows, -1)
    sees = torch.eye(nodes, dtype=torch.bool, device=parents.device).expand(rows, -1, -1)
    above = parents.long()
    above = above.where((above >= 0) & (above < nodes), own)  # parents may be unchecked
    # `above` is an ancestor; the same ancestor of that one is twice as many levels up.
    depths = (above != own).long()  # levels up to `above`
    for _ in range((nodes - 1).bit_length()):
        sees = sees | sees.gather(1, above[:, :, None].expand(-1, -1, nodes))
        depths = depths + depths.gather(1, above)
        above = above.gather(1, above)
    return pack_words(sees), depths.to(torch.int32)


class _OnlineSoftmax:
    """A running softmax over blocks of keys, and the mean of the values under it."""

    def __init__(
        self, query: Float[Tensor, "batch kv_heads groups nodes head_dim"], *, softcap: float | None
    ) -> None:
        """Start without keys; the query is already scaled."""
        self._query, self._softcap = query, softcap
        self._maximum = query.new_full(query.shape[:-1], -torch.inf)
        self._sum = query.new_zeros(query.shape[:-1])
        self._mean = torch.zeros_like(query)

    def add(
        self,
        key: Float[Tensor, "batch kv_heads slots head_dim"],
        value: Float[Tensor, "batch kv_heads slots head_dim"],
        sees: Bool[Tensor, "batch nodes slots"],
    ) -> None:
        """Add keys and values."""
        scores = self._query @ key[:, :, None].transpose(-1, -2)
        if self._softcap is not None:
            scores = self._softcap * torch.tanh(scores / self._softcap)
        scores = scores.masked_fill(~sees[:, None, None], -torch.inf)
        maximum = torch.maximum(self._maximum, scores.amax(-1))
        finite = maximum.masked_fill(maximum == -torch.inf, 0.0)  # has seen nothing yet
        shares = (scores - finite[..., None]).exp()
        kept = (self._maximum - finite).exp()
        self._sum = self._sum * kept + shares.sum(-1)
        self._mean = self._mean * kept[..., None] + shares @ value[:, :, None]
        self._maximum = maximum

    def finish(self, sinks: Float[Tensor, " q_heads"] | None) -> tuple[Tensor, Tensor]:
        """Return the mean of the values and the logarithm of the denominator."""
        maximum, total = self._maximum, self._sum
        if sinks is not None:
            heads = sinks.to(total.dtype).view(total.shape[1], total.shape[2], 1)
            maximum = torch.maximum(maximum, heads)
            kept = (self._maximum - maximum).exp()
            total = total * kept + (heads - maximum).exp()
            return self._mean * (kept / total)[..., None], maximum + total.log()
        return self._mean / total[..., None], maximum + total.log()


def _gather(
    inputs: TreeAttentionInputs,
    slots: Int[Tensor, "batch slots"],
    is_live: Bool[Tensor, "batch slots"],
    accumulate: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return keys and values of the given slots, zeros for those that are not live."""
    rows = torch.arange(inputs.batch, device=slots.device)[:, None]
    slots = slots.where(is_live, torch.zeros_like(slots))
    found = []
    for stored in (inputs.key, inputs.value):
        taken = stored[rows, :, slots].to(accumulate)  # [batch, slots, kv_heads, head_dim]
        found.append(taken.masked_fill(~is_live[:, :, None, None], 0.0).transpose(1, 2))
    return found[0], found[1]


def _node_by_node(inputs: TreeAttentionInputs) -> tuple[Tensor, Tensor]:
    """Compute each node separately, over the slots that it sees, concatenated."""
    output = inputs.query.new_empty(inputs.query.shape).transpose(1, 2).contiguous()
    lse = output.new_empty(output.shape[0], output.shape[2], output.shape[1], dtype=torch.float32)
    if inputs.query.dtype == torch.float64:
        lse = lse.double()
    trees = unpack_words(inputs.ancestor_words, num_bits=inputs.num_slots)
    trees = trees.expand(inputs.batch, -1, -1)
    for row, (start, length, begin) in enumerate(inputs.host_bounds()):
        depths = inputs.depths[row % len(inputs.depths)]
        for node in range(inputs.num_nodes):
            depth = int(depths[inputs.num_slots - inputs.num_nodes + node])
            first = start
            above = trees[row, node].nonzero()[:, 0]
            if inputs.window is not None:
                first = max(start, min(length, length + depth - inputs.window + 1))
                above = above[depth - depths[above] < inputs.window]
            slots = torch.cat([torch.arange(first, length, device=above.device), begin + above])
            everything = torch.ones(1, 1, len(slots), dtype=torch.bool, device=above.device)
            query = inputs.query[row, :, node].to(lse.dtype) * inputs.scale
            softmax = _OnlineSoftmax(
                query.view(1, inputs.kv_heads, inputs.groups, 1, -1), softcap=inputs.softcap
            )
            key, value = (
                stored[row, :, slots].to(lse.dtype)[None] for stored in (inputs.key, inputs.value)
            )
            softmax.add(key, value, everything)
            found, sums = softmax.finish(inputs.sinks)
            output[row, node] = found.flatten(0, 2)[:, 0].to(output.dtype)
            lse[row, :, node] = sums.flatten()
    return output, lse
