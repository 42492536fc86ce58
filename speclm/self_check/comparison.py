"""Compare the logits of trees and chains with those of regular generation."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import MaxLengthCriteria, StoppingCriteriaList
from typing_extensions import override

from speclm.self_check.fingerprint import changes
from speclm.self_check.verdict import (
    Evidence,
    SelfCheck,
    Verification,
    distinct_tokens,
    judge,
    relative_difference,
)
from speclm.target import ChainReader, TargetView, prompt_inputs
from speclm.tree.topology import chain, from_parents

NUM_LATER_STEPS = 24
"""Compared steps of a model with foreign code, which may act only after some tokens."""

_PROMPT_LENGTHS = (5, 3)
_ROUNDS = ((1, 1), (2, 1))  # kept and dropped tokens of each chain
_LATER_CHAIN = 3
_NUM_STEPS = sum(num_kept for num_kept, _ in _ROUNDS) + 1


def check_chains(target: TargetView) -> SelfCheck:
    """Compare partly kept chains with regular generation, over two padded rows.

    A model may compute something else in a step than in a forward over the whole text, and the
    output must be that of steps. Costs nine forwards of fewer than 13 tokens, and `NUM_LATER_STEPS`
    more for a model with foreign code. The model must be in evaluation mode.

    Returns:
        A verdict for chains or for regular generation.
    """
    check = judge(target, Verification.CHAINS, partial(_measure, _chain_rounds, _later_chains))
    limits = _step_limits(target)
    if check.verification is Verification.CHAINS and limits is not None:
        reason = (
            f"time steps are bounded to {limits} only in chains and not in single steps, which "
            "the self-check's few tokens may not show"
        )
        return replace(check, verification=Verification.REGULAR, reason=reason)
    return check


def _step_limits(target: TargetView) -> tuple[float, float] | None:
    """Return the bounds of a recurrence's time steps, if there are any."""
    for module in target.model.modules():
        limits = getattr(module, "time_step_limit", None)
        if isinstance(limits, tuple | list) and (limits[0] > 0.0 or limits[1] < math.inf):
            return float(limits[0]), float(limits[1])
    return None


@torch.no_grad()
def _measure(
    rounds: Callable[[TargetView], Evidence],
    later_steps: Callable[[TargetView], float],
    target: TargetView,
) -> Evidence:
    """Measure rounds, and later steps of a model with foreign code."""
    evidence = rounds(target)
    if not changes(target.model):
        return evidence
    return replace(evidence, error=max(evidence.error, later_steps(target)))


def _later_chains(target: TargetView) -> float:
    """Return the error of fully kept chains after several steps of regular generation."""
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


def _chain_rounds(target: TargetView) -> Evidence:
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


_PARENTS = [0, 0, 0, 1]
_TREE_PROMPT_LENGTHS = (4, 3)
_PATHS = (((0, 2), (0, 1, 3)), ((0, 1, 3), (0, 2)))
"""For each row the kept nodes of the first tree, and the compared nodes of the second. One row is
padded, the other has a gap before the second tree; neither keeps a prefix of the slots. The second
row is one token shorter, so its last position is the last but one of the first row."""


def check_trees(target: TargetView) -> SelfCheck:
    """Compare two tiny trees over two ragged, padded rows with regular generation.

    The first tree is read along with the prompt. The second follows a kept path that is not a
    prefix of the slots, which covers positions, masks and rollback. Costs six forwards of at most
    16 tokens, and `NUM_LATER_STEPS` more for a model with foreign code. The model must be in
    evaluation mode.

    Returns:
        A verdict for trees or for regular generation.
    """
    obstacle = target.tree_obstacle()
    if obstacle is not None:  # which tiny trees may not show
        return SelfCheck(Verification.REGULAR, obstacle)
    return judge(target, Verification.TREES, partial(_measure, _tree_rounds, _later_nodes))


