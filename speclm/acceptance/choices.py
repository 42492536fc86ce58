"""The target's choice at the nodes of a tree, and the path that it leaves."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from speclm.acceptance.accepted import Accepted
from speclm.sampling.chooser import TokenChooser
from speclm.sampling.noise import PositionNoise
from speclm.tree.topology import TreeTopology


def choose_at_all_nodes(
    logits: Float[Tensor, "batch nodes vocab"],
    topology: TreeTopology,
    chooser: TokenChooser,
    noise: PositionNoise | None,
) -> Int[Tensor, "batch nodes"]:
    """Choose after every node in one pass: the way of accelerators."""
    batch, nodes, vocab = logits.shape
    rows = logits.reshape(batch * nodes, vocab)
    if noise is None:
        return chooser.choose(rows, None).view(batch, nodes)
    levels = torch.stack([noise.at_depth(d) for d in range(topology.max_depth + 1)], dim=1)
    depths = topology.depths.expand(batch, nodes)  # [batch, nodes]
    node_noise = levels[torch.arange(batch, device=logits.device)[:, None], depths]
    return chooser.choose(rows, node_noise.view(batch * nodes, vocab)).view(batch, nodes)


def accept_along_walk(
    logits: Float[Tensor, "batch nodes vocab"],
    draft_tokens: Int[Tensor, "batch nodes"],
    topology: TreeTopology,
    chooser: TokenChooser,
    noise: PositionNoise | None,
) -> Accepted:
    """Choose and accept level by level on the host: the way of CPUs, where a sync is free.

    Gives what `choose_at_all_nodes` and `accept_exact` give. Sampling evaluates only nodes that
    the walk from the root can still reach, because there sorting and normalising a row of the
    vocabulary costs more than a step of this loop; greedy decoding needs no more than one argmax
    of all rows.
    """
    batch, nodes, vocab = logits.shape
    parents, tokens = topology.host_parents, draft_tokens.tolist()
    greedy: list[list[int]] | None = None
    if noise is None:
        greedy = chooser.choose(logits.reshape(-1, vocab), None).view(batch, nodes).tolist()
    paths: list[list[int]] = [[0] for _ in range(batch)]
    emitted: list[list[int]] = [[] for _ in range(batch)]
    walking = list(range(batch))
    for depth in range(topology.max_depth + 1):
        if greedy is not None:
            chosen = [greedy[row][paths[row][-1]] for row in walking]
        else:
            assert noise is not None
            chosen = _choose_level(logits, paths, walking, depth, chooser, noise)
        following: list[int] = []
        for row, token in zip(walking, chosen, strict=True):
            emitted[row].append(token)
            shape = parents[row if len(parents) > 1 else 0]
            node = paths[row][-1]
            for child in range(node + 1, nodes):
                if shape[child] == node and tokens[row][child] == token:
                    paths[row].append(child)
                    following.append(row)
                    break
        if not following:
            break
        walking = following
    return Accepted.from_host(paths, emitted, device=logits.device)


def _choose_level(
    logits: Float[Tensor, "batch nodes vocab"],
    paths: list[list[int]],
    walking: list[int],
    depth: int,
    chooser: TokenChooser,
    noise: PositionNoise,
) -> list[int]:
    """Return the token chosen after the last node of each walking row."""
    rows = torch.stack([logits[row, paths[row][-1]] for row in walking])
    level_noise = torch.stack([noise.row(row, depth) for row in walking])
    chosen: list[int] = chooser.choose(rows, level_noise).tolist()
    return chosen
