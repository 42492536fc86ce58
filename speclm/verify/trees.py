"""Finds out whether tree attention computes what regular generation computes."""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from speclm.target import TargetView
from speclm.tree.topology import chain, from_parents
from speclm.verify._attempt import Evidence, attempt, distinct_tokens, relative_difference
from speclm.verify.backend import Backend
from speclm.verify.changes import changes
from speclm.verify.regular import NUM_LATER_STEPS, regular_logits
from speclm.verify.verdict import SelfCheck

_PARENTS = [0, 0, 0, 1]
_PROMPT_LENGTHS = (4, 3)
_PATHS = (((0, 2), (0, 1, 3)), ((0, 1, 3), (0, 2)))
"""For each row what is kept of the first tree, and what is compared of the second. One row is
padded, the other has a gap before the second tree; neither keeps a prefix of the slots. The second
row is shorter by a token, so that both have a last position in common but one."""


def check_trees(target: TargetView) -> SelfCheck:
    """Compare two tiny trees over two ragged, padded rows with regular generation.

    The first tree is read along with the prompt; the second follows a kept path that is not a
    prefix of the slots, so that positions, masks and rollback are all covered. Costs six
    forwards of at most 16 tokens, and `NUM_LATER_STEPS` more for a model with code of others. The
    model has to be in evaluation mode.

    Returns:
        A verdict for trees or for plain decoding.
    """
    obstacle = target.tree_obstacle()
    if obstacle is not None:  # which tiny trees may not run into
        return SelfCheck(Backend.PLAIN, obstacle)
    return attempt(target, Backend.TREES, _measure)


@torch.no_grad()
def _measure(target: TargetView) -> Evidence:
    evidence = _measure_trees(target)
    if not changes(target.model):
        return evidence
    return replace(evidence, error=max(evidence.error, _error_of_later_steps(target)))


def _measure_trees(target: TargetView) -> Evidence:
    device, longest = target.device, max(_PROMPT_LENGTHS)
    batch, topology = len(_PROMPT_LENGTHS), from_parents([_PARENTS], device=device)
    nodes = topology.num_nodes
    tokens = distinct_tokens(target, batch * (longest + 2 * nodes)).view(batch, -1)
    prompts, first = tokens[:, :longest], tokens[:, longest : longest + nodes]
    second = tokens[:, longest + nodes :]
    second[1, 2] = second[0, 1]  # at the same position, after other tokens
    padding = torch.tensor(
        [longest - length for length in _PROMPT_LENGTHS], device=device, dtype=torch.long
    )

    cache = target.new_cache(padding)
    after_first = target.forward_tree(first, topology, cache, prompt=prompts)
    cache.keep([kept for kept, _ in _PATHS])
    with target.steps():
        after_second = target.forward_tree(second, topology, cache)

    target.require_masked_windows()
    found, wanted = [], []
    for row, (kept, compared) in enumerate(_PATHS):
        parts = [prompts[row, int(padding[row]) :], first[row, kept], second[row, compared]]
        after = torch.cat([after_first[row, kept], after_second[row, compared]])
        found.append(after[-2:])
        # Without padding models get no mask, and some compute something else then.
        wanted.append(_generated(target, torch.cat(parts), num_padding=row, num_steps=1))
    return Evidence(
        error=relative_difference(torch.cat(found), torch.cat(wanted)),
        effect=relative_difference(wanted[0][-2:-1], wanted[1][-1:]),
    )


def _error_of_later_steps(target: TargetView) -> float:
    """Return how far a chain of nodes is from as many steps of regular generation."""
    text = distinct_tokens(target, NUM_LATER_STEPS + _PROMPT_LENGTHS[0])
    wanted = _generated(target, text, num_padding=0, num_steps=NUM_LATER_STEPS)
    prompt, nodes = text[None, : -NUM_LATER_STEPS - 1], text[None, -NUM_LATER_STEPS - 1 :]
    cache = target.new_cache(text.new_zeros(1))
    topology = chain(NUM_LATER_STEPS, device=target.device)
    found = target.forward_tree(nodes, topology, cache, prompt=prompt)
    return relative_difference(found[0], wanted)


def _generated(
    target: TargetView, text: Int[Tensor, " seq"], *, num_padding: int, num_steps: int
) -> Float[Tensor, "positions vocab"]:
    """Return the logits of regular generation that ends with the last tokens of a text."""
    prompt = torch.cat([text.new_zeros(num_padding), text[:-num_steps]])[None]
    mask = torch.ones_like(prompt)
    mask[:, :num_padding] = 0
    return regular_logits(target, prompt, mask, text[None, -num_steps:])[0]
