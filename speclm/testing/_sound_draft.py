"""What a draft has to be: its types, shapes, tokens, topology and probabilities."""

import torch
from jaxtyping import Int
from torch import Tensor

from speclm.config import MAX_DEPTH, MAX_NODES
from speclm.drafting.interface import Draft
from speclm.errors import ProposerContractError, TopologyError, TreeBudgetError
from speclm.tree.topology import TreeTopology, from_parents

_SUM_TOLERANCE = 1e-3  # a softmax in bfloat16 sums to 1 within about this


def require_sound_draft(
    draft: Draft, *, roots: Int[Tensor, " batch"], vocab_size: int, name: str
) -> None:
    """Check type, shape, tokens, topology and probabilities of a draft."""
    _require_tensors(draft, roots, name)
    _require_tokens(draft, roots, vocab_size, name)
    _require_topology(draft.topology, name)
    if draft.node_probs is not None:
        _require_probs(draft.node_probs, draft.topology, name)


def _require_tensors(draft: Draft, roots: Tensor, name: str) -> None:
    topology = draft.topology
    tensors = {"tokens": draft.tokens}
    for field in ("parents", "depths", "ancestor_words", "path_ends"):
        tensors[f"topology.{field}"] = getattr(topology, field)
    for field, tensor in tensors.items():
        if tensor.dtype != torch.long:
            raise ProposerContractError(
                f"{name}: dtype of {field} is {tensor.dtype}, expected torch.int64; build it from "
                "whole numbers, or convert it"
            )
        if tensor.device != roots.device:
            raise ProposerContractError(
                f"{name}: device of {field} is {tensor.device}, expected that of roots, "
                f"{roots.device}; create it with device=roots.device"
            )
    expected = (len(roots), topology.num_nodes)
    shapes = {"tokens": {tuple(draft.tokens.shape)}}
    if draft.node_probs is not None:
        if not isinstance(draft.node_probs, list):
            raise ProposerContractError(
                f"{name}: node_probs is a {type(draft.node_probs).__name__}, expected lists on the "
                "host, one for each row; call tolist(), or leave it out"
            )
        shapes["node_probs"] = {(len(draft.node_probs), len(row)) for row in draft.node_probs}
    for field, found in shapes.items():
        if found != {expected}:
            raise ProposerContractError(
                f"{name}: shape of {field} is {max(found, default=())}, expected {expected}, a row "
                "for each root and a column for each node of the topology; pad rows to equal length"
            )
    if topology.parents.shape[0] not in {1, len(roots)}:
        raise ProposerContractError(
            f"{name}: topology has {topology.parents.shape[0]} rows, expected {len(roots)}, or 1 "
            "where all share a tree; give every row its parents"
        )


def _require_tokens(draft: Draft, roots: Tensor, vocab_size: int, name: str) -> None:
    first = draft.tokens[:, 0]
    if not torch.equal(first, roots):
        raise ProposerContractError(
            f"{name}: column 0 of tokens is {first.tolist()}, expected the roots "
            f"{roots.tolist()}; start from the roots given, and follow them in commit"
        )
    lowest, highest = int(draft.tokens.min()), int(draft.tokens.max())
    if lowest < 0 or highest >= vocab_size:
        raise ProposerContractError(
            f"{name}: tokens lie in {lowest} to {highest}, expected 0 to {vocab_size - 1}; fill "
            "padding nodes with a valid token, and map draft ids to the target's"
        )


def _require_topology(topology: TreeTopology, name: str) -> None:
    try:
        rebuilt = from_parents(topology.parents.tolist(), device=topology.parents.device)
    except TopologyError as error:
        raise ProposerContractError(
            f"{name}: parents do not describe a tree: {error}; build topologies with from_parents"
        ) from error
    except TreeBudgetError as error:
        raise ProposerContractError(
            f"{name}: {error}, expected at most {MAX_NODES} nodes on {MAX_DEPTH} levels"
        ) from error
    compared = ["depths", "ancestor_words"]
    if topology.is_on_host:  # else the depth is a bound
        compared += ["path_ends", "deepest_first", "max_depth", "host_parents", "host_node_depths"]
    for field in compared:
        found, expected = getattr(topology, field), getattr(rebuilt, field)
        is_same = torch.equal(found, expected) if isinstance(found, Tensor) else found == expected
        if not is_same:
            raise ProposerContractError(
                f"{name}: topology.{field} is {_brief(found)}, expected {_brief(expected)} for "
                "these parents; build topologies with from_parents"
            )


def _require_probs(node_probs: list[list[float]], topology: TreeTopology, name: str) -> None:
    probs = torch.tensor(node_probs, dtype=torch.float64, device=topology.parents.device)
    drafted = probs.where(~topology.is_padding.expand(len(probs), -1), 0.0)
    drafted[:, 0] = 0.0
    if not bool(((drafted >= 0) & (drafted <= 1 + _SUM_TOLERANCE)).all()):  # false for NaN too
        raise ProposerContractError(
            f"{name}: node_probs lie in {float(drafted.min())!r} to {float(drafted.max())!r}, "
            "expected 0 to 1; return probabilities, not logits or logarithms"
        )
    sums = torch.zeros_like(drafted).scatter_add(1, topology.parents.expand_as(drafted), drafted)
    if float(sums.max()) > 1 + _SUM_TOLERANCE:
        raise ProposerContractError(
            f"{name}: node_probs of siblings sum to {float(sums.max()):.4g}, expected at most 1; "
            "give the probability of each token given its path, normalised over the vocabulary"
        )


def _brief(value: object) -> str:
    return str(value.tolist() if isinstance(value, Tensor) else value)[:120]
