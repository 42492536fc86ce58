"""Medusa's lossy rule: accept tokens that the target finds likely enough."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from speclm.acceptance.exact import nodes_of_accepted_paths
from speclm.acceptance.interface import (
    AcceptanceRule,
    Accepted,
    Verified,
    register_acceptance_rule,
)
from speclm.config import require_in_range
from speclm.tree.topology import TreeTopology


@register_acceptance_rule("typical")
@dataclass(frozen=True, slots=True)
class TypicalRule(AcceptanceRule):
    """Accept the longest path of tokens that are likely, given how certain the target is.

    A token x after context c is likely if ``target_probs(x | c) > min(epsilon, delta *
    exp(-H))``, where H is the entropy of the target's processed distribution after c. The bonus
    token is the target's most likely one. The rule draws nothing: with a deterministic proposer,
    equal prompts give equal outputs.

    Args:
        epsilon: Probability above which a token is likely in any context, in ``[0, 1]``.
        delta: Factor of the entropy-dependent threshold, at least 0. Medusa's authors recommend
            the square root of `epsilon`.

    Raises:
        OptionError: If an option is out of range.

    Source: Cai et al. 2024 (Medusa), section 2.3.1.
    """

    epsilon: float = 0.09
    delta: float = 0.3

    is_lossy = True

    def __post_init__(self) -> None:
        require_in_range("epsilon", self.epsilon, low=0.0, high=1.0)
        require_in_range("delta", self.delta, low=0.0, high=float("inf"))

    @property
    @override
    def name(self) -> str:
        return f"typical (epsilon {self.epsilon:g}, delta {self.delta:g})"

    @override
    def accept(self, verified: Verified) -> Accepted:
        logits, tokens, topology = verified.logits, verified.draft_tokens, verified.topology
        target_probs = verified.chooser.distribution(logits.flatten(0, 1)).view(logits.shape)
        parents = topology.parents.expand(len(tokens), -1)
        rows = torch.arange(len(tokens), device=tokens.device)
        node_probs = target_probs[rows[:, None], parents, tokens]  # [batch, nodes]
        entropy = -torch.special.xlogy(target_probs, target_probs).sum(-1)
        thresholds = (self.delta * (-entropy).exp()).clamp(max=self.epsilon).gather(1, parents)
        path = _longest_path(node_probs > thresholds, node_probs, topology)  # [batch, path]
        length = (path >= 0).sum(1)
        bonus = verified.chooser.choose(logits[rows, path[rows, length - 1]], None)
        following = F.pad(path[:, 1:], (0, 1), value=-1)
        emitted = tokens.gather(1, following.clamp(min=0)).masked_fill(following < 0, -1)
        return Accepted(path=path, tokens=emitted.index_put((rows, length - 1), bonus))


def _longest_path(
    is_likely: Bool[Tensor, "batch nodes"],
    node_probs: Float[Tensor, "batch nodes"],
    topology: TreeTopology,
) -> Int[Tensor, "batch path"]:
    """Return the longest path of likely nodes; of equally long ones the most probable."""
    log_probs = node_probs.log()
    log_probs[:, 0] = 0.0  # the root is certain
    # A zero probability stays out of sums that it is not part of, where it would make NaN.
    totals = log_probs[:, None, :].where(topology.ancestor_mask, 0.0).sum(2)  # [batch, nodes]
    depths = topology.depths.masked_fill(~nodes_of_accepted_paths(is_likely, topology), -1)
    is_longest = depths == depths.amax(1, keepdim=True)
    return topology.paths_to(totals.masked_fill(~is_longest, -torch.inf).argmax(1))
