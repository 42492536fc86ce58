"""Rank draft candidates by the probability that the target will choose them."""

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.generation import logits_process as processors

from speclm.acceptance import Accepted
from speclm.devices import upload
from speclm.drafting.interface import Prefill
from speclm.drafting.mixture import Mixture, MixtureEstimator
from speclm.sampling.chooser import (
    LENGTH_DEPENDENT,
    TokenChooser,
    Truncation,
    first_text_dependent,
)
from speclm.sampling.noise import PositionNoise
from speclm.tree.dynamic import GrownRows

_NUM_SORTED = 64  # more than the 50 that Transformers keeps by default

_SINGLE_TOKENS = LENGTH_DEPENDENT | {processors.SuppressTokensLogitsProcessor}
_BIASES = {processors.SequenceBiasLogitsProcessor, processors.NoBadWordsLogitsProcessor}
_OCCURRENCES = {processors.RepetitionPenaltyLogitsProcessor}
_ORDER = {processors.NoRepeatNGramLogitsProcessor}
_KNOWN = _SINGLE_TOKENS | _BIASES | _OCCURRENCES | _ORDER
"""Stateless processors that cost little compared to a forward, by exact class. Warpers are not
listed, because temperature and truncation are part of the ranking."""

Nodes = tuple[Int[Tensor, "batch nodes"], Int[Tensor, "batch nodes"]]
"""Token of each node, and the index of its parent among the nodes of the level before."""


def mixture_log_probs(
    log_probs: Float[Tensor, "*rows vocab"], noise: Float[Tensor, "*#rows vocab"], mixture: Mixture
) -> Float[Tensor, "*rows vocab"]:
    """Return the log-probabilities by which candidates of a sampling target are ranked.

    The target takes ``argmax(target_probs / E)``, and the noise E is already known. The best
    candidate is therefore ``argmax(q / E)`` if the draft's distribution q resembles the target's,
    and ``argmax(q)`` if the target is nearly certain. The mixture of both, given by `Mixture`, is
    close to the better one in either case.

    Args:
        log_probs: The draft's distribution q at the target's temperature.
        noise: Exponential noise E of the position that is decided.
        mixture: The parameters.

    Source: Daliri, Musco, Suresh 2024 (coupling without communication by shared noise).
    """
    key = torch.add(mixture.draft_exponent * log_probs, noise.log(), alpha=-mixture.noise_exponent)
    plain = (mixture.plain_exponent * log_probs).softmax(-1)
    return torch.lerp(plain, key.softmax(-1), mixture.weight).log()


