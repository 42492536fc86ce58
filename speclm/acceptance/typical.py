"""Medusa's rule: keep what the target finds likely enough. It is lossy."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from speclm.acceptance.accepted import Accepted
from speclm.acceptance.interface import AcceptanceRule, Verified
from speclm.acceptance.registry import register_acceptance_rule
from speclm.config import require_in_range
from speclm.tree.topology import TreeTopology


@register_acceptance_rule("typical")
@dataclass(frozen=True, slots=True)
class TypicalRule(AcceptanceRule):
    """Keeps the longest path of tokens that are likely for how sure the target is.

    A token x after context c is likely if ``target_probs(x | c) > min(epsilon, delta *
    exp(-H))``, where H is the entropy of the target's processed distribution after c. The bonus
    token is the target's likeliest. Nothing is drawn: with a proposer that draws nothing either,
    equal prompts give equal outputs.

    Args:
        epsilon: Probability above which a token is likely in any context, in ``[0, 1]``.
        delta: Share of the probability that the tokens of a uniform distribution of equal entropy
            have, at least 0. Medusa's authors recommend the square root of `epsilon`.

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
        logits, tokens, topology = verified.logits, verified.tokens, verified.topology
        batch, nodes, vocab = logits.shape
        distributions = verified.chooser.distribution(logits.reshape(batch * nodes, vocab)).view(
            logits.shape
        )
        is_likely, probabilities = _likely(
            distributions, tokens, topology, epsilon=self.epsilon, delta=self.delta
        )
        path = _longest(is_likely, probabilities, topology)  # [batch, path]
        length = (path >= 0).sum(1)
        rows = torch.arange(batch, device=path.device)
        last = path[rows, length - 1]
        bonus = verified.chooser.choose(logits[rows, last], None)
        following = torch.cat([path[:, 1:], path.new_full((batch, 1), -1)], dim=1)
        emitted = tokens.gather(1, following.clamp(min=0)).masked_fill(following < 0, -1)
        return Accepted(path=path, tokens=emitted.index_put((rows, length - 1), bonus))


def _likely(
    distributions: Float[Tensor, "batch nodes vocab"],
    tokens: Int[Tensor, "batch nodes"],
    topology: TreeTopology,
    *,
    epsilon: float,
    delta: float,
) -> tuple[Bool[Tensor, "batch nodes"], Float[Tensor, "batch nodes"]]:
    """Tell which nodes are likely after their parents, and how likely."""
    parents = topology.parents.expand(len(tokens), -1)
    entropy = -torch.special.xlogy(distributions, distributions).sum(-1)  # [batch, nodes]
    thresholds = (delta * (-entropy).exp()).clamp(max=epsilon).gather(1, parents)
    rows = torch.arange(len(tokens), device=tokens.device)[:, None]
    probabilities = distributions[rows, parents, tokens]
    is_likely = (probabilities > thresholds) & ~topology.is_padding
    is_likely[:, 0] = True
    return is_likely, probabilities


def _longest(
    is_likely: Bool[Tensor, "batch nodes"],
    probabilities: Float[Tensor, "batch nodes"],
    topology: TreeTopology,
) -> Int[Tensor, "batch path"]:
    """Return the longest path of likely nodes; of equally long ones the most probable."""
    above = topology.ancestor_mask
    is_alive = (is_likely[:, None, :] | ~above).all(2) & ~topology.is_padding
    log_probabilities = probabilities.log()
    log_probabilities[:, 0] = 0.0  # the root is no guess
    # A zero probability stays out of sums that it is not part of, where it would make NaN.
    totals = log_probabilities[:, None, :].where(above, 0.0).sum(2)  # [batch, nodes]
    depths = topology.depths.masked_fill(~is_alive, -1)
    is_longest = depths == depths.amax(1, keepdim=True)
    last = totals.masked_fill(~is_longest, -torch.inf).argmax(1)
    rows = torch.arange(len(last), device=last.device)
    return topology.path_indices.expand(len(last), -1, -1)[rows, last]
