"""Finds out whether tree attention computes what the model computes."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from speclm.target import TargetView
from speclm.tree.topology import from_parents
from speclm.verify._attempt import Evidence, attempt, distinct_tokens, relative_difference
from speclm.verify.backend import Backend
from speclm.verify.verdict import SelfCheck

_PARENTS = [0, 0, 0, 1]
_PROMPT_LENGTHS = (4, 2)
_PATHS = (((0, 2), (0, 1, 3)), ((0, 1, 3), (0, 2)))
"""For each row what is kept of the first tree, and what is compared of the second. One row is
padded, the other has a gap before the second tree; neither keeps a prefix of the slots."""
_SAME = 5  # a position that both rows reach with the same token after other ones


def check_trees(target: TargetView) -> SelfCheck:
    """Compare two tiny trees over two ragged, padded rows with the model's own forward.

    The first tree is read along with the prompt; the second follows a kept path that is not a
    prefix of the slots, so that positions, masks and rollback are all covered. Costs three
    forwards of at most 18 tokens. The model has to be in evaluation mode.

    Returns:
        A verdict for trees or for plain decoding.
    """
    obstacle = target.tree_obstacle()
    if obstacle is not None:  # which tiny trees may not run into
        return SelfCheck(Backend.PLAIN, obstacle)
    return attempt(target, Backend.TREES, _measure)


@torch.no_grad()
def _measure(target: TargetView) -> Evidence:
    device, longest = target.device, max(_PROMPT_LENGTHS)
    batch, topology = len(_PROMPT_LENGTHS), from_parents([_PARENTS], device=device)
    nodes = topology.num_nodes
    tokens = distinct_tokens(target, batch * (longest + 2 * nodes)).view(batch, -1)
    prompts, first = tokens[:, :longest], tokens[:, longest : longest + nodes]
    second = tokens[:, longest + nodes :]
    second[1, 0] = first[0, 2]  # both at `_SAME`
    padding = torch.tensor(
        [longest - length for length in _PROMPT_LENGTHS], device=device, dtype=torch.long
    )

    cache = target.new_cache(padding)
    after_first = target.forward_tree(first, topology, cache, prompt=prompts)
    cache.keep([kept for kept, _ in _PATHS])
    after_second = target.forward_tree(second, topology, cache)

    target.require_masked_windows()
    sequences, found = [], []
    for row, (kept, compared) in enumerate(_PATHS):
        parts = [prompts[row, int(padding[row]) :], first[row, kept], second[row, compared]]
        sequences.append(torch.cat(parts))
        found.append(torch.cat([after_first[row, kept], after_second[row, compared]]))
    wanted = _own_logits(target, sequences, first=min(_PROMPT_LENGTHS))
    starts = [length - min(_PROMPT_LENGTHS) for length in _PROMPT_LENGTHS]
    own = torch.cat(
        [wanted[row, start : start + len(found[row])] for row, start in enumerate(starts)]
    )
    same = wanted[:, _SAME - min(_PROMPT_LENGTHS)]
    return Evidence(
        error=relative_difference(torch.cat(found), own),
        effect=math.nan if own.isnan().any() else relative_difference(same[:1], same[1:]),
    )


def _own_logits(
    target: TargetView,
    sequences: list[Int[Tensor, " _"]],  # of unequal length
    *,
    first: int,
) -> Float[Tensor, "batch positions vocab"]:
    """Return the model's own logits from position `first` on.

    No padding is relied on: what follows a short sequence is not looked at.
    """
    longest = max(map(len, sequences))
    rows = [torch.cat([sequence, sequence[: longest - len(sequence)]]) for sequence in sequences]
    logits: Tensor = target.model(
        input_ids=torch.stack(rows), use_cache=False, logits_to_keep=longest - first
    ).logits
    return logits
