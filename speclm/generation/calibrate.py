"""Learns from the target's own texts which static tree of heads' guesses pays, and what it gives.

On a text that the target wrote greedily, rounds can be replayed without decoding: what matters is
the rank at which each head had the token that came. Heads see one hidden state only, so the ranks
at a position do not depend on the draft.
"""

from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from speclm.config import MAX_NODES
from speclm.errors import OptionError
from speclm.heads.medusa import MedusaHeads
from speclm.target import TargetFeatures, TargetView, exclusive
from speclm.tree.choices import Choices

Ranks = Sequence[Sequence[int]]
"""For each root of one text the rank that head 0, 1, ... gave to the token 1, 2, ... after it; -1
where the text ends before."""

_REPLAYS = 3  # rounds start where the tree before ended them, which settles quickly


@torch.no_grad()
def measure_ranks(
    view: TargetView, heads: MedusaHeads, prompt: Sequence[int], answer: Sequence[int]
) -> Ranks:
    """Return the rank that each head gave to what came, at every root of an answer.

    Args:
        view: The target that wrote the answer.
        heads: Its heads.
        prompt: Token ids that the answer was written for.
        answer: Token ids of the answer.

    Raises:
        OptionError: If the prompt is empty or the answer has fewer than two tokens.
    """
    if not prompt or len(answer) < 2:
        raise OptionError(
            f"prompt has {len(prompt)} tokens and the answer {len(answer)}, expected at least 1 "
            "and 2; leave such texts out"
        )
    tokens = torch.tensor([[*prompt, *answer]], device=view.device, dtype=torch.long)
    no_padding = torch.zeros(1, dtype=torch.long, device=view.device)
    with exclusive([(view.model, view.name)]), view.decoding(TargetFeatures.LAST_HIDDEN):
        view.prefill(tokens, view.new_cache(no_padding))
        assert view.features is not None
        hidden = view.features[0, len(prompt) - 1 : -2]  # what chose the answer's tokens but one
        logits = heads(hidden, lm_head=view.head_logits)  # [roots, heads, vocab]
    following = F.pad(tokens[0, len(prompt) + 1 :], (0, heads.num_heads - 1), value=-1)
    wanted = following.unfold(0, heads.num_heads, 1)  # [roots, heads]
    right = logits.gather(2, wanted.clamp(min=0)[:, :, None])
    ranks: Ranks = (logits > right).sum(2).masked_fill(wanted < 0, -1).tolist()
    return ranks


def replay_rounds(ranks: Ranks, choices: Choices) -> list[int]:
    """Return the accepted length of each round over one text.

    Args:
        ranks: Ranks at each root, from the text's first token on.
        choices: The tree that is drafted every round.
    """
    nodes = set(choices)
    accepted_lengths = []
    position = 0
    while position < len(ranks):
        path = tuple(rank for rank in ranks[position] if rank >= 0)
        length = 0
        while length < len(path) and path[: length + 1] in nodes:
            length += 1
        accepted_lengths.append(length)
        position += length + 1
    return accepted_lengths


def estimate_tau(texts: Sequence[Ranks], choices: Choices) -> float:
    """Return the tokens per target forward that decoding the texts with the tree would have.

    Like the measured tau it counts the bonus token and leaves the prefill out; a round that ends
    its text counts the tokens that it still had.

    Raises:
        OptionError: If the texts have no tokens.
    """
    num_rounds = sum(len(replay_rounds(ranks, choices)) for ranks in texts)
    if num_rounds == 0:
        raise OptionError("no text has a token to guess; give texts of at least two tokens")
    return sum(map(len, texts)) / num_rounds


def calibrate_choices(
    texts: Sequence[Ranks], *, num_nodes: int, max_rank: int = 32, max_depth: int | None = None
) -> Choices:
    """Return the static tree with the highest expected tau on the texts.

    The chance that a node is accepted is how often its path of ranks is the right one where
    rounds start. A prefix is at least as frequent as what follows it, so the most frequent paths
    are a tree. Where rounds start depends on the tree; counting is repeated with the tree found.

    Args:
        texts: Ranks at each root of each text.
        num_nodes: Nodes, the root left out.
        max_rank: Largest rank that is considered, exclusive.
        max_depth: Most levels; None for as many as there are heads.

    Raises:
        OptionError: If `num_nodes` does not fit into a round, or the texts have no tokens.
    """
    if not 1 <= num_nodes < MAX_NODES:
        raise OptionError(
            f"num_nodes is {num_nodes!r}, expected 1 to {MAX_NODES - 1}; choose one in range"
        )
    choices: Choices = ()
    for _ in range(_REPLAYS):
        counts: Counter[tuple[int, ...]] = Counter()
        for ranks in texts:
            for root in _round_starts(ranks, choices):
                path = tuple(ranks[root][:max_depth])
                for length in range(1, len(path) + 1):
                    if not 0 <= path[length - 1] < max_rank:
                        break
                    counts[path[:length]] += 1
        if not counts:
            raise OptionError("no text has a token to guess; give texts of at least two tokens")
        # Of equally frequent paths the shorter ones come first, so that prefixes are kept.
        best = sorted(counts, key=lambda path: (-counts[path], len(path), path))[:num_nodes]
        choices = tuple(sorted(best, key=lambda path: (len(path), path)))
    return choices


def _round_starts(ranks: Ranks, choices: Choices) -> list[int]:
    """Return the roots of the rounds that the tree leads to; every one without a tree."""
    if not choices:
        return list(range(len(ranks)))
    starts, position = [], 0
    for length in replay_rounds(ranks, choices):
        starts.append(position)
        position += length + 1
    return starts
