"""What proposers share that draft a tree a level at a time with a cache of their own."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from speclm.proposers.interface import Draft
from speclm.tree.growth import GrownRow
from speclm.tree.topology import from_parents


def assemble(grown: list[GrownRow], roots: Int[Tensor, " batch"]) -> Draft:
    """Return the draft of grown rows; short ones are padded with token 0, which is always valid."""
    parents = [[0, *row.parents] for row in grown]
    nodes = max(map(len, parents))
    guesses = [row.tokens + [0] * (nodes - 1 - len(row.tokens)) for row in grown]
    tokens = torch.tensor(guesses, dtype=torch.long, device=roots.device)
    return Draft(
        tokens=torch.cat([roots[:, None], tokens.view(len(guesses), -1)], dim=1),
        topology=from_parents(parents, device=roots.device),
        probs=None,
    )


def seen_below(
    seen: Bool[Tensor, "batch above slots"], parents: Int[Tensor, "batch width"]
) -> Bool[Tensor, "batch width slots_and_width"]:
    """Return what new nodes see: what their parents see, and each itself."""
    batch, width = parents.shape
    above = seen.gather(1, parents[:, :, None].expand(-1, -1, seen.shape[2]))
    itself = torch.eye(width, dtype=torch.bool, device=seen.device).expand(batch, -1, -1)
    return torch.cat([above, itself], dim=2)