def _tree_rounds(target: TargetView) -> Evidence:
    device, longest = target.device, max(_TREE_PROMPT_LENGTHS)
    batch, topology = len(_TREE_PROMPT_LENGTHS), from_parents([_PARENTS], device=device)
    nodes = topology.num_nodes
    tokens = distinct_tokens(target, batch * (longest + 2 * nodes)).view(batch, -1)
    prompts, first = tokens[:, :longest], tokens[:, longest : longest + nodes]
    second = tokens[:, longest + nodes :]
    second[1, 2] = second[0, 1]  # at the same position, after other tokens
    padding = torch.tensor(
        [longest - length for length in _TREE_PROMPT_LENGTHS], device=device, dtype=torch.long
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
        # Without padding models get no mask, and some then compute something else.
        wanted.append(_generated(target, torch.cat(parts), num_padding=row, num_steps=1))
    return Evidence(
        error=relative_difference(torch.cat(found), torch.cat(wanted)),
        effect=relative_difference(wanted[0][-2:-1], wanted[1][-1:]),
    )


def _later_nodes(target: TargetView) -> float:
    """Return the error of a chain of nodes after several steps of regular generation."""
    text = distinct_tokens(target, NUM_LATER_STEPS + _TREE_PROMPT_LENGTHS[0])
    wanted = _generated(target, text, num_padding=0, num_steps=NUM_LATER_STEPS)
    prompt, nodes = text[None, : -NUM_LATER_STEPS - 1], text[None, -NUM_LATER_STEPS - 1 :]
    cache = target.new_cache(text.new_zeros(1))
    topology = chain(NUM_LATER_STEPS, device=target.device)
    found = target.forward_tree(nodes, topology, cache, prompt=prompt)
    return relative_difference(found[0], wanted)


def _generated(
    target: TargetView, text: Int[Tensor, " seq"], *, num_padding: int, num_steps: int
) -> Float[Tensor, "positions vocab"]:
    """Return the logits of regular generation of the last tokens of a text."""
    prompt = torch.cat([text.new_zeros(num_padding), text[:-num_steps]])[None]
    mask = torch.ones_like(prompt)
    mask[:, :num_padding] = 0
    return regular_logits(target, prompt, mask, text[None, -num_steps:])[0]


class _ForcedTokens(LogitsProcessor):
    """Force the tokens of a given text."""

    def __init__(self, text: Int[Tensor, "batch steps"], *, start: int) -> None:
        """Force `text` after prompts of length `start`."""
        self._text, self._start = text, start

    @override
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = min(input_ids.shape[1] - self._start, self._text.shape[1] - 1)
        forced = torch.full_like(scores, -math.inf)
        return forced.scatter_(1, self._text[:, step, None], 0.0)


def regular_logits(
    target: TargetView,
    prompts: Int[Tensor, "batch seq"],
    mask: Int[Tensor, "batch seq"],
    text: Int[Tensor, "batch steps"],
) -> Float[Tensor, "batch positions vocab"]:
    """Return the logits of the model's own decoding loop while it generates a given text.

    The loop is that of Transformers. It runs everything that is called once per step: methods that
    the class or the model object overrides, and hooks that only act on single tokens.

    Args:
        target: The model, in evaluation mode.
        prompts: Tokens, padded on the left.
        mask: 1 for tokens, 0 for padding.
        text: Tokens that are generated after the prompts.

    Returns:
        Logits after the prompts and after each token of the text, in float32. Each of these
        positions costs a forward.
    """
    start, steps = prompts.shape[1], text.shape[1]
    config = cast("Any", GenerationConfig)(return_dict_in_generate=True, output_logits=True)
    config._pad_token_tensor = None  # as `generate` resolves it; nothing ends early
    output = cast("Any", GenerationMixin)._sample(
        target.model,
        prompts,
        logits_processor=LogitsProcessorList([_ForcedTokens(text, start=start)]),
        stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(start + steps + 1)]),
        generation_config=config,
        **prompt_inputs(target, mask),
    )
    return torch.stack(output.logits, dim=1)
