"""Finds out, when a model is loaded, whether tree attention computes what the model computes."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from speclm.target import TargetView
from speclm.tree.topology import TreeTopology, from_parents

_PARENTS = [0, 0, 0, 1, 1, 2]
_LEAVES = (3, 4, 5)  # equally deep, so that their paths make one unpadded batch
_PROMPT_LENGTHS = (7, 4)
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # of the logits' spread; halves round more
_HALF_TOLERANCE = 0.1


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """Verdict on a model.

    Args:
        passes: Whether trees may be used.
        reason: Why, in words for `print_report`.
        error: Largest difference of a logit, relative to their standard deviation.
    """

    passes: bool
    reason: str
    error: float


@torch.no_grad()
def check_trees(target: TargetView) -> SelfCheck:
    """Compare a tiny tree over two ragged, padded rows with the model's own forwards.

    The first tree forward follows the prefill; a second one follows a kept path that is not a
    prefix of the slots, so that positions, masks and rollback are all covered. Costs six forwards
    of fewer than 16 tokens.
    """
    in_training = [module for module in target.model.modules() if module.training]
    for module in in_training:  # one by one: a model may be in training mode in parts
        module.training = False
    try:
        error = _largest_error(target)
    except Exception as exception:  # noqa: BLE001 - foreign model code may fail in any way here
        return SelfCheck(
            passes=False,
            reason=f"tree forward failed with {type(exception).__name__}: {exception}",
            error=float("inf"),
        )
    finally:
        for module in in_training:
            module.training = True
    obstacle = target.tree_obstacle()
    if obstacle is not None:
        return SelfCheck(passes=False, reason=obstacle, error=error)
    bound = _TOLERANCE.get(target.model.dtype, _HALF_TOLERANCE)
    if error <= bound:
        return SelfCheck(passes=True, reason=f"tree self-check passed, {error:.1e}", error=error)
    return SelfCheck(
        passes=False,
        reason=f"tree logits differ from the model's own by {error:.1e} of their spread, "
        f"at most {bound:.0e} expected",
        error=error,
    )


def _largest_error(target: TargetView) -> float:
    device = target.device
    longest = max(_PROMPT_LENGTHS)
    padding = torch.tensor([longest - length for length in _PROMPT_LENGTHS], device=device)
    prompts = _distinct_tokens(target, len(padding), longest, offset=3)
    mask = (torch.arange(longest, device=device) >= padding[:, None]).long()
    topology = from_parents([_PARENTS], device=device)
    tree = _distinct_tokens(target, len(padding), topology.num_nodes, offset=101)
    cache = target.new_cache(padding)
    target.prefill(prompts, cache, attention_mask=mask)
    rows = [prompts[row, int(padding[row]) :] for row in range(len(padding))]

    logits = target.forward_tree(tree, topology, cache)
    error = _compare(target, logits, rows, tree, topology)
    kept = [[0, 2, 5], [0]]
    cache.keep(kept)
    rows = [torch.cat([rows[row], tree[row, path]]) for row, path in enumerate(kept)]
    tree = tree.flip(1)
    logits = target.forward_tree(tree, topology, cache)
    return max(error, _compare(target, logits, rows, tree, topology))


def _compare(
    target: TargetView,
    logits: Tensor,
    rows: list[Int[Tensor, " _"]],  # of unequal length
    tree: Int[Tensor, "batch nodes"],
    topology: TreeTopology,
) -> float:
    """Return the largest relative difference to plain forwards of all root-to-leaf paths."""
    worst = 0.0
    for row, prefix in enumerate(rows):
        paths: list[list[int]] = topology.path_indices[0, list(_LEAVES)].tolist()
        sequences = torch.stack([torch.cat([prefix, tree[row, path]]) for path in paths])
        expected = target.model(input_ids=sequences, use_cache=False).logits
        for path, reference in zip(paths, expected, strict=True):
            found = logits[row, path].float()
            wanted = reference[-len(path) :].float()
            if bool(found.isnan().any()) and not bool(wanted.isnan().any()):
                return float("inf")  # a maximum would drop it
            worst = max(worst, float((found - wanted).abs().max() / wanted.std()))
    return worst


def _distinct_tokens(
    target: TargetView, batch: int, length: int, *, offset: int
) -> Int[Tensor, "batch length"]:
    """Return fixed, spread-out token ids; no generator is touched."""
    steps = torch.arange(batch * length, device=target.device).view(batch, length)
    return (offset + 37 * steps) % target.vocab_size