def truncate(
    log_probs: Float[Tensor, "batch nodes columns"], truncation: Truncation
) -> Float[Tensor, "batch nodes columns"]:
    """Truncate the draft's distribution as the target truncates its own.

    Only the best tokens are sorted. If the cutoff is not among them, no token is cut.

    Args:
        log_probs: The draft's distribution at the target's temperature.
        truncation: The target's truncation.

    Returns:
        The log-probabilities, not renormalised, with minus infinity at tokens that are cut.
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
    floor = floor.minimum(best[..., :1])  # a top_p of 0 keeps one token too
    return log_probs.masked_fill(log_probs < floor, -torch.inf)


@dataclass(frozen=True, slots=True, eq=False)
class _RankedLevel:
    """The values by which the candidates of one depth were ranked.

    Args:
        log_probs: The draft's distribution after every expanded node.
        noise: Noise of the position, in the same columns.
        columns: Token of each column; None if the columns are the vocabulary.
    """

    log_probs: Float[Tensor, "batch nodes columns"]
    noise: Float[Tensor, "batch columns"]
    columns: Int[Tensor, " columns"] | None


class LevelRanking:
    """Ranks the candidates of a draft level by level, and learns from what the target chose.

    A proposer keeps it between generations. What it learns changes which tokens are drafted,
    never which are emitted.
    """

    def __init__(self, mixture: Mixture | None = None, *, vocab_size: int | None = None) -> None:
        """Start without observations.

        Args:
            mixture: Fixed parameters; None estimates them from what targets choose.
            vocab_size: Width of the target's logits, if the draft's vocabulary is smaller.
        """
        self._adjuster = ScoreAdjuster(vocab_size)
        self.estimator = MixtureEstimator(start=mixture, is_fixed=mixture is not None)
        self._temperature = 0.0
        self._truncation: Truncation | None = None
        self._levels: list[_RankedLevel] = []

    def begin(self, prompt: Prefill) -> None:
        """Start a generation."""
        self._temperature, self._levels = prompt.temperature, []
        self._adjuster.begin(prompt)
        chooser = prompt.chooser
        setting = None if chooser is None else chooser.key
        self._truncation = None if chooser is None else chooser.truncation
        self.estimator.begin((prompt.temperature, setting))

    @property
    def changes_scores(self) -> bool:
        """Whether processors of the target change the scores of a draft."""
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

        The target's known logits processors are applied first.

        Args:
            logits: The draft's logits after every node expanded at that depth; kept until `learn`.
            depth: Depth of the nodes; levels come in order.
            noise: Noise of the positions; None if the target decodes greedily.
            columns: Token of each column, if the draft's vocabulary is smaller.
            nodes: Tokens and parents of the nodes, from depth 1 on; None if the draft does not
                depend on them.
        """
        logits = self._adjuster.adjust(logits, depth=depth, nodes=nodes, columns=columns)
        if noise is None:
            return logits.float().log_softmax(-1)
        if depth == 0:
            self._levels = []
        level_noise = noise.at_depth(depth)
        if columns is not None:
            level_noise = level_noise[:, columns]
        if level_noise.dtype != torch.float32:  # half-precision noise may be 0
            level_noise = level_noise.float().clamp_(min=torch.finfo(torch.float32).tiny)
        log_q = (logits.float() / self._temperature).log_softmax(-1)
        if self._truncation is not None:
            log_q = truncate(log_q, self._truncation)
        self._levels.append(_RankedLevel(log_q, level_noise, columns))
        return mixture_log_probs(log_q, level_noise[:, None], self.estimator.at(depth))

    def order(
        self,
        logits: Float[Tensor, "batch nodes columns"],
        *,
        depth: int,
        noise: PositionNoise | None,
        nodes: Nodes | None = None,
    ) -> Float[Tensor, "batch nodes columns"]:
        """Return scores in the order of `rank`, without its sums if it needs none of them."""
        if noise is None:
            return self._adjuster.adjust(logits, depth=depth, nodes=nodes, columns=None)
        return self.rank(logits, depth=depth, noise=noise, nodes=nodes)

    def learn(
        self, accepted: Accepted, expansions: Sequence[Sequence[tuple[int, int] | None]]
    ) -> None:
        """Update the estimate with the tokens that the target chose along the accepted path.

        Args:
            accepted: Result of the round.
            expansions: For each row and each node of its path but the root, the level at which it
                was expanded and its index there; None if it was not expanded.
        """
        self._adjuster.extend(accepted.emitted)
        levels, self._levels = self._levels, []
        if not levels or not self.estimator.wants_round():
            return
        visits: list[list[tuple[int, int, int]]] = [[] for _ in levels]  # row, index, token
        for row, emitted in enumerate(accepted.emitted):
            expanded = [(0, 0), *(at and (at[0] + 1, at[1]) for at in expansions[row])]
            for at, token in zip(expanded, emitted, strict=False):
                if at is not None and at[0] < len(levels):
                    visits[at[0]].append((row, at[1], token))
        for depth, (level, visited) in enumerate(zip(levels, visits, strict=True)):
            if visited:
                rows, indices, tokens = upload(visited, level.noise.device).T
                self.estimator.observe(
                    level.log_probs[rows, indices],
                    level.noise[rows],
                    tokens if level.columns is None else _columns_of(tokens, level.columns),
                    depth=depth,
                )
        self.estimator.end_round()


def chain_expansions(accepted: Accepted) -> list[list[tuple[int, int] | None]]:
    """Return the `expansions` for `LevelRanking.learn` if each depth has one distribution."""
    return [[(depth, 0) for depth in range(len(path) - 1)] for path in accepted.paths]


def path_expansions(accepted: Accepted, grown: GrownRows) -> list[list[tuple[int, int] | None]]:
    """Return the `expansions` for `LevelRanking.learn` if each row has a grown tree."""
    return [
        [grown[row].expansions[node - 1] for node in path[1:]]
        for row, path in enumerate(accepted.paths)
    ]


def _columns_of(
    tokens: Int[Tensor, " rows"], columns: Int[Tensor, " columns"]
) -> Int[Tensor, " rows"]:
    """Return the column of each token; -1 if it has none."""
    matches = tokens[:, None] == columns
    return torch.where(matches.any(1), matches.int().argmax(1), -1)


