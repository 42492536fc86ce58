"""Draft chains with a language model that cannot read trees, such as a hybrid model."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from speclm.acceptance import Accepted
from speclm.config import (
    MAX_DEPTH,
    ProposerConfig,
    require_count,
    require_depth,
    require_in_range,
    require_known,
)
from speclm.devices import upload
from speclm.drafting.interface import Draft, Prefill, Proposer, TargetNeeds
from speclm.drafting.mixture import Mixture, require_mixture
from speclm.drafting.ranking import LevelRanking, chain_expansions
from speclm.methods.draft_model.proposer import SharedVocabulary
from speclm.sampling.draws import DraftSampler, DraftSampling
from speclm.sampling.noise import PositionNoise
from speclm.target import TargetView
from speclm.target.chain_session import ChainReader
from speclm.tree.plan import TreePlan
from speclm.tree.topology import chain


@dataclass(frozen=True, slots=True)
class ChainDraftConfig(ProposerConfig):
    """Settings of `ChainDraftProposer`.

    Args:
        depth: Maximum tokens of a chain; each costs one draft forward.
        num_draft_tokens: The same; the smaller of the two applies.
        min_confidence: A row stops when its chain is less likely than this.
        min_growing: Drafting stops when a smaller share of the rows still grows, because each
            further token costs the whole batch a forward.
        mixture: Parameters of the distribution that ranks candidates under sampling; None
            estimates them from what the target chooses.
    """

    depth: int = 16
    num_draft_tokens: int = 8
    min_confidence: float = 0.4
    min_growing: float = 0.75
    mixture: Mixture | None = None

    def __post_init__(self) -> None:
        require_depth("depth", self.depth)  # super() does not work in a slotted dataclass
        require_count("num_draft_tokens", self.num_draft_tokens, low=1, high=MAX_DEPTH)
        require_in_range("min_confidence", self.min_confidence, low=0.0, high=1.0)
        require_in_range("min_growing", self.min_growing, low=0.0, high=1.0)
        require_mixture(self.mixture)


class ChainDraftProposer(Proposer):
    """Drafts one chain per row with a model that is called as in regular generation.

    Recurrent and hybrid models need this, because their states cannot be kept per node of a tree.
    After a rejection the state is restored, and the accepted tokens are read again.
    """

    needs_lockstep = True
    draft_sampling = DraftSampling.WITHOUT_REPLACEMENT
    config: ChainDraftConfig

    def __init__(self, model: PreTrainedModel, *, target: PreTrainedModel, **options: Any) -> None:
        """Wrap a loaded draft model.

        Args:
            model: A causal language model with the target's vocabulary; either may have padded it
                further.
            target: The model that verifies.
            **options: Fields of `ChainDraftConfig`.

        Raises:
            VocabularyMismatchError: If the two vocabularies differ by more than padding.
            OptionError: If an option is unknown or out of range.
        """
        require_known(ChainDraftConfig, options, owner="ChainDraftProposer")
        self.config = ChainDraftConfig(**options)
        self.view = TargetView(model)
        wanted = TargetView(target)
        self._vocabulary = SharedVocabulary.of(self.view, wanted)
        self.needs = TargetNeeds(vocab_size=wanted.vocab_size)
        self._ranking = LevelRanking(self.config.mixture)
        self._prompt: Prefill | None = None
        self._reader: ChainReader | None = None
        self._unseen: Tensor | None = None
        self._length = 0
        self._num_fed = 0
        self._is_open = False  # whether a draft waits for verification
        self._is_idle: list[bool] = []

    @override
    def begin(self, prompt: Prefill) -> None:
        self._vocabulary = replace(self._vocabulary, num_draft=self.view.vocab_size)  # resized?
        self._prompt, self._reader = prompt, None  # read by the first draft, if any
        self._ranking.begin(prompt)
        self._unseen, self._length = prompt.first_tokens[:, None], prompt.tokens.shape[1] + 1
        self._is_open, self._is_idle = False, [False] * len(prompt.first_tokens)

    @override
    def propose(self, roots: Int[Tensor, " batch"], *, noise: PositionNoise | None) -> Draft:
        assert self._prompt is not None, "propose before begin"
        config = _planned(self.config, self.plan)
        longest = min(config.depth, config.num_draft_tokens)
        bound = self.view.max_positions
        if bound is not None and self._length + longest > bound:
            return Draft(roots[:, None], chain(0, device=roots.device), None)
        self._is_open, self._num_fed = True, 0
        logits = self._catch_up(self._prompt)
        if self._prompt.sampler is not None:
            return self._draw(roots, logits, self._prompt.sampler, longest=longest)
        ends = upload(sorted(self._prompt.eos_token_ids), roots.device)
        floor = math.log(max(config.min_confidence, 1e-30))
        scores = torch.zeros(len(roots), device=roots.device, dtype=torch.float32)
        node_probs = [[1.0] * len(roots)]  # [depth, batch]
        grows = upload([not idle for idle in self._is_idle], roots.device).bool()
        num_live, tokens = max(self._is_idle.count(False), 1), [roots]
        while True:
            nodes = (tokens[-1][:, None], torch.zeros_like(roots)[:, None])
            depth = len(tokens) - 1
            ranked = self._ranking.rank(logits, depth=depth, noise=noise, nodes=nodes)[:, 0]
            score, token = ranked.max(1)
            scores = scores + score
            tokens.append(token)
            grows = grows & (scores >= floor) & ~torch.isin(token, ends)
            # A sync: the host decides whether to continue.
            probs, growing = torch.stack([score.exp(), grows.to(score.dtype)]).tolist()
            node_probs.append(probs)
            share = sum(growing) / num_live
            if len(tokens) > longest or share < max(config.min_growing, 1e-6):
                break
            logits = self._feed(token)
        topology = chain(len(tokens) - 1, device=roots.device)
        by_row = [list(row) for row in zip(*node_probs, strict=True)]
        return Draft(torch.stack(tokens, dim=1), topology, by_row)

    @override
    def commit(self, accepted: Accepted) -> None:
        assert self._unseen is not None, "commit before begin"
        self._ranking.learn(accepted, chain_expansions(accepted))
        num_new = max(map(len, accepted.emitted))
        goes_on = [len(tokens) == num_new for tokens in accepted.emitted]  # other rows have ended
        self._is_idle = [not going for going in goes_on]
        # Rows that have ended may be fed any token.
        rows = [tokens + [0] * (num_new - len(tokens)) for tokens in accepted.emitted]
        new = upload(rows, self._unseen.device).view(len(rows), num_new)
        self._length += num_new
        if not self._is_open:
            self._unseen = torch.cat([self._unseen, new], dim=1)
            return
        assert self._reader is not None
        followed = [
            len(path) - 1 for path, going in zip(accepted.paths, goes_on, strict=True) if going
        ]
        num_kept = min(*followed, self._num_fed)
        self._reader.keep(num_kept)
        self._unseen, self._is_open = new[:, num_kept:], False

    def _catch_up(self, prompt: Prefill) -> Float[Tensor, "batch 1 vocab"]:
        """Read committed tokens and return the logits after them."""
        assert self._unseen is not None
        vocabulary, unseen = self._vocabulary, self._unseen
        if self._reader is None:
            tokens = torch.cat([prompt.tokens, unseen[:, :1]], dim=1)
            indices = torch.arange(tokens.shape[1], device=tokens.device)
            mask = (indices >= prompt.num_padding[:, None]).long()
            self._reader = ChainReader.of_prompt(self.view, mask)
            logits, unseen = self._reader.prefill(vocabulary.readable(tokens)), unseen[:, 1:]
            if unseen.shape[1] == 0:
                return vocabulary.fit(logits)
        logits = self._reader.feed(vocabulary.readable(unseen))[:, -1:]
        self._reader.keep(unseen.shape[1])
        return vocabulary.fit(logits)

    def _feed(self, token: Int[Tensor, " batch"]) -> Float[Tensor, "batch 1 vocab"]:
        assert self._reader is not None
        self._num_fed += 1
        fed = self._vocabulary.readable(token[:, None])
        return self._vocabulary.fit(self._reader.feed(fed))

    def _draw(
        self,
        roots: Int[Tensor, " batch"],
        logits: Float[Tensor, "batch 1 vocab"],
        sampler: DraftSampler,
        *,
        longest: int,
    ) -> Draft:
        """Draw every token of a chain of full length from its distribution."""
        tokens, distributions = [roots], []
        while True:
            distributions.append(sampler.distribution(logits))
            tokens.append(sampler.siblings(distributions[-1], num=1)[:, 0, 0])
            if len(tokens) > longest:
                break
            logits = self._feed(tokens[-1])
        distributions.append(torch.zeros_like(distributions[0]))  # of the leaf
        return Draft(
            torch.stack(tokens, dim=1),
            chain(len(tokens) - 1, device=roots.device),
            distributions=torch.cat(distributions, dim=1),
        )


@lru_cache(maxsize=64)
def _planned(config: ChainDraftConfig, plan: TreePlan | None) -> ChainDraftConfig:
    """Return the settings of the next drafts; a plan overrides those of the config."""
    if plan is None:
        return config
    confidence = config.min_confidence if plan.min_confidence is None else plan.min_confidence
    return replace(
        config,
        depth=plan.depth,
        num_draft_tokens=min(plan.num_draft_tokens, MAX_DEPTH),
        min_confidence=confidence,
    )
