"""The default rule: emit the tokens of regular generation, whatever was drafted."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from typing_extensions import override

from speclm.acceptance.interface import (
    AcceptanceRule,
    Accepted,
    Verified,
    register_acceptance_rule,
)
from speclm.devices import is_host
from speclm.sampling.chooser import pick
from speclm.tree.topology import TreeTopology


@register_acceptance_rule("exact")
@dataclass(frozen=True, slots=True)
class ExactRule(AcceptanceRule):
    """Emit the tokens of regular generation under the same seed, greedy and sampling."""

    is_exact = True
    uses_noise = True

    @property
    @override
    def name(self) -> str:
        return "exact"

    @override
    def accept(self, verified: Verified) -> Accepted:
        return accept_along_paths(verified)


def accept_exact(
    draft_tokens: Int[Tensor, "batch nodes"],
    target_tokens: Int[Tensor, "batch nodes"],
    topology: TreeTopology,
) -> Accepted:
    """Accept draft tokens along the path that regular generation would have taken.

    Greedy decoding and sampling share this rule; they differ in how the target chooses. The result
    is lossless for any draft, because a draft token is only accepted if the target chose it.

    Args:
        draft_tokens: Token at each node; column 0 is the root.
        target_tokens: Token that the target chooses after each node. Nodes that no accepted path
            can reach may hold -1.
        topology: Shape of the trees.

    Returns:
        The path and the tokens emitted along it, padded with -1. Does not sync with the device.

    Source: Daliri, Musco, Suresh 2024 (drafter-invariant speculative decoding by shared noise).
    """
    best = _deepest_in(topology, draft_tokens, target_tokens)
    path = topology.paths_to(best)  # [batch, path]
    tokens = target_tokens.gather(1, path.clamp(min=0)).masked_fill(path < 0, -1)
    return Accepted(path=path, tokens=tokens)


def deepest_agreeing(
    draft_tokens: Int[Tensor, "batch nodes"],
    target_tokens: Int[Tensor, "batch nodes"],
    *,
    parents: Int[Tensor, "rows nodes"],
    inner_mask: Bool[Tensor, "rows nodes nodes"],
    deepest_first: Int[Tensor, "rows nodes"],
) -> Int[Tensor, " batch"]:
    """Return the deepest node of each row that agrees with the target, with all nodes above it.

    The first one, if several are equally deep. The other arguments are those of a `TreeTopology`.
    """
    if len(parents) < len(draft_tokens):
        parents = parents.expand(len(draft_tokens), -1)
    differs = draft_tokens != target_tokens.gather(1, parents)  # [batch, nodes]
    is_rejected = (inner_mask & differs[:, None]).any(2)
    return deepest_first.masked_fill(is_rejected, 0).argmax(1)


def _deepest_in(
    topology: TreeTopology,
    draft_tokens: Int[Tensor, "batch nodes"],
    target_tokens: Int[Tensor, "batch nodes"],
) -> Int[Tensor, " batch"]:
    return deepest_agreeing(
        draft_tokens,
        target_tokens,
        parents=topology.parents,
        inner_mask=topology.inner_mask,
        deepest_first=topology.deepest_first,
    )


def nodes_of_accepted_paths(
    is_accepted: Bool[Tensor, "batch nodes"], topology: TreeTopology
) -> Bool[Tensor, "batch nodes"]:
    """Return which nodes are accepted together with all nodes above them; the root always is."""
    with_root = torch.cat([torch.ones_like(is_accepted[:, :1]), is_accepted[:, 1:]], dim=1)
    return (with_root[:, None, :] | ~topology.ancestor_mask).all(2) & ~topology.is_padding


def choose_at_all_nodes(verified: Verified) -> Int[Tensor, "batch nodes"]:
    """Return the token that the target chooses after every node; does not sync."""
    logits, topology, noise = verified.logits, verified.topology, verified.noise
    if noise is None and verified.chooser.takes_maxima:
        return pick(logits, None)
    batch, nodes, vocab = logits.shape
    rows = logits.reshape(batch * nodes, vocab)
    node_noise, lengths = None, None
    if noise is not None:
        levels = torch.stack([noise.at_depth(d) for d in range(topology.max_depth + 1)], dim=1)
        depths = topology.depths.expand(batch, nodes)
        row_indices = torch.arange(batch, device=logits.device)[:, None]
        node_noise = levels[row_indices, depths].flatten(0, 1)  # [batch * nodes, vocab]
    if verified.chooser.reads_lengths:
        assert verified.lengths is not None, "a processor reads the length of the text"
        all_depths = topology.host_node_depths
        lengths = [
            length + depth
            for row, length in enumerate(verified.lengths)
            for depth in all_depths[row if len(all_depths) > 1 else 0]
        ]
    return verified.chooser.choose(rows, node_noise, lengths=lengths).view(batch, nodes)


def accept_along_paths(verified: Verified) -> Accepted:
    """Follow the accepted path of each row; the result is that of `accept_exact`.

    Where reading costs nothing, sampled tokens are chosen level by level, at the nodes of the
    accepted path: sorting and normalising a row of the vocabulary costs more than a step of this
    loop. Elsewhere all is decided on the device, and the host reads the result once.
    """
    topology, noise, logits = verified.topology, verified.noise, verified.logits
    if not is_host(logits.device):
        return _accept_on_device(verified)
    batch, lengths = len(logits), verified.lengths
    known: list[list[int]] | None = None
    if noise is None:
        known = choose_at_all_nodes(verified).tolist()
    tokens: list[list[int]] = verified.draft_tokens.tolist()
    paths: list[list[int]] = [[0] for _ in range(batch)]
    emitted: list[list[int]] = [[] for _ in range(batch)]
    going = list(range(batch))  # rows whose path may continue
    for depth in range(topology.max_depth + 1):
        if known is not None:
            chosen = [known[row][paths[row][-1]] for row in going]
        else:
            assert noise is not None
            chosen = verified.chooser.choose(
                torch.stack([logits[row, paths[row][-1]] for row in going]),
                torch.stack([noise.row(row, depth) for row in going]),
                lengths=None if lengths is None else [lengths[row] + depth for row in going],
            ).tolist()
        following: list[int] = []
        for row, token in zip(going, chosen, strict=True):
            emitted[row].append(token)
            child = _child(topology, row, paths[row][-1], token, tokens[row])
            if child is not None:
                paths[row].append(child)
                following.append(row)
        if not following:
            break
        going = following
    return Accepted.from_host(paths, emitted, device=logits.device)


def _accept_on_device(verified: Verified) -> Accepted:
    """Return what `accept_exact` does, known to the host as well; syncs once."""
    topology, chosen = verified.topology, choose_at_all_nodes(verified)
    path = topology.path_ends_of(_deepest_in(topology, verified.draft_tokens, chosen))
    return read_accepted(path, chosen.gather(1, path), topology)


def read_accepted(
    path: Int[Tensor, "batch path_and_end"],
    tokens: Int[Tensor, "batch path_and_end"],
    topology: TreeTopology,
) -> Accepted:
    """Read what the device has decided, in one transfer.

    The host also learns the parents of trees that it does not know.

    Args:
        path: Accepted path of each row, padded with 0, with its last node at the end.
        tokens: Token that the target chose after each of these nodes.
        topology: Shape of the trees.
    """
    unread, width = topology.unread, path.shape[1]
    rows: list[list[int]] = torch.cat([path, tokens, *unread], dim=1).tolist()
    if unread:
        topology.tell_host([row[2 * width :] for row in rows])
    lengths = [_path_length(row[:width]) for row in rows]
    return Accepted.from_both(
        path,
        tokens,
        roots=tokens[:, -1],
        paths=[row[:length] for row, length in zip(rows, lengths, strict=True)],
        emitted=[row[width : width + length] for row, length in zip(rows, lengths, strict=True)],
    )


def _path_length(path_and_end: list[int]) -> int:
    """Return the number of nodes on a path that is padded with 0, with its last node at the end."""
    return path_and_end.index(path_and_end[-1]) + 1


def _child(
    topology: TreeTopology, row: int, node: int, token: int, tokens: list[int]
) -> int | None:
    """Return the first child of a node that has a token; None if there is none."""
    parents = topology.host_parents[row if len(topology.host_parents) > 1 else 0]
    for child in range(node + 1, len(parents)):
        if parents[child] == node and tokens[child] == token:
            return child
    return None