class ScoreAdjuster:
    """Applies the target's logits processors to the scores of a draft.

    It follows the text of every row. Processors of unknown classes are not applied; the scores
    only decide what is drafted.
    """

    def __init__(self, vocab_size: int | None = None) -> None:
        """Store the width of the target's logits, if the draft's vocabulary is smaller."""
        self._vocab_size = vocab_size
        self._processors: list[processors.LogitsProcessor] = []
        self._counter: TokenChooser | None = None  # if only lengths are read
        self._lengths: list[int] = []
        self._text: Int[Tensor, "batch length"] | None = None
        self._paths: Int[Tensor, "batch nodes depth"] | None = None

    @property
    def is_needed(self) -> bool:
        """Whether any processor is applied."""
        return bool(self._processors)

    def begin(self, prompt: Prefill) -> None:
        """Start a generation."""
        found = [] if prompt.chooser is None else prompt.chooser.processors
        self._processors = [p for p in found if type(p) in _KNOWN]
        is_text_free = first_text_dependent(self._processors) is None
        self._counter = TokenChooser(self._processors, is_greedy=True) if is_text_free else None
        self._lengths = [prompt.tokens.shape[1] + 1] * len(prompt.first_tokens)
        self._text = None
        if not is_text_free:
            self._text = torch.cat([prompt.tokens, prompt.first_tokens[:, None]], dim=1)

    def extend(self, emitted: list[list[int]]) -> None:
        """Append the tokens that every row emitted in a round."""
        self._lengths = [
            length + len(new) for length, new in zip(self._lengths, emitted, strict=True)
        ]
        if self._text is not None:
            # Processors that read text make rows advance in lockstep; ended rows do not matter.
            width = max(map(len, emitted))
            padded = [new + [0] * (width - len(new)) for new in emitted]
            self._text = torch.cat([self._text, upload(padded, self._text.device)], dim=1)

    def adjust(
        self,
        logits: Float[Tensor, "batch nodes columns"],
        *,
        depth: int,
        nodes: Nodes | None,
        columns: Int[Tensor, " columns"] | None,
    ) -> Float[Tensor, "batch nodes columns"]:
        """Return the logits after the target's processors.

        Args:
            logits: The draft's logits after every node of one depth.
            depth: Depth of the nodes; levels come in order.
            nodes: The nodes; None for the root, and if the draft does not depend on the tokens
                in between. Processors that read the order of tokens are then not applied.
            columns: Token of each column; None if the columns are the vocabulary.
        """
        if not self._processors:
            return logits
        scores = logits.float()
        if columns is not None:
            assert self._vocab_size is not None, "columns of a vocabulary whose size is unknown"
            full = scores.new_full((*scores.shape[:2], self._vocab_size), -torch.inf)
            scores = full.index_copy_(2, columns, scores)
        flat = scores.flatten(0, 1)
        if self._counter is not None:
            lengths = [length + depth for length in self._lengths for _ in range(scores.shape[1])]
            flat = self._counter.process(flat, lengths)
        else:
            text, is_known = self._text_at(depth, nodes, num_nodes=scores.shape[1])
            for processor in self._processors:
                if is_known or type(processor) not in _ORDER | _BIASES:
                    flat = _for_nodes(processor, scores.shape[1])(text, flat)
        adjusted = flat.view_as(scores)
        return adjusted if columns is None else adjusted[..., columns]

    def _text_at(
        self, depth: int, nodes: Nodes | None, *, num_nodes: int
    ) -> tuple[Int[Tensor, "rows length"], bool]:
        """Return the text up to each node, and whether its tokens after the root are known."""
        assert self._text is not None
        batch = len(self._text)
        if depth == 0:
            self._paths = self._text.new_empty(batch, num_nodes, 0)
        elif nodes is not None and self._paths is not None:
            tokens, parents = nodes
            before = self._paths.gather(1, parents[:, :, None].expand(-1, -1, depth - 1))
            self._paths = torch.cat([before, tokens[:, :, None]], dim=2)
        else:
            self._paths = None
        paths = self._paths
        if paths is None:
            paths = self._text[:, -1:, None].expand(-1, num_nodes, depth)
        text = self._text[:, None].expand(-1, num_nodes, -1)
        joined = torch.cat([text, paths], dim=2).flatten(0, 1)
        return joined, self._paths is not None


def _for_nodes(processor: processors.LogitsProcessor, num_nodes: int) -> processors.LogitsProcessor:
    """Return a processor of one text a row as one of `num_nodes` texts a row."""
    ignored = vars(processor).get("prompt_ignore_length")  # padding of each row, of a penalty
    if num_nodes == 1 or not isinstance(ignored, Tensor):
        return processor
    changed = copy(processor)
    vars(changed)["prompt_ignore_length"] = ignored.repeat_interleave(num_nodes)
    return changed
