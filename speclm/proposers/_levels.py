"""What proposers share that draft a tree a level at a time with a cache of their own."""

import math

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from speclm.proposers.interface import Draft
from speclm.tree.growth import GrownRow
from speclm.tree.topology import from_parents


def assemble(grown: list[GrownRow], roots: Int[Tensor, " batch"]) -> Draft:
    """Return the draft of grown rows; short ones are padded with token 0, which is always valid.

    Probabilities are those that the rows were ranked by.
    """
    parents = [[0, *row.parents] for row in grown]
    nodes = max(map(len, parents))
    guesses = [row.tokens + [0] * (nodes - 1 - len(row.tokens)) for row in grown]
    tokens = torch.tensor(guesses, dtype=torch.long, device=roots.device)
    probs = [[1.0, *row_probs(row), *[0.0] * (nodes - 1 - len(row.tokens))] for row in grown]
    return Draft(
        tokens=torch.cat([roots[:, None], tokens.view(len(guesses), -1)], dim=1),
        topology=from_parents(parents, device=roots.device),
        probs=torch.tensor(probs, device=roots.device),
    )


def row_probs(row: GrownRow) -> list[float]:
    """Return the probability of each node given its path, from cumulative log-probabilities."""
    above = [0.0, *row.scores]
    return [
        math.exp(min(score - above[parent], 0.0))
        for score, parent in zip(row.scores, row.parents, strict=True)
    ]


def seen_below(
    seen: Bool[Tensor, "batch above slots"], parents: Int[Tensor, "batch width"]
) -> Bool[Tensor, "batch width slots_and_width"]:
    """Return what new nodes see: what their parents see, and each itself."""
    batch, width = parents.shape
    above = seen.gather(1, parents[:, :, None].expand(-1, -1, seen.shape[2]))
    itself = torch.eye(width, dtype=torch.bool, device=seen.device).expand(batch, -1, -1)
    return torch.cat([above, itself], dim=2)
