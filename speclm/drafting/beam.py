"""Grows trees on the device, of which the host reads nothing before they are verified."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from speclm.devices import is_host
from speclm.drafting.interface import Draft
from speclm.drafting.levels import GrownTreeConfig, RunByLevelConfig, assemble
from speclm.drafting.search import Candidates, Vocabulary, search_on_host
from speclm.tree.dynamic import GrownRow, GrownRows
from speclm.tree.plan import TreePlan
from speclm.tree.topology import TreeTopology, chain, on_device, trees_of


class ToldRows:
    """The rows of a tree that grew on the device: parents and expansions, read when asked for.

    Acceptance reads them, together with the accepted path.
    """

    def __init__(self, topology: TreeTopology) -> None:
        """Read nothing yet."""
        self._topology = topology

    def __getitem__(self, row: int, /) -> GrownRow:
        topology = self._topology
        shape = row if len(topology.host_parents) > 1 else 0
        depths, labels = topology.host_node_depths[shape], topology.host_labels[shape]
        expansions = [
            (depth - 1, label) if label >= 0 else None
            for depth, label in zip(depths, labels, strict=True)
        ]
        return GrownRow([], topology.host_parents[shape][1:], expansions[1:], [])


def reads_levels(plan: TreePlan | None, device: torch.device) -> bool:
    """Return whether the host searches, reading every level, and stops as soon as it can.

    Elsewhere than on a CPU it does so only for a plan with thresholds of its own, which depends on
    the probabilities.
    """
    return is_host(device) or (plan is not None and plan.min_probability is not None)


def grow(
    candidates: Candidates,
    roots: Int[Tensor, " batch"],
    *,
    config: RunByLevelConfig,
    bounds: Sequence[int],
    reads: bool,
    leaf_tokens: frozenset[int],
    vocabulary: Vocabulary | None = None,
) -> tuple[Draft, GrownRows]:
    """Return a draft of the likeliest paths, by a network that runs once for each level.

    Args:
        candidates: What may follow some nodes.
        roots: Token at the root of each row.
        config: Size of the trees.
        bounds: Maximum levels of each row.
        reads: Whether the host searches; see `reads_levels`.
        leaf_tokens: Tokens after which nothing follows; the host drafts nothing after them.
        vocabulary: Tokens of the columns; None if they are the target's.

    Returns:
        The draft, and what is known of each row.
    """
    if not reads:
        return grow_on_device(
            candidates, roots, config=config, num_levels=max(bounds), vocabulary=vocabulary
        )
    grown = search_on_host(
        candidates,
        roots,
        config=config,
        bounds=bounds,
        leaf_tokens=leaf_tokens,
        vocabulary=vocabulary,
        min_growing=config.min_growing,
    )
    return assemble(grown, roots), grown


def grow_on_device(
    candidates: Candidates,
    roots: Int[Tensor, " batch"],
    *,
    config: GrownTreeConfig,
    num_levels: int,
    vocabulary: Vocabulary | None = None,
) -> tuple[Draft, GrownRows]:
    """Return a draft of the likeliest paths, whose number of levels and nodes is fixed.

    With a width of 1, the best child of each level is expanded, and further children are added to
    the first levels as long as there are nodes left. With other widths the best nodes are chosen.

    Args:
        candidates: What may follow some nodes.
        roots: Token at the root of each row.
        config: Size of the trees. Its thresholds are not used, because a node costs little.
        num_levels: Number of levels.
        vocabulary: Tokens of the columns; None if they are the target's.

    Returns:
        The draft, and what is known of each row.
    """
    device = roots.device
    num_levels = min(num_levels, config.num_draft_tokens)
    if num_levels == 0:
        return Draft(roots[:, None], chain(0, device=device)), [_NO_NODES] * len(roots)
    beam = _Beam(roots, width=config.width)
    for level in range(num_levels):
        values, found = candidates((beam.tokens, beam.parents), level)
        found = found if vocabulary is None else vocabulary.target_ids(found)
        beam.add(values, found, is_last=level + 1 == num_levels)
    if config.width > 1:
        draft = beam.best(config.num_draft_tokens)
        return draft, ToldRows(draft.topology)
    ranks = [tokens.shape[1] for tokens in beam.level_tokens]
    parents, expansions = _spine(*_numbers_of_children(ranks, config.num_draft_tokens))
    topology = trees_of([parents], device=device)
    tokens = beam.first(topology.host_node_depths[0])
    return Draft(tokens, topology), [GrownRow([], parents[1:], expansions, [])] * len(roots)


_NO_NODES = GrownRow([], [], [], [])


class _Beam:
    """Candidates of all levels, and the best of the last one, which are expanded next."""

    def __init__(self, roots: Int[Tensor, " batch"], *, width: int) -> None:
        self.tokens: Int[Tensor, "batch expanded"] = roots[:, None]
        self.parents: Int[Tensor, "batch expanded"] = _zeros(len(roots), roots.device)
        self.level_tokens: list[Int[Tensor, "batch candidates"]] = []
        self._roots, self._width = self.tokens, width
        self._scores: list[Float[Tensor, "batch candidates"]] = []
        self._expanded: list[Int[Tensor, "batch expanded"]] = []  # indices within each level
        self._reached: Float[Tensor, "batch expanded"] | None = None

    def add(
        self,
        values: Float[Tensor, "batch expanded ranks"],
        tokens: Int[Tensor, "batch expanded ranks"],
        *,
        is_last: bool,
    ) -> None:
        """Add the children of the expanded nodes, best first, and choose what is expanded next."""
        num_ranks = values.shape[2]
        if self._width == 1:  # the best child is the first
            self.level_tokens.append(tokens[:, 0])
            self.tokens = self.level_tokens[-1][:, :1]
            return
        if self._reached is not None:
            values = values + self._reached[:, :, None]
        scores, tokens = values.flatten(1), tokens.flatten(1)  # [batch, candidates]
        self.level_tokens.append(tokens)
        self._scores.append(scores)
        if is_last:
            return
        best = scores.topk(min(self._width, scores.shape[1]), dim=1)
        self._reached = best.values
        self._expanded.append(best.indices)
        self.tokens = tokens.gather(1, best.indices)
        self.parents = best.indices // num_ranks

    def first(self, depths: list[int]) -> Int[Tensor, "batch nodes"]:
        """Return root and first candidates of each level, as many as nodes have its depth."""
        levels = enumerate(self.level_tokens, start=1)
        return torch.cat(
            [self._roots, *(tokens[:, : depths.count(depth)] for depth, tokens in levels)], dim=1
        )

    def best(self, num_nodes: int) -> Draft:
        """Return a draft of the best candidates of all levels."""
        roots = self._roots
        # Candidate 0 is the root. No child scores above its parent, and a stable sort puts the
        # parent first if they are equal, so the best candidates form a tree.
        certain = torch.full_like(self._scores[0][:, :1], torch.inf)
        scores = torch.cat([certain, *self._scores], dim=1)
        order = scores.sort(dim=1, descending=True, stable=True).indices
        kept = order[:, : num_nodes + 1].sort(dim=1).values
        tokens = torch.cat([roots, *self.level_tokens], dim=1).gather(1, kept)
        ends = [1]
        for level in self.level_tokens:
            ends.append(ends[-1] + level.shape[1])
        expanded = [indices + end for indices, end in zip(self._expanded, ends, strict=False)]
        above = [roots.new_zeros(roots.shape), *expanded]  # expanded candidates by level
        parents = [
            nodes.repeat_interleave(level.shape[1] // nodes.shape[1], dim=1)
            for nodes, level in zip(above, self.level_tokens, strict=True)
        ]
        parent = torch.cat([above[0], *parents], dim=1).gather(1, kept)
        labels = _labels(kept, above[1:])
        topology = on_device(
            torch.searchsorted(kept, parent), max_depth=len(self.level_tokens), labels=labels
        )
        return Draft(tokens, topology)


def _labels(
    kept: Int[Tensor, "batch nodes"], expanded: list[Int[Tensor, "batch _"]]
) -> Int[Tensor, "batch nodes"]:
    """Return the index of each node among those expanded at its level; -1 if it was not."""
    if not expanded:
        return torch.full_like(kept, -1)
    matches = kept[:, :, None] == torch.cat(expanded, dim=1)[:, None]
    indices = _level_indices(tuple(level.shape[1] for level in expanded), kept.device)
    return (matches * indices).sum(2) - 1


@lru_cache(maxsize=64)
def _level_indices(widths: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the index of each expanded node in its level, counted from 1."""
    counted = [index for width in widths for index in range(1, width + 1)]
    return torch.tensor(counted, device=device, dtype=torch.long)


@lru_cache(maxsize=64)
def _zeros(batch: int, device: torch.device) -> Tensor:
    return torch.zeros(batch, 1, device=device, dtype=torch.long)


def _numbers_of_children(ranks: list[int], num_nodes: int) -> tuple[int, ...]:
    """Return how many children of the first node each level has: the best ones, then siblings."""
    counts, left = [1] * len(ranks), num_nodes - len(ranks)
    for level, num in enumerate(ranks):
        added = min(num - 1, left)
        counts[level] += added
        left -= added
    return tuple(counts)


@lru_cache(maxsize=256)
def _spine(*counts: int) -> tuple[list[int], list[tuple[int, int] | None]]:
    """Return parents and expansions of a tree whose levels hang on the first node of the one above.

    Args:
        *counts: Nodes of each level.
    """
    parents: list[int] = [0]
    expansions: list[tuple[int, int] | None] = []
    above = 0
    for level, count in enumerate(counts):
        first = len(parents)
        parents += [above] * count
        is_expanded = level + 1 < len(counts)
        expansions += [(level, 0) if is_expanded else None, *[None] * (count - 1)]
        above = first
    return parents, expansions
