"""Speculative sampling by rejection: lossless in distribution if draft tokens are drawn.

The rules compare the target's probability of a draft token with the probability with which it was
drawn. Under one seed they emit other tokens than regular generation, from the same distribution.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from speclm.acceptance.interface import (
    AcceptanceRule,
    Accepted,
    Verified,
    register_acceptance_rule,
)
from speclm.errors import DraftError, OptionError
from speclm.sampling.draws import DraftSampling, Draws

Distribution = Float[Tensor, " vocab"]


@register_acceptance_rule("rejection")
@dataclass(frozen=True, slots=True)
class RejectionRule(AcceptanceRule):
    """Accept drawn draft tokens so that outputs follow the target's distribution.

    The rule decides row by row on the host and syncs with the device several times per round. It
    refuses drafts whose distributions are not finite.

    Args:
        variant: ``multi_round`` tries the children of a node in turn; on a chain that is
            speculative sampling as first published. ``block`` decides on a whole chain at once
            and accepts at least as much of it. ``traversal`` does the same for trees, from the
            leaves up.

    Raises:
        OptionError: If `variant` is not known.

    Source: Leviathan et al. 2023, Alg. 1, for chains; Chen et al. 2024 (Sequoia) for trees;
        arXiv 2403.10444 (block verification); arXiv 2505.12398 (traversal verification).
    """

    variant: str = "multi_round"

    uses_draws = True
    draft_sampling = DraftSampling.WITHOUT_REPLACEMENT

    def __post_init__(self) -> None:
        if self.variant not in list(VARIANTS):  # a dictionary would want to hash it
            raise OptionError(
                f"variant is {self.variant!r}, expected one of {sorted(VARIANTS)!r}; leave it out "
                "for 'multi_round'"
            )

    @property
    @override
    def name(self) -> str:
        return f"rejection ({self.variant})"

    @override
    def accept(self, verified: Verified) -> Accepted:
        assert verified.draws is not None, "a rule with uses_draws is given draws"
        decide = VARIANTS[self.variant]
        trees = {row: _RowTree(verified, row) for row, live in enumerate(verified.is_live) if live}
        _require_finite_distributions(verified, trees)
        paths = [[0] for _ in verified.is_live]
        emitted = [[0] for _ in verified.is_live]
        for row, tree in trees.items():  # other rows must not move the generator
            paths[row], bonus = decide(tree, verified.draws)
            emitted[row] = [*(tree.tokens[node] for node in paths[row][1:]), bonus]
        return Accepted.from_host(paths, emitted, device=verified.logits.device)


class _RowTree:
    """One row of a verified draft."""

    def __init__(self, verified: Verified, row: int) -> None:
        parents = verified.topology.host_parents
        self.tokens: list[int] = verified.draft_tokens[row].tolist()
        self.children: list[list[int]] = [[] for _ in self.tokens]
        for node, parent in enumerate(parents[row if len(parents) > 1 else 0]):
            if parent != node:  # neither the root nor padding
                self.children[parent].append(node)
        self._verified, self._row = verified, row

    def target_probs(self, node: int) -> Distribution:
        """Return the target's processed distribution after a node."""
        return self._verified.chooser.distribution(self._verified.logits[self._row, node][None])[0]

    def draft_probs(self, node: int) -> Distribution:
        """Return the distribution from which a node's first child was drawn."""
        distributions = self._verified.draft_distributions
        assert distributions is not None, "a draft with children has no distributions"
        return distributions[self._row, node]


def _require_finite_distributions(verified: Verified, trees: Mapping[int, _RowTree]) -> None:
    """Check the distribution of every node with children.

    Raises:
        DraftError: If one has a value that is not finite.
    """
    if verified.draft_distributions is None:
        return
    is_finite = verified.draft_distributions.sum(-1).isfinite().tolist()  # [batch][nodes], one sync
    for row, tree in trees.items():
        for node, children in enumerate(tree.children):
            if children and not is_finite[row][node]:
                raise DraftError(
                    "the distribution that the proposer drew from is not finite after node "
                    f"{node} of row {row}, expected probabilities; its logits are NaN or overflow "
                    "(in float16 beyond 65504): load the draft model or the heads in "
                    "torch.bfloat16, check their weights, or take acceptance='exact', which reads "
                    "no distributions"
                )


def accept_multi_round(tree: _RowTree, draws: Draws) -> tuple[list[int], int]:
    """Try the children of a node in turn; draw the bonus token from the remaining probability.

    Source: Leviathan et al. 2023, Alg. 1, for one child; Chen et al. 2024 (Sequoia) for more.
    """
    path = [0]
    while True:
        rest = tree.target_probs(path[-1])
        accepted, draft = None, None
        for child in tree.children[path[-1]]:
            draft = tree.draft_probs(path[-1]) if draft is None else draft
            token = tree.tokens[child]
            probability = float(draft[token])
            if not probability > 0:
                continue  # the distribution had no token left to draw
            if draws.bernoulli(float(rest[token]) / probability):
                accepted = child
                break
            rest, draft = _residual(rest, draft)[0], _without(draft, token)
        if accepted is None:
            return path, draws.categorical(rest)
        path.append(accepted)


