"""Make drafts that a round can verify: ask the proposer, check its draft and cut it to size."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor

from speclm.acceptance import Accepted
from speclm.config import MAX_DEPTH, MAX_NODES
from speclm.devices import upload
from speclm.drafting.interface import Draft, Prefill, Proposer
from speclm.errors import DraftError, TreeBudgetError
from speclm.forking import temporary
from speclm.generation.lockstep import Lockstep
from speclm.generation.request import Request, Setup
from speclm.generation.sequences import Sequences
from speclm.sampling.draws import DraftSampling
from speclm.sampling.noise import PositionNoise, undisturbed
from speclm.target import TargetFeatures
from speclm.tree.plan import TreePlan
from speclm.tree.topology import chain, from_parents, path_products


class Drafter:
    """Asks the proposer of one call for drafts, and makes them fit for a round.

    Attributes:
        plan: Plan of the next draft; None follows the proposer's own settings.
        features: Hidden states of the target that the proposer is given.
        remembers: Whether the proposer learns from one call for the next.
        num_observed: Likeliest tokens after each node that the proposer is given.
    """

    def __init__(
        self,
        request: Request,
        setup: Setup,
        sequences: Sequences,
        lockstep: Lockstep | None,
        *,
        needs_chains: bool,
    ) -> None:
        """Prepare for a call."""
        self.plan = setup.plan
        self.features = TargetFeatures.NONE if setup.proposer is None else setup.proposer.features
        self.remembers = setup.proposer is not None and setup.proposer.remembers
        self.num_observed = 0 if setup.proposer is None else setup.proposer.num_observed
        self._request = request
        self._proposer = setup.proposer
        self._target = setup.target
        self._isolates = setup.isolates
        self._sequences = sequences
        self._lockstep = lockstep
        self._needs_chains = needs_chains
        self._own_nodes: list[list[int]] | None = None  # the proposer's nodes in a reduced draft

    def change_plan(self, plan: TreePlan | None) -> None:
        """Give the proposer another plan for the drafts to come."""
        assert self._proposer is not None
        if plan != self.plan:
            self.plan = plan
            hand_plan(self._proposer, plan)

    def begin(self, prompt: Prefill, noise: PositionNoise | None) -> None:
        """Start the proposer's generation."""
        if self._proposer is not None:
            with self._isolated(noise):
                self._proposer.begin(prompt)

    def propose(
        self, roots: Int[Tensor, " batch"], noise: PositionNoise | None, *, drafts: bool = True
    ) -> Draft:
        """Return a draft for every row, or only the roots if the round has no draft.

        Args:
            roots: Last token of each row.
            noise: Noise of the positions; None when it decides nothing.
            drafts: Whether the round should have a draft; False makes it a step of regular
                generation.
        """
        room = self._sequences.most_remaining - 1  # the bonus token needs no draft
        if self._proposer is None or room < 1 or not drafts:
            return root_only(self.fed_roots(roots))
        with self._isolated(noise):
            draft = self._proposer.propose(roots, noise=noise)
        require_valid(draft, roots)
        if self._request.rule.draft_sampling is not DraftSampling.NONE:
            require_distributions(draft, self._target.vocab_size)
        draft, self._own_nodes = cut_to_plan(draft, self.plan)
        if self._is_too_deep(draft.topology.max_depth):
            return root_only(self.fed_roots(roots))
        # Column 0 holds the roots, whatever the proposer returned.
        draft = replace(draft, tokens=torch.cat([roots[:, None], draft.tokens[:, 1:]], dim=1))
        if self._needs_chains:
            draft, nodes = deepest_paths(draft, depth=room)
            own = self._own_nodes
            self._own_nodes = nodes if own is None else _renumber(nodes, own)
        if self._lockstep is None or all(self._sequences.is_live):
            return draft
        return with_padding(
            draft,
            self._lockstep.ids[:, -1],
            self._sequences.is_live,
            pad_token_id=self._lockstep.pad_token_id,
        )

    def fed_roots(self, roots: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """Return the tokens to feed next: the roots, and padding in rows that ended before."""
        return roots if self._lockstep is None else self._lockstep.ids[:, -1]

    def commit(self, accepted: Accepted, noise: PositionNoise | None) -> None:
        """Report the round to the proposer, in terms of the nodes that it proposed."""
        if self._proposer is None:
            return
        if self._own_nodes is not None:
            candidates, nodes = accepted.candidates, self._own_nodes
            accepted = accepted.with_paths(_renumber(accepted.paths, nodes))
            if candidates is not None:
                accepted = accepted.with_candidates(replace(candidates, nodes=nodes))
            self._own_nodes = None
        with self._isolated(noise):
            self._proposer.commit(accepted)

    def _isolated(self, noise: PositionNoise | None) -> AbstractContextManager[None]:
        device = self._request.prompt.input_ids.device
        return undisturbed(device, noise) if self._isolates else nullcontext()

    def _is_too_deep(self, depth: int) -> bool:
        """Return whether a draft of that depth may cross a position where generation changes.

        Generation changes where the rotation of keys changes, and at the last learned position,
        after which regular generation fails. With rotary positions it continues, and so do drafts
        that start after it.
        """
        prompt, total = self._request.prompt, self._request.total_length
        num_positions = self._target.max_positions or total
        switch = self._target.rotary_switch
        if switch is None and total <= num_positions:
            return False
        num_tokens = self._sequences.num_tokens
        if self._lockstep is not None:  # ended rows continue with padding, next to the others
            num_tokens = [max(num_tokens)] * len(num_tokens)
        # Syncs, but only if a row may get there.
        padding = prompt.num_padding.tolist()
        first = prompt.length - 1
        roots = [first + new - pad for new, pad in zip(num_tokens, padding, strict=True)]
        if switch is not None and switch.excludes_drafts(max(roots), depth):
            return True
        return any(root < num_positions <= root + depth for root in roots)


def root_only(roots: Int[Tensor, " batch"]) -> Draft:
    """Return the draft that makes a round a step of regular generation."""
    return Draft(tokens=roots[:, None], topology=chain(0, device=roots.device))


def with_padding(
    draft: Draft, roots: Int[Tensor, " batch"], is_live: list[bool], *, pad_token_id: int
) -> Draft:
    """Fill ended rows with padding, down to the depth that the other rows may reach.

    Args:
        draft: The draft, whose tokens in ended rows are dropped.
        roots: Last token of each row; for a row that has just ended, its own last token.
        is_live: Rows that have not ended.
        pad_token_id: The padding token.
    """
    topology, tokens = draft.topology, draft.tokens.clone()
    parents, depth = topology.host_parents, max(topology.host_depths)
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
    """Reduce trees to chains of at most `depth` draft tokens, if the target cannot verify trees.

    Each chain follows the child with the tallest subtree, or the first of equals: proposers draft
    deepest below the most likely candidates. If siblings were drawn, the chain follows the first
    one, because only that has the distribution that it was drawn from.

    Returns:
        The chains, and for each row the nodes of the tree that they are made of.
    """
    follow = _deepest_path if draft.distributions is None else _first_path
    paths = [follow(parents)[: depth + 1] for parents in draft.topology.host_parents]
    chains = _at_nodes(draft, paths, [[0, *range(len(path) - 1)] for path in paths])
    return chains, paths * (len(draft.tokens) if len(paths) == 1 else 1)


def cut_to_plan(draft: Draft, plan: TreePlan | None) -> tuple[Draft, list[list[int]] | None]:
    """Drop the nodes that exceed a plan; a plan of None drops none.

    The most likely nodes are kept if the draft has probabilities, else the first ones. The first
    ones are also kept if siblings were drawn, because their probabilities must not decide.

    Returns:
        The smaller draft, and for each row the nodes that it is made of; None if it is the same.
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
        indices = {node: index for index, node in enumerate(nodes)}
        kept.append(nodes)
        rows.append([indices[parents[node]] for node in nodes])
    return _at_nodes(draft, kept, rows), kept * (len(draft.tokens) if num_rows == 1 else 1)


def _at_nodes(draft: Draft, nodes: list[list[int]], parents: list[list[int]]) -> Draft:
    """Return a draft of some nodes of another.

    Args:
        draft: The other draft.
        nodes: Nodes to keep in each row; one list where all rows keep the same.
        parents: Their parents, as indices of the new draft.
    """
    length, device = max(map(len, nodes)), draft.tokens.device
    node_probs = draft.node_probs
    if node_probs is not None:
        kept = nodes * (len(node_probs) if len(nodes) == 1 else 1)
        node_probs = [
            [row[node] for node in own] + [0.0] * (length - len(own))
            for row, own in zip(node_probs, kept, strict=True)
        ]
    # A node that is its own parent is padding: it is fed and never accepted.
    rows = [[*row, *range(len(row), length)] for row in parents]
    indices = upload([row + [0] * (length - len(row)) for row in nodes], device)
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
    for node in range(len(parents) - 1, 0, -1):  # children come after their parents
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
    for node in range(1, len(parents)):  # children come after their parents
        if parents[node] == path[-1]:
            path.append(node)
    return path


def hand_plan(proposer: Proposer, plan: TreePlan | None) -> None:
    """Set the plan of a proposer and its parts."""
    proposer.plan = plan
    for part in proposer.parts:
        hand_plan(part, plan)


@contextmanager
def planned(proposer: Proposer | None, plan: TreePlan | None) -> Iterator[None]:
    """Let a proposer follow a plan inside the block, and its own settings afterwards."""
    if proposer is None:
        yield
        return
    with temporary(partial(hand_plan, proposer, None)):
        hand_plan(proposer, plan)
        yield


def require_distributions(draft: Draft, vocab_size: int) -> None:
    """Check that a draft holds the distributions that it was drawn from."""
    found = None if draft.distributions is None else tuple(draft.distributions.shape)
    expected = (*draft.tokens.shape, vocab_size)
    if draft.topology.max_depth > 0 and found != expected:
        raise DraftError(
            f"draft has distributions of shape {found}, the acceptance rule expected {expected}: "
            "a proposer that declares draft_sampling returns the distribution after every node; "
            "see Prefill.sampler"
        )


def require_valid(draft: object, roots: Int[Tensor, " batch"]) -> None:
    """Check the type and shape of a draft, so that a wrong one fails here and not later."""
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


def _renumber(paths: list[list[int]], nodes: list[list[int]]) -> list[list[int]]:
    """Return paths in the node numbers of the draft that each row's nodes were taken from."""
    return [[own[node] for node in path] for path, own in zip(paths, nodes, strict=True)]
