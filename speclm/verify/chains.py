"""Finds out whether a model reads a chain of tokens as regular generation has it read them."""

import math
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from speclm.target import ChainReader, TargetView
from speclm.verify._attempt import Evidence, attempt, distinct_tokens, relative_difference
from speclm.verify.backend import Backend
from speclm.verify.changes import changes
from speclm.verify.regular import NUM_LATER_STEPS, regular_logits
from speclm.verify.verdict import SelfCheck

_PROMPT_LENGTHS = (5, 3)
_ROUNDS = ((1, 1), (2, 1))  # tokens of each chain that are kept, and such that are not
_LATER_CHAIN = 3
_NUM_STEPS = sum(num_kept for num_kept, _ in _ROUNDS) + 1


def check_chains(target: TargetView) -> SelfCheck:
    """Compare chains that are kept in part with regular generation, over two padded rows.

    A model may compute something else in a step than in a forward over the whole text, and the
    steps of regular generation are what is promised. Costs nine forwards of fewer than 13 tokens,
    and `NUM_LATER_STEPS` more with code of others. The model has to be in evaluation mode.

    Returns:
        A verdict for chains or for plain decoding.
    """
    check = attempt(target, Backend.CHAINS, _measure)
    limits = _step_limits(target)
    if check.backend is Backend.CHAINS and limits is not None:
        reason = (
            f"time steps are bounded to {limits} in chains and not in single steps, which the "
            "self-check's few tokens may not show"
        )
        return replace(check, backend=Backend.PLAIN, reason=reason)
    return check


def _step_limits(target: TargetView) -> tuple[float, float] | None:
    """Return bounds of a recurrence's time steps, by Transformers' name for them, if they bind."""
    for module in target.model.modules():
        limits = getattr(module, "time_step_limit", None)
        if isinstance(limits, tuple | list) and (limits[0] > 0.0 or limits[1] < math.inf):
            return float(limits[0]), float(limits[1])
    return None


@torch.no_grad()
def _measure(target: TargetView) -> Evidence:
    evidence = _measure_rounds(target)
    if not changes(target.model):
        return evidence
    return replace(evidence, error=max(evidence.error, _error_of_later_steps(target)))


def _error_of_later_steps(target: TargetView) -> float:
    """Return how far chains that are kept whole are from as many steps of regular generation."""
    length = _PROMPT_LENGTHS[0]
    text = distinct_tokens(target, length + NUM_LATER_STEPS)[None]
    prompt, mask = text[:, :length], torch.ones_like(text[:, :length])
    wanted = regular_logits(target, prompt, mask, text[:, length:])
    with target.steps():
        reader = ChainReader.of_prompt(target, mask)
        found = [reader.prefill(prompt)]
        for start in range(length, text.shape[1], _LATER_CHAIN):
            found.append(reader.feed(text[:, start : start + _LATER_CHAIN]))
            reader.keep(_LATER_CHAIN)
    return relative_difference(torch.cat(found, dim=1)[0], wanted[0])


def _measure_rounds(target: TargetView) -> Evidence:
    batch, longest = len(_PROMPT_LENGTHS), max(_PROMPT_LENGTHS)
    padding = torch.tensor(
        [longest - length for length in _PROMPT_LENGTHS], device=target.device, dtype=torch.long
    )
    mask = (torch.arange(longest, device=target.device) >= padding[:, None]).long()
    num_wrong = sum(count for _, count in _ROUNDS)
    tokens = distinct_tokens(target, batch * (longest + _NUM_STEPS + num_wrong)).view(batch, -1)
    prompts, text = tokens[:, :longest], tokens[:, longest : longest + _NUM_STEPS]
    wrong = tokens[:, longest + _NUM_STEPS :]
    text[1, -1] = text[0, -1]

    target.require_masked_windows()
    wanted = regular_logits(target, prompts, mask, text)
    with target.steps():
        found = _in_chains(target, prompts, mask, text, wrong)
    return Evidence(
        error=relative_difference(found.flatten(0, 1), wanted.flatten(0, 1)),
        effect=relative_difference(wanted[:1, -1], wanted[1:, -1]),
    )


def _in_chains(
    target: TargetView,
    prompts: Int[Tensor, "batch seq"],
    mask: Int[Tensor, "batch seq"],
    text: Int[Tensor, "batch steps"],
    wrong: Int[Tensor, "batch wrong"],
) -> Float[Tensor, "batch positions vocab"]:
    reader = ChainReader.of_prompt(target, mask)
    found, at = [reader.prefill(prompts)], 0
    for num_kept, num_wrong in _ROUNDS:
        fed = torch.cat([text[:, at : at + num_kept], wrong[:, -num_wrong:]], dim=1)
        found.append(reader.feed(fed)[:, :num_kept])
        reader.keep(num_kept)
        at += num_kept
    return torch.cat([*found, reader.feed(text[:, at:])], dim=1)