def accept_block(tree: _RowTree, draws: Draws) -> tuple[list[int], int]:
    """Accept the longest prefix of a chain that passes a joint test of its tokens.

    Raises:
        OptionError: If a node has two children.

    Source: arXiv 2403.10444 (block verification).
    """
    kept, kept_share, share = [0], 1.0, 1.0
    chain = _drawn_chain(tree)
    for index, node in enumerate(chain[1:], start=1):
        parent, token = chain[index - 1], tree.tokens[node]
        ratio = float(tree.target_probs(parent)[token]) / float(tree.draft_probs(parent)[token])
        share = _at_most_one(share * ratio)
        passes = share
        if node != chain[-1]:
            left = _residual(tree.target_probs(node), tree.draft_probs(node), share=share)[1]
            passes = _share_left(left, share)
        if draws.bernoulli(passes):
            kept, kept_share = chain[: index + 1], share
    if math.isnan(share):
        return kept, -1
    last = kept[-1]
    rest = tree.target_probs(last)
    if last != chain[-1]:
        rest = _residual(rest, tree.draft_probs(last), share=kept_share)[0]
    return kept, draws.categorical(rest)


def _drawn_chain(tree: _RowTree) -> list[int]:
    """Return the nodes of a drafted chain, up to a token that cannot have been drawn."""
    chain = [0]
    while children := tree.children[chain[-1]]:
        if len(children) > 1:
            raise OptionError(
                f"node {chain[-1]} of the draft has {len(children)} children, block verification "
                "expected a chain; let the proposer draft one, or take RejectionRule('traversal')"
            )
        if not float(tree.draft_probs(chain[-1])[tree.tokens[children[0]]]) > 0:
            break
        chain.append(children[0])
    return chain


@dataclass(slots=True)
class _OpenNode:
    """A node that is not decided yet, given that the children tried so far were rejected.

    Args:
        target: Distribution of the token after the node.
        draft: Distribution of its next child; None for a leaf.
        share: Probability of accepting the path to the node.
        children: Children that are left, the first one last.
    """

    target: Distribution
    draft: Distribution | None
    share: float
    children: list[int]


def accept_traversal(tree: _RowTree, draws: Draws) -> tuple[list[int], int]:
    """Try whole paths, leaf by leaf; the remaining probability is passed to the nodes above.

    Source: arXiv 2505.12398 (traversal verification).
    """

    def open_node(node: int, share: float) -> _OpenNode:
        children = tree.children[node]
        draft = tree.draft_probs(node) if children else None
        return _OpenNode(tree.target_probs(node), draft, share, children[::-1])

    path, open_nodes = [0], [open_node(0, 1.0)]
    while True:
        top = open_nodes[-1]
        if top.children:
            assert top.draft is not None
            child = top.children[-1]
            token = tree.tokens[child]
            probability = float(top.draft[token])
            if not probability > 0:
                top.children.pop()  # the distribution had no token left to draw
                continue
            share = _at_most_one(top.share * float(top.target[token]) / probability)
            path.append(child)
            open_nodes.append(open_node(child, share))
            continue
        if math.isnan(top.share):
            return path, -1
        if len(path) == 1 or draws.bernoulli(top.share):
            return path, draws.categorical(top.target)
        rejected = path.pop()
        open_nodes.pop()
        parent = open_nodes[-1]
        assert parent.draft is not None
        parent.children.pop()
        parent.target, left = _residual(parent.target, parent.draft, share=parent.share)
        parent.draft = _without(parent.draft, tree.tokens[rejected])
        parent.share = _share_left(left, parent.share)


VARIANTS: Mapping[str, Callable[[_RowTree, Draws], tuple[list[int], int]]] = MappingProxyType(
    {"multi_round": accept_multi_round, "block": accept_block, "traversal": accept_traversal}
)
"""Ways to decide on one row, by name."""


def _residual(
    target: Distribution, draft: Distribution, *, share: float = 1.0
) -> tuple[Distribution, float]:
    """Return the normalised excess of ``share * target`` over `draft`, and its mass.

    If rounding leaves no mass, the target is returned. NaN is passed on, so that it is reported.
    """
    beyond = (share * target - draft.to(target.dtype)).clamp(min=0)
    mass = float(beyond.sum())
    return (beyond / mass if mass != 0 else target), mass


def _without(distribution: Distribution, token: int) -> Distribution:
    """Return a distribution without `token`; all zero if it has no other."""
    rest = distribution.clone()
    rest[token] = 0
    mass = rest.sum()
    return rest / mass if float(mass) > 0 else rest


def _share_left(left: float, share: float) -> float:
    """Return the share of a node whose child was rejected, given the mass that is left."""
    lost = 1.0 - share
    return left / (left + lost) if left + lost != 0 else 1.0


def _at_most_one(share: float) -> float:
    return min(share, 1.0)  # in this order NaN stays NaN, and is never accepted
