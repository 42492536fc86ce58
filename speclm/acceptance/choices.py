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
    *,
    lengths: list[int] | None = None,
) -> Int[Tensor, "batch nodes"]:
    """Choose after every node in one pass: the way of accelerators.

    Args:
        logits: The target's logits after every node.
        topology: Shape of the trees.
        chooser: Turns logits into choices.
        noise: Noise of the positions; None when greedy.
        lengths: Tokens of each row up to and with its root, where the chooser reads lengths.
    """
    batch, nodes, vocab = logits.shape
    rows = logits.reshape(batch * nodes, vocab)
    node_lengths = _node_lengths(topology, lengths) if chooser.reads_lengths else None
    if noise is None:
        return chooser.choose(rows, None, lengths=node_lengths).view(batch, nodes)
    levels = torch.stack([noise.at_depth(d) for d in range(topology.max_depth + 1)], dim=1)
    depths = topology.depths.expand(batch, nodes)  # [batch, nodes]
    node_noise = levels[torch.arange(batch, device=logits.device)[:, None], depths]
    chosen = chooser.choose(rows, node_noise.view(batch * nodes, vocab), lengths=node_lengths)
    return chosen.view(batch, nodes)


def accept_along_path(
    logits: Float[Tensor, "batch nodes vocab"],
    draft_tokens: Int[Tensor, "batch nodes"],
    topology: TreeTopology,
    chooser: TokenChooser,
    noise: PositionNoise | None,
    *,
    lengths: list[int] | None = None,
) -> Accepted:
    """Choose and accept level by level on the host: the way of CPUs, where a sync is free.

    Gives what `choose_at_all_nodes` and `accept_exact` give. Sampling evaluates only nodes that
    the walk from the root can still reach, because there sorting and normalising a row of the
    vocabulary costs more than a step of this loop; greedy decoding needs no more than one argmax
    of all rows.
    """
    batch, nodes, _ = logits.shape
    parents, tokens = topology.host_parents, draft_tokens.tolist()
    greedy: list[list[int]] | None = None
    if noise is None:
        greedy = choose_at_all_nodes(logits, topology, chooser, None, lengths=lengths).tolist()
    paths: list[list[int]] = [[0] for _ in range(batch)]
    emitted: list[list[int]] = [[] for _ in range(batch)]
    walking = list(range(batch))
    for depth in range(topology.max_depth + 1):
        if greedy is not None:
            chosen = [greedy[row][paths[row][-1]] for row in walking]
        else:
            assert noise is not None
            rows = torch.stack([logits[row, paths[row][-1]] for row in walking])
            level_noise = torch.stack([noise.row(row, depth) for row in walking])
            at = None if lengths is None else [lengths[row] + depth for row in walking]
            chosen = chooser.choose(rows, level_noise, lengths=at).tolist()
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


def _node_lengths(topology: TreeTopology, lengths: list[int] | None) -> list[int]:
    """Return the tokens before each node's choice, rows one after the other."""
    assert lengths is not None, "a processor reads the length of the text"
    depths = topology.host_node_depths
    return [
        length + depth
        for row, length in enumerate(lengths)
        for depth in depths[row if len(depths) > 1 else 0]
    ]
