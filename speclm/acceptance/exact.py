"""The default rule: emit what regular generation would emit, whatever was drafted."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from typing_extensions import override

from speclm.acceptance.accepted import Accepted
from speclm.acceptance.choices import accept_along_path, choose_at_all_nodes
from speclm.acceptance.interface import AcceptanceRule, Verified
from speclm.acceptance.registry import register_acceptance_rule
from speclm.tree.topology import TreeTopology


def accept_exact(
    draft_tokens: Int[Tensor, "batch nodes"],
    choices: Int[Tensor, "batch nodes"],
    topology: TreeTopology,
) -> Accepted:
    """Walk from the root to the deepest node whose path regular generation would have taken.

    Greedy and sampling are one rule: only the way in which the target chooses differs. The result
    is lossless for any draft, because a draft token is emitted only where the target chose it.

    Args:
        draft_tokens: Token at each node; column 0 is the root.
        choices: Token that the target picks after each node: argmax of its processed
            probabilities, divided by that position's noise when sampling. Nodes that no walk can
            reach may hold -1.
        topology: Shape of the trees.

    Returns:
        The path and the tokens emitted along it, padded with -1. Does not sync with the device.

    Source: Daliri, Musco, Suresh 2024 (drafter-invariant speculative decoding by shared noise).
    """
    batch, nodes = draft_tokens.shape
    parents = topology.parents.expand(batch, -1)
    agrees = (draft_tokens == choices.gather(1, parents)) & ~topology.is_padding
    agrees[:, 0] = True
    is_alive = (agrees[:, None, :] | ~topology.ancestor_mask).all(2) & ~topology.is_padding
    order = torch.arange(nodes, device=draft_tokens.device)
    score = (topology.depths + 1) * nodes - order  # deepest first, then the first sibling
    last = score.masked_fill(~is_alive, 0).argmax(1)  # [batch]
    paths = topology.path_indices.expand(batch, -1, -1)
    path = paths[torch.arange(batch, device=last.device), last]  # [batch, path]
    tokens = choices.gather(1, path.clamp(min=0)).masked_fill(path < 0, -1)
    return Accepted(path=path, tokens=tokens)


@register_acceptance_rule("exact")
@dataclass(frozen=True, slots=True)
class ExactRule(AcceptanceRule):
    """Emits the tokens of regular generation under the same seed, greedy and sampling."""

    is_exact = True
    uses_noise = True

    @property
    @override
    def name(self) -> str:
        return "exact"

    @override
    def accept(self, verified: Verified) -> Accepted:
        logits, tokens, topology = verified.logits, verified.tokens, verified.topology
        chooser, noise, lengths = verified.chooser, verified.noise, verified.lengths
        if logits.device.type == "cpu":
            return accept_along_path(logits, tokens, topology, chooser, noise, lengths=lengths)
        choices = choose_at_all_nodes(logits, topology, chooser, noise, lengths=lengths)
        return accept_exact(tokens, choices, topology)
