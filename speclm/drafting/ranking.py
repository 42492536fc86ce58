"""Ranks draft candidates by the probability that the target will choose them, given its noise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from speclm.acceptance.accepted import Accepted
from speclm.drafting.adjusting import Nodes, ScoreAdjuster
from speclm.drafting.interface import Prefill
from speclm.drafting.mixture import Mixture, MixtureEstimator
from speclm.sampling.chooser import Truncation
from speclm.sampling.noise import PositionNoise
from speclm.tree.dynamic import GrownRow

_NUM_SORTED = 64  # more than the 50 that Transformers keeps by default


def rank_log_probs(
    logits: Float[Tensor, "batch nodes vocab"],
    *,
    temperature: float,
    noise: Float[Tensor, "batch vocab"] | None,
    mixture: Mixture | None = None,
) -> Float[Tensor, "batch nodes vocab"]:
    """Return log-probabilities by which candidates are ranked and scored.

    Greedy decoding ranks by the draft's own distribution q. A sampling target takes
    ``argmax(target_probs / E)`` with noise E that is known already, so the draft's best guess is
    ``argmax(q / E)`` where q resembles the target, and ``argmax(q)`` where the target is nearly
    certain. The mixture of both distributions is close to the better one in either case.

    Args:
        logits: The draft's logits.
        temperature: The target's; ignored when greedy.
        noise: Exponential noise of the position that is decided; None when greedy.
        mixture: Numbers of the mixture; None for those that estimates start at.

    Source: Daliri, Musco, Suresh 2024 (coupling without communication by shared noise).
    """
    if noise is None:
        return logits.float().log_softmax(-1)
    log_q = (logits.float() / temperature).log_softmax(-1)
    return mixture_log_probs(log_q, noise[:, None, :], Mixture() if mixture is None else mixture)


def mixture_log_probs(
    log_probs: Float[Tensor, "*rows vocab"], noise: Float[Tensor, "*#rows vocab"], mixture: Mixture
) -> Float[Tensor, "*rows vocab"]:
    """Return the logarithms of ``w softmax(a log q - b log E) + (1 - w) softmax(a0 log q)``.

    Args:
        log_probs: The draft's distribution q at the target's temperature.
        noise: Exponential noise E of the position that is decided.
        mixture: The numbers.
    """
    key = torch.add(mixture.draft_exponent * log_probs, noise.log(), alpha=-mixture.noise_exponent)
    plain = (mixture.plain_exponent * log_probs).softmax(-1)
    return torch.lerp(plain, key.softmax(-1), mixture.weight).log()


def truncate(
    log_probs: Float[Tensor, "batch nodes columns"], truncation: Truncation
) -> Float[Tensor, "batch nodes columns"]:
    """Leave out what truncation of the draft's distribution would: the target can hardly take it.

    Only the best tokens are sorted. Where the cut is not among them, nothing is left out.

    Args:
        log_probs: The draft's distribution at the target's temperature.
        truncation: The target's.

    Returns:
        The same log-probabilities, not normalised anew, and minus infinity where a token is cut.
    """
    best = log_probs.topk(min(_NUM_SORTED, log_probs.shape[-1]), dim=-1).values
    floor = torch.full_like(best[..., :1], -torch.inf)
    total = torch.ones_like(floor)
    if truncation.top_k is not None and truncation.top_k <= best.shape[-1]:
        floor = best[..., truncation.top_k - 1, None]
        total = best[..., : truncation.top_k].exp().sum(-1, keepdim=True)
    if truncation.top_p is not None:
        probabilities = best.exp()
        is_kept = probabilities.cumsum(-1) - probabilities < truncation.top_p * total
        least = best.masked_fill(~is_kept, torch.inf).amin(-1, keepdim=True)
        floor = torch.where(is_kept[..., -1:], floor, least.maximum(floor))
    if truncation.min_p is not None:
        floor = floor.maximum(best[..., :1] + math.log(max(truncation.min_p, 1e-30)))
    floor = floor.minimum(best[..., :1])  # a top_p of 0 keeps the likeliest token too
    return log_probs.masked_fill(log_probs < floor, -torch.inf)


@dataclass(frozen=True, slots=True, eq=False)
class _Level:
    """What the candidates of one depth were ranked by.

    Args:
        log_probs: The draft's distribution after every node that was expanded.
        noise: Noise of the position, in the same columns.
        columns: Token of each column; None where they are the vocabulary.
    """

    log_probs: Float[Tensor, "batch nodes columns"]
    noise: Float[Tensor, "batch columns"]
    columns: Int[Tensor, " columns"] | None


class LevelRanking:
    """Ranks the candidates of a draft a level at a time, and learns from where paths went.

    It belongs to a proposer and outlives its generations. What it has learned changes which
    tokens are drafted, and never which are emitted.
    """

    def __init__(self, mixture: Mixture | None = None, *, vocab_size: int | None = None) -> None:
        """Start without any knowledge.

        Args:
            mixture: Fixed numbers to rank by; None to estimate them from what targets choose.
            vocab_size: Width of the target's logits, where the draft's vocabulary is smaller.
        """
        self._adjuster = ScoreAdjuster(vocab_size)
        self.estimator = MixtureEstimator(start=mixture, is_fixed=mixture is not None)
        self._temperature = 0.0
        self._truncation: Truncation | None = None
        self._levels: list[_Level] = []

    def begin(self, prompt: Prefill) -> None:
        """Start a generation."""
        self._temperature, self._levels = prompt.temperature, []
        self._adjuster.begin(prompt)
        chooser = prompt.chooser
        processors = None if chooser is None else chooser.key
        self._truncation = None if chooser is None else chooser.truncation
        self.estimator.begin((prompt.temperature, processors))

    @property
    def changes_scores(self) -> bool:
        """Whether processors of the target change the scores of a draft, each level its own way."""
        return self._adjuster.is_needed

    def rank(
        self,
        logits: Float[Tensor, "batch nodes columns"],
        *,
        depth: int,
        noise: PositionNoise | None,
        columns: Int[Tensor, " columns"] | None = None,
        nodes: Nodes | None = None,
    ) -> Float[Tensor, "batch nodes columns"]:
        """Return log-probabilities of the children of the nodes of one depth.

        The target's own logits processors are applied first, as far as they are known.

        Args:
            logits: The draft's, after every node that is expanded at that depth; kept until the
                walk is known.
            depth: Depth of the nodes; levels come in order.
            noise: Noise of the positions; None when the target decodes greedily.
            columns: Token of each column, where the draft's vocabulary is smaller.
            nodes: Tokens and parents of the nodes, from depth 1 on; None where the draft does not
                depend on them.
        """
        logits = self._adjuster.adjust(logits, depth=depth, nodes=nodes, columns=columns)
        if noise is None:
            return rank_log_probs(logits, temperature=0.0, noise=None)
        if depth == 0:
            self._levels = []
        level_noise = noise.at_depth(depth)
        if columns is not None:
            level_noise = level_noise[:, columns]
        if level_noise.dtype != torch.float32:  # that of half precision may be 0
            level_noise = level_noise.float().clamp_(min=torch.finfo(torch.float32).tiny)
        log_q = (logits.float() / self._temperature).log_softmax(-1)
        if self._truncation is not None:
            log_q = truncate(log_q, self._truncation)
        self._levels.append(_Level(log_q, level_noise, columns))
        return mixture_log_probs(log_q, level_noise[:, None], self.estimator.at(depth))

    def learn(
        self, accepted: Accepted, expansions: Sequence[Sequence[tuple[int, int] | None]]
    ) -> None:
        """Tell the estimate what was chosen after the nodes of a walk.

        Args:
            accepted: What the round decided.
            expansions: For each row and each node of its path, the root left out, the level and
                the place at which it was expanded; None where it was not.
        """
        self._adjuster.extend(accepted.emitted)
        levels, self._levels = self._levels, []
        if not levels or not self.estimator.wants_round():
            return
        visits: list[list[tuple[int, int, int]]] = [[] for _ in levels]  # row, place, token
        for row, emitted in enumerate(accepted.emitted):
            places = [(0, 0), *((p and (p[0] + 1, p[1])) for p in expansions[row])]
            for place, token in zip(places, emitted, strict=False):
                if place is not None and place[0] < len(levels):
                    visits[place[0]].append((row, place[1], token))
        for depth, (level, visited) in enumerate(zip(levels, visits, strict=True)):
            if visited:
                rows, places, tokens = torch.tensor(
                    visited, device=level.noise.device, dtype=torch.long
                ).T
                self.estimator.observe(
                    level.log_probs[rows, places],
                    level.noise[rows],
                    tokens if level.columns is None else _columns_of(tokens, level.columns),
                    depth=depth,
                )
        self.estimator.end_round()


def chain_expansions(accepted: Accepted) -> list[list[tuple[int, int] | None]]:
    """Return the `expansions` of `LevelRanking.learn` where each depth has one distribution."""
    return [[(depth, 0) for depth in range(len(path) - 1)] for path in accepted.paths]


def path_expansions(
    accepted: Accepted, grown: Sequence[GrownRow]
) -> list[list[tuple[int, int] | None]]:
    """Return the `expansions` of `LevelRanking.learn` where a tree was grown for each row."""
    return [
        [grown[row].expansions[node - 1] for node in path[1:]]
        for row, path in enumerate(accepted.paths)
    ]


def _columns_of(
    tokens: Int[Tensor, " rows"], columns: Int[Tensor, " columns"]
) -> Int[Tensor, " rows"]:
    """Return the column of each token, -1 where it has none."""
    matches = tokens[:, None] == columns
    return torch.where(matches.any(1), matches.int().argmax(1), -1)
