"""Drafts as the loop needs them: checked, or made where nothing is guessed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor

from speclm.acceptance.interface import AcceptanceRule
from speclm.config import MAX_DEPTH, MAX_NODES
from speclm.drafting.interface import Draft, Proposer
from speclm.errors import DraftError, OptionError, TreeBudgetError
from speclm.forking import temporary
from speclm.sampling.draws import DraftSampling
from speclm.tree.plan import TreePlan
from speclm.tree.topology import chain, from_parents, path_products


def roots_alone(roots: Int[Tensor, " batch"]) -> Draft:
    """Return the draft that makes a round a step of regular generation."""
    return Draft(tokens=roots[:, None], topology=chain(0, device=roots.device))


def with_padding(
    draft: Draft, roots: Int[Tensor, " batch"], is_live: list[bool], *, pad_token_id: int
) -> Draft:
    """Let ended rows go on with padding as deep as the others may go.

    Args:
        draft: What was drafted; what it holds in ended rows is dropped.
        roots: Last token of each row; a row that has just ended begins with its last own one.
        is_live: Rows that have not ended.
        pad_token_id: The padding token.
    """
    topology, tokens = draft.topology, draft.tokens.clone()
    parents, depth = topology.host_parents, topology.max_depth
    if len(parents) == 1:  # one tree for all: padding along its longest path, nowhere else
        node = topology.host_node_depths[0].index(depth)
        path = [node]
        while node:
            node = parents[0][node]
            path.append(node)
        padding = torch.full_like(tokens[0], int(pad_token_id == 0))  # any token but that
        padding[path] = pad_token_id
    else:
        padding = torch.full_like(tokens[0], pad_token_id)
        line = [0, *range(depth)]
        rows = [own if live else line for own, live in zip(parents, is_live, strict=True)]
        topology = from_parents(rows, device=tokens.device)
    ended = [row for row, live in enumerate(is_live) if not live]
    tokens[ended] = padding
    tokens[:, 0] = roots
    return replace(draft, tokens=tokens, topology=topology)


def deepest_paths(draft: Draft, *, depth: int) -> tuple[Draft, list[list[int]]]:
    """Reduce trees to chains, for a target that takes no trees.

    Each chain follows the child with the tallest tree below it, the first of equals: proposers
    draft deepest below what they think likeliest. Where siblings were drawn it follows the first
    one, because the others do not have the distribution that they were drawn from together.

    Args:
        draft: What was drafted.
        depth: Most guesses to keep in each row.

    Returns:
        The chains, and for each row the nodes that they were.
    """
    follow = _deepest_path if draft.distributions is None else _first_path
    paths = [follow(parents)[: depth + 1] for parents in draft.topology.host_parents]
    chains = _at_nodes(draft, paths, [[0, *range(len(path) - 1)] for path in paths])
    return chains, paths * (len(draft.tokens) if len(paths) == 1 else 1)


def cut_to_plan(draft: Draft, plan: TreePlan | None) -> tuple[Draft, list[list[int]] | None]:
    """Leave out what exceeds a plan.

    The likeliest nodes are kept where the draft says how likely they are, else the first ones. So
    they are where siblings were drawn, whose probabilities may not decide which are left out.

    Args:
        draft: What was drafted.
        plan: Most levels and nodes; None for as many as there are.

    Returns:
        The draft, and for each row the nodes that it was made of; None if nothing was left out.
    """
    topology = draft.topology
    if plan is None or (
        topology.num_nodes - 1 <= plan.num_draft_tokens and topology.max_depth <= plan.depth
    ):
        return draft, None
    all_parents, all_depths = topology.host_parents, topology.host_node_depths
    probs = draft.node_probs if draft.distributions is None else None
    num_rows = len(all_parents) if probs is None else len(draft.tokens)
    kept, rows = [], []
    for row in range(num_rows):
        shape = row if len(all_parents) > 1 else 0
        parents, depths = all_parents[shape], all_depths[shape]
        nodes = [node for node, depth in enumerate(depths) if 0 < depth <= plan.depth]
        if probs is not None:
            probabilities = path_products(parents, probs[row])
            nodes.sort(key=lambda node: -probabilities[node])
        nodes = [0, *sorted(nodes[: plan.num_draft_tokens])]
        places = {node: place for place, node in enumerate(nodes)}
        kept.append(nodes)
        rows.append([places[parents[node]] for node in nodes])
    return _at_nodes(draft, kept, rows), kept * (len(draft.tokens) if num_rows == 1 else 1)


def _at_nodes(draft: Draft, nodes: list[list[int]], parents: list[list[int]]) -> Draft:
    """Return a draft of some nodes of another.

    Args:
        draft: The other.
        nodes: Nodes to keep in each row; one list where all rows keep the same.
        parents: Their parents, counted in the new draft.
    """
    length, device = max(map(len, nodes)), draft.tokens.device
    node_probs = draft.node_probs
    if node_probs is not None:
        kept = nodes * (len(node_probs) if len(nodes) == 1 else 1)
        node_probs = [
            [row[node] for node in own] + [0.0] * (length - len(own))
            for row, own in zip(node_probs, kept, strict=True)
        ]
    # A node that is its own parent is padding: what stands there is fed and never followed.
    rows = [[*row, *range(len(row), length)] for row in parents]
    indices = torch.tensor(
        [row + [0] * (length - len(row)) for row in nodes], device=device, dtype=torch.long
    )
    indices = indices.expand(len(draft.tokens), -1)
    distributions = draft.distributions
    if distributions is not None:
        distributions = distributions.gather(
            1, indices[:, :, None].expand(-1, -1, distributions.shape[2])
        )
    return Draft(
        tokens=draft.tokens.gather(1, indices),
        topology=from_parents(rows, device=device),
        node_probs=node_probs,
        distributions=distributions,
    )


def _deepest_path(parents: list[int]) -> list[int]:
    heights = [0] * len(parents)
    tallest: list[int | None] = [None] * len(parents)
    for node in range(len(parents) - 1, 0, -1):  # children come behind their parents
        parent = parents[node]
        if parent != node and heights[node] + 1 >= heights[parent]:
            heights[parent], tallest[parent] = heights[node] + 1, node
    path, child = [0], tallest[0]
    while child is not None:
        path.append(child)
        child = tallest[child]
    return path


def _first_path(parents: list[int]) -> list[int]:
    path = [0]
    for node in range(1, len(parents)):  # children come behind their parents
        if parents[node] == path[-1]:
            path.append(node)
    return path


def hand_plan(proposer: Proposer, plan: TreePlan | None) -> None:
    """Tell a proposer and its parts what the next drafts should be."""
    proposer.plan = plan
    for part in proposer.parts:
        hand_plan(part, plan)


@contextmanager
def planned(proposer: Proposer | None, plan: TreePlan | None) -> Iterator[None]:
    """Have a proposer draft by a plan, and by its own settings again afterwards."""
    if proposer is None:
        yield
        return
    with temporary(partial(hand_plan, proposer, None)):
        hand_plan(proposer, plan)
        yield


def require_drafts_for(rule: AcceptanceRule, proposer: Proposer | None) -> None:
    """Refuse a rule for drawn drafts next to a proposer that does not draw."""
    wanted = rule.draft_sampling
    if proposer is None or wanted in {DraftSampling.NONE, proposer.draft_sampling}:
        return
    raise OptionError(
        f"acceptance {rule.name!r} expected drafts drawn {wanted.value}, with their "
        f"distributions, found {type(proposer).__name__}, which does not draw; use a draft "
        "model or Medusa heads, or "
        "acceptance='exact', which is lossless with any proposer"
    )


def require_distributions(draft: Draft, vocab_size: int) -> None:
    """Check that a draft comes with the distributions that it was drawn from."""
    found = None if draft.distributions is None else tuple(draft.distributions.shape)
    expected = (*draft.tokens.shape, vocab_size)
    if draft.topology.max_depth > 0 and found != expected:
        raise DraftError(
            f"draft has distributions of shape {found}, the acceptance rule expected {expected}: "
            "a proposer that declares draft_sampling returns the distribution after every node; "
            "see Prefill.sampler"
        )


def require_valid(draft: object, roots: Int[Tensor, " batch"]) -> None:
    """Check what a wrong proposer would otherwise break far from its cause."""
    if not isinstance(draft, Draft):
        raise DraftError(
            f"propose returned a {type(draft).__name__}, expected a Draft; "
            "see speclm.testing.check_proposer"
        )
    batch, nodes = draft.tokens.shape
    topology = draft.topology
    if nodes > MAX_NODES or topology.max_depth > MAX_DEPTH:
        raise TreeBudgetError(
            f"draft has {nodes} nodes on {topology.max_depth} levels, a round holds at most "
            f"{MAX_NODES} nodes on {MAX_DEPTH} levels; draft fewer tokens"
        )
    if (
        batch != len(roots)
        or nodes != topology.num_nodes
        or len(topology.parents) not in {1, batch}
    ):
        raise DraftError(
            f"draft has tokens of shape {tuple(draft.tokens.shape)} and parents of shape "
            f"{tuple(topology.parents.shape)}, expected {len(roots)} rows and one parent a node; "
            "see speclm.testing.check_proposer"
        )
    if draft.tokens.dtype != torch.long or draft.tokens.device != roots.device:
        raise DraftError(
            f"draft tokens are {draft.tokens.dtype} on {draft.tokens.device}, expected "
            f"torch.int64 on {roots.device}; see speclm.testing.check_proposer"
        )
