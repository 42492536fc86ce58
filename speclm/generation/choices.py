"""The target's choice at the nodes of a tree."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from speclm.sampling.chooser import TokenChooser
from speclm.sampling.noise import PositionNoise
from speclm.tree.topology import TreeTopology


def choose_at_all_nodes(
    logits: Float[Tensor, "batch nodes vocab"],
    topology: TreeTopology,
    chooser: TokenChooser,
    noise: PositionNoise | None,
) -> Int[Tensor, "batch nodes"]:
    """Choose after every node in one pass: the way of greedy decoding and of accelerators."""
    batch, nodes, vocab = logits.shape
    rows = logits.reshape(batch * nodes, vocab)
    if noise is None:
        return chooser.choose(rows, None).view(batch, nodes)
    levels = torch.stack([noise.at_depth(d) for d in range(topology.max_depth + 1)], dim=1)
    depths = topology.depths.expand(batch, nodes)  # [batch, nodes]
    node_noise = levels[torch.arange(batch, device=logits.device)[:, None], depths]
    return chooser.choose(rows, node_noise.view(batch * nodes, vocab)).view(batch, nodes)


def choose_along_walk(
    logits: Float[Tensor, "batch nodes vocab"],
    draft_tokens: Int[Tensor, "batch nodes"],
    topology: TreeTopology,
    chooser: TokenChooser,
    noise: PositionNoise,
) -> Int[Tensor, "batch nodes"]:
    """Choose level by level, only after nodes that the walk from the root can still reach.

    Sorting and normalising a row of the vocabulary costs more than a step of this loop on a CPU.
    Syncs once a level, which costs nothing there.

    Returns:
        The target's token after each visited node, -1 elsewhere.
    """
    batch, nodes, _ = logits.shape
    parents, tokens = topology.parents.tolist(), draft_tokens.tolist()
    padding = topology.is_padding.tolist()
    choices = torch.full((batch, nodes), -1, device=logits.device)
    walking = [(row, 0) for row in range(batch)]
    for depth in range(topology.max_depth + 1):
        rows, visited = zip(*walking, strict=True)
        level_noise = torch.stack([noise.row(row, depth) for row in rows])
        chosen = chooser.choose(logits[list(rows), list(visited)], level_noise)
        choices[list(rows), list(visited)] = chosen
        following: list[tuple[int, int]] = []
        for (row, node), token in zip(walking, chosen.tolist(), strict=True):
            shape = row if len(parents) > 1 else 0
            following += [
                (row, child)
                for child in range(node + 1, nodes)
                if parents[shape][child] == node
                and tokens[row][child] == token
                and not padding[shape][child]
            ][:1]
        if not following:
            break
        walking = following
    return choices
