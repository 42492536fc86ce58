"""Explain where an output differs from that of regular generation."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from speclm.bench.decoders import Call
from speclm.sampling.noise import PositionNoise
from speclm.self_check.check import check_model
from speclm.self_check.verdict import Verification
from speclm.target import TargetView
from speclm.target.chain_session import ChainReader
from speclm.tree.topology import chain

MAX_GAP_PER_DIFFERENCE = 4.0
"""Rounding moves two scores; a gap beyond twice their sum means a mistake."""

_TREE_SIZES = (2, 4, 8, 16)
"""Numbers of nodes of the forwards whose logits are compared. Several are tried, because the size
that caused a divergence is not known, and in bfloat16 a single size may round as one token does."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first position at which a row differs from regular generation.

    Args:
        call: Index of the call.
        row: Row of its batch.
        position: Index of the new token.
        plain_token: Regular generation's token; -1 when its row has ended.
        token: The other token; -1 when that row has ended.
        gap: Difference in score between the winner and the token that was emitted instead. A
            score is a logit or, when sampling, log-probability minus log-noise.
        logit_difference: Largest difference at that position between the logits of one-token
            forwards and of forwards over 2, 4, 8 or 16 nodes.
    """

    call: int
    row: int
    position: int
    plain_token: int
    token: int
    gap: float
    logit_difference: float

    @property
    def is_explained(self) -> bool:
        """Whether rounding can account for the difference."""
        return self.gap <= MAX_GAP_PER_DIFFERENCE * self.logit_difference


def first_difference(plain: list[int], other: list[int]) -> int | None:
    """Return the first position at which two rows differ; None when they are equal."""
    if plain == other:
        return None
    pairs = enumerate(zip(plain, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(plain), len(other)))


@torch.no_grad()
def explain(
    base: PreTrainedModel,
    call: Call,
    *,
    index: int,
    plain: list[list[int]],
    other: list[list[int]],
) -> list[Divergence]:
    """Return the first divergence of each row that has one, and how much rounding matters there.

    Args:
        base: The model.
        call: The call.
        index: Index of the call, for the report.
        plain: New tokens of each row by regular generation.
        other: New tokens of each row by the method.
    """
    found: list[Divergence] = []
    for row, (expected, emitted) in enumerate(zip(plain, other, strict=True)):
        position = first_difference(expected, emitted)
        if position is None:
            continue
        plain_token, token = (
            tokens[position] if position < len(tokens) else -1 for tokens in (expected, emitted)
        )
        one, *many = (
            _process(base, call, logits)
            for logits in _logits_by_size(base, call, row, expected[:position])
        )
        difference = max(_largest_difference(one, other) for other in many)
        scores = one if not call.is_sampled else one - _log_noise(base, call, row, position)
        rivals = [float(scores[t]) if t >= 0 else -float("inf") for t in (plain_token, token)]
        gap = float(scores.max()) - min(rivals)
        found.append(Divergence(index, row, position, plain_token, token, gap, difference))
    return found


def _largest_difference(one: Float[Tensor, " vocab"], other: Float[Tensor, " vocab"]) -> float:
    both = one.isfinite() & other.isfinite()
    return float((one - other)[both].abs().max())


def _logits_by_size(
    base: PreTrainedModel, call: Call, row: int, decoded: list[int]
) -> Iterator[Float[Tensor, " vocab"]]:
    """Yield the logits after `decoded`, fed token by token and then in drafts of each size.

    The row is repeated to the batch size of the call, because rounding depends on it.
    """
    batch = call.input_ids.shape[0]
    prompt = call.input_ids[row][call.attention_mask[row].bool()].expand(batch, -1)
    tokens = torch.tensor(decoded, dtype=torch.long, device=prompt.device).expand(batch, -1)
    yield _logits_in_chains(base, prompt, tokens, num_nodes=1).float()
    takes_trees = check_model(TargetView(base)).verification is Verification.TREES
    verified = _logits_in_trees if takes_trees else _logits_in_chains
    for num_nodes in _TREE_SIZES:
        yield verified(base, prompt, tokens, num_nodes=num_nodes).float()


def _logits_in_chains(
    base: PreTrainedModel,
    prompt: Int[Tensor, "batch prompt"],
    tokens: Int[Tensor, "batch seq"],
    *,
    num_nodes: int,
) -> Float[Tensor, " vocab"]:
    """Return the logits after a prompt and tokens fed in chains; of length 1 as in `generate`."""
    reader = ChainReader.of_prompt(TargetView(base), torch.ones_like(prompt))
    found = reader.prefill(prompt)[0, -1]
    for first in range(0, tokens.shape[1], num_nodes):
        nodes = tokens[:, first : first + num_nodes]
        num_real = nodes.shape[1]
        padding = nodes[:, -1:].expand(-1, num_nodes - num_real)
        logits = reader.feed(torch.cat([nodes, padding], dim=1))
        reader.keep(num_real)
        found = logits[0, num_real - 1]
    return found


def _logits_in_trees(
    base: PreTrainedModel,
    prompt: Int[Tensor, "batch prompt"],
    tokens: Int[Tensor, "batch seq"],
    *,
    num_nodes: int,
) -> Float[Tensor, " vocab"]:
    """Return the logits after a prompt and tokens fed in trees of one size."""
    view = TargetView(base)
    batch = len(prompt)
    cache = view.new_cache(torch.zeros(batch, dtype=torch.long, device=prompt.device))
    found = view.prefill(prompt, cache)[0]
    for first in range(0, tokens.shape[1], num_nodes):
        nodes = tokens[:, first : first + num_nodes]
        num_real = nodes.shape[1]
        padding = nodes[:, -1:].expand(-1, num_nodes - num_real)
        topology = chain(num_nodes - 1, device=prompt.device)
        logits = view.forward_tree(torch.cat([nodes, padding], dim=1), topology, cache)
        cache.keep([list(range(num_real))] * batch)
        found = logits[0, num_real - 1]
    return found


def _process(
    base: PreTrainedModel, call: Call, logits: Float[Tensor, " vocab"]
) -> Float[Tensor, " vocab"]:
    """Apply the processors that ``generate`` resolves the call to."""
    resolved: list[Any] = []

    def capture(
        _model: object, input_ids: Tensor, logits_processor: list[Any], *_: Any, **__: Any
    ) -> Tensor:
        resolved.extend(logits_processor)
        return input_ids

    base.generate(**call.arguments, custom_generate=capture)  # type: ignore[operator]  # mixin
    scores = logits[None]
    for processor in resolved:
        scores = processor(call.input_ids[:1], scores)
    return scores[0].log_softmax(-1) if call.is_sampled else scores[0]


def _log_noise(
    base: PreTrainedModel, call: Call, row: int, position: int
) -> Float[Tensor, " vocab"]:
    """Return the noise that decided the position."""
    torch.manual_seed(call.seed)
    noise = PositionNoise(
        batch=call.input_ids.shape[0],
        vocab_size=TargetView(base).vocab_size,
        device=call.input_ids.device,
    )
    return noise.row(row, position).log()
