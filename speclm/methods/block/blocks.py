"""Blocks of texts that are known: what heads draft of them, and what would be accepted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from speclm.drafting.ranking import LevelRanking
from speclm.methods.block.network import BlockHeads
from speclm.methods.block.tree import BlockLogits, BlockProposerConfig, grow_trees
from speclm.training.targets import IGNORED
from speclm.training.training_model import MAX_LOGITS
from speclm.tree.dynamic import GrownRow


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """The blocks that are drafted from a batch of texts.

    Args:
        anchors: Position of each anchor, padded with 0.
        targets: Token that each position learns to draft, `IGNORED` if none counts.
        previous: Token before each of them.
        is_complete: Whether a text's every block is among them.
    """

    anchors: Int[Tensor, "batch blocks"]
    targets: Int[Tensor, "batch blocks drafts"]
    previous: Int[Tensor, "batch blocks drafts"]
    is_complete: Bool[Tensor, " batch"]


def find_blocks(
    tokens: Int[Tensor, "batch seq"],
    loss_mask: Bool[Tensor, "batch seq"],
    *,
    num_drafts: int,
    max_anchors: int | None,
) -> Blocks:
    """Return blocks whose anchor and next token the assistant wrote.

    Args:
        tokens: Texts, padded on the right.
        loss_mask: True at tokens that count.
        num_drafts: Draft tokens of a block. They end with the assistant's turn.
        max_anchors: Blocks of each text, drawn at random from the default generator if there are
            more; None for all.
    """
    batch, length = tokens.shape
    is_anchor = F.pad(loss_mask[:, :-1] & loss_mask[:, 1:], (0, 1))
    is_anchor[:, 0] = False  # nothing is known before it
    counts = is_anchor.sum(1)
    # The largest number of anchors decides a shape.
    num_blocks = max(1, min(int(counts.max()), max_anchors or length))
    order = is_anchor.float()
    if max_anchors is not None:
        order = order + torch.rand_like(order)
    # Sorted, since several backends gather neighbours faster.
    chosen = order.topk(num_blocks, dim=1).indices.sort(dim=1).values
    is_block = is_anchor.gather(1, chosen)
    anchors = chosen * is_block
    ahead = 1 + torch.arange(num_drafts, device=tokens.device)
    at = anchors[:, :, None] + ahead  # [batch, blocks, drafts]
    is_inside = (at < length) & is_block[:, :, None]
    at = at.clamp(max=length - 1).flatten(1)
    shape = (batch, num_blocks, num_drafts)
    is_inside &= loss_mask.gather(1, at).view(shape)
    is_inside = is_inside.long().cumprod(-1).bool()
    targets = tokens.gather(1, at).view(shape)
    previous = torch.cat((tokens.gather(1, anchors)[:, :, None], targets[:, :, :-1]), dim=-1)
    return Blocks(anchors, targets.masked_fill(~is_inside, IGNORED), previous, counts <= num_blocks)


def count_blocks(
    loss_mask: Bool[Tensor, "batch seq"],
    weights: Float[Tensor, " drafts"],
    *,
    max_anchors: int,
) -> Float[Tensor, "1"]:
    """Return the sum of the weights of all targets that `find_blocks` has in the mean.

    It is exact where all blocks are drafted.

    Args:
        loss_mask: True at tokens that count.
        weights: Weight of each position of a block.
        max_anchors: Blocks that are drawn from each text if it has more.
    """
    reaches = loss_mask[:, 1:]  # whether the assistant wrote the anchor and all after it
    num_blocks = (reaches[:, :-1] & loss_mask[:, 2:]).sum(1)
    total = torch.zeros(len(loss_mask), dtype=torch.float32, device=loss_mask.device)
    for depth, weight in enumerate(weights.to(loss_mask.device)):
        reaches = reaches[:, :-1] & loss_mask[:, 2 + depth :]
        total = total + weight * reaches.sum(1)
    drawn = (max_anchors / num_blocks.clamp(min=1)).clamp(max=1.0)
    return (total * drawn).sum()[None]


@torch.no_grad()
def accepted_lengths(
    heads: BlockHeads,
    hidden: Float[Tensor, "blocks drafts hidden"],
    roots: Int[Tensor, " blocks"],
    targets: Int[Tensor, "blocks drafts"],
    *,
    config: BlockProposerConfig,
    lm_head: Callable[[Tensor], Tensor],
    end_ids: Sequence[int],
) -> Int[Tensor, " blocks"]:
    """Return how many tokens of each block's tree a greedy target would accept.

    Args:
        heads: The network.
        hidden: Its results.
        roots: Token at each anchor.
        targets: Tokens of the target after it, negative where none is known.
        config: How trees are grown.
        lm_head: See `BlockHeads.logits`.
        end_ids: Tokens after which nothing follows.
    """
    ranking = LevelRanking(vocab_size=heads.config.vocab_size)
    # A tree takes the logits of all positions, and at each level those of the nodes expanded.
    size = MAX_LOGITS // (heads.config.draft_vocab_size * (heads.config.num_drafts + config.width))
    found: list[int] = []
    for part in torch.split(torch.arange(len(roots), device=roots.device), max(1, size)):
        if not len(part):
            break  # a single empty part
        grown = grow_trees(
            BlockLogits(heads, hidden[part], heads.logits(hidden[part], lm_head=lm_head)),
            roots[part],
            config=config,
            ranking=ranking,
            leaf_tokens=frozenset(end_ids),
        )
        wanted = targets[part].tolist()  # the host compares the trees, which it has made
        found += [_accepted_length(*pair) for pair in zip(grown, wanted, strict=True)]
    return roots.new_tensor(found)


def _accepted_length(grown: GrownRow, targets: list[int]) -> int:
    """Return the length of the path of a tree that agrees with the target."""
    nodes = {
        pair: node
        for node, pair in enumerate(zip(grown.parents, grown.tokens, strict=True), start=1)
    }
    node = length = 0
    while length < len(targets) and (node, targets[length]) in nodes:
        node = nodes[node, targets[length]]
        length += 1
    return length
