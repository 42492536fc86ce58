"""Acceptance of a greedy draft and the moves in the cache, as one stage of fixed shapes."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from speclm.acceptance.exact import deepest_agreeing
from speclm.sampling.chooser import pick
from speclm.tree.topology import TreeTopology


def accept_and_keep(
    logits: Float[Tensor, "batch nodes vocab"],
    tokens: Int[Tensor, "batch nodes"],
    parents: Int[Tensor, "batch nodes"],
    inner_mask: Bool[Tensor, "batch nodes nodes"],
    deepest_first: Int[Tensor, "batch nodes"],
    path_ends: Int[Tensor, "batch nodes path_and_end"],
    lengths: Int[Tensor, " batch"],
    *storage: Tensor,
) -> tuple[Tensor, Tensor]:
    """Follow the accepted path of each row, and move its keys and values to the end of the row.

    Anything may come after that end.

    Args:
        logits: The target's logits after every node.
        tokens: Token at each node.
        parents: `TreeTopology.parents`, and likewise the next three.
        inner_mask: Which nodes are ancestors, the root excepted.
        deepest_first: Numbers that are larger for deeper nodes.
        path_ends: Path to each node, and the node.
        lengths: Length of each row in the cache; the nodes are pending after the longest one.
        *storage: Keys and values, ``[layers, batch, kv_heads, capacity, head_dim]``.

    Returns:
        The accepted path, padded with 0, with its last node at the end; the target's token after
        each of these nodes.
    """
    chosen = pick(logits, None)
    best = deepest_agreeing(
        tokens, chosen, parents=parents, inner_mask=inner_mask, deepest_first=deepest_first
    )
    indices = best[:, None, None].expand(-1, 1, path_ends.shape[2])
    path = path_ends.gather(1, indices)[:, 0]  # [batch, path and end]
    sources = lengths.amax() + path[:, :-1]
    targets = lengths[:, None] + torch.arange(sources.shape[1], device=path.device)
    for part in storage:
        shape = (len(part), -1, part.shape[2], -1, part.shape[4])
        moved = part.gather(3, sources[None, :, None, :, None].expand(shape))
        part.scatter_(3, targets[None, :, None, :, None].expand(shape), moved)
    return path, chosen.gather(1, path)


def padded_parts(topology: TreeTopology, bucket: int, *, batch: int) -> Sequence[Tensor]:
    """Return the parts of a topology that `accept_and_keep` reads, for more nodes and all rows."""
    key = f"accepted {bucket} {batch}"
    known: dict[str, Any] = vars(topology)
    if key not in known:
        missing = bucket - topology.num_nodes
        paths, ends = topology.path_ends[:, :, :-1], topology.path_ends[:, :, -1:]
        paths = F.pad(paths, (0, bucket - paths.shape[2]))
        parts = (
            F.pad(topology.parents, (0, missing)),
            F.pad(topology.inner_mask, (0, missing, 0, missing)),
            F.pad(topology.deepest_first, (0, missing)),
            F.pad(torch.cat([paths, ends], dim=2), (0, 0, 0, missing)),
        )
        known[key] = [part.expand(batch, *part.shape[1:]).contiguous() for part in parts]
    found: Sequence[Tensor] = known[key]
    return found
