"""The decode loop: propose, verify, accept, commit, until every row has ended."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList

from speclm.acceptance.accepted import Accepted
from speclm.acceptance.exact import ExactRule
from speclm.acceptance.interface import AcceptanceRule, Verified
from speclm.cache.tree_cache import TreeCache
from speclm.config import MAX_DEPTH, MAX_MERGED_PROMPT, MAX_NODES
from speclm.errors import DraftError, NumericalError, OptionError, TreeBudgetError
from speclm.generation.delegation import eos_token_ids, left_padding, require_supported
from speclm.generation.rows import Rows
from speclm.proposers.interface import Draft, Prefill, Proposer
from speclm.sampling.chooser import TokenChooser
from speclm.sampling.drafts import DraftSampler, DraftSampling
from speclm.sampling.draws import Draws, seeded_draws
from speclm.sampling.noise import PositionNoise
from speclm.stats import RowStats, SpeculationStats
from speclm.target import TargetFeatures, TargetView
from speclm.tree.topology import chain


def generate_tokens(  # noqa: PLR0913 - the signature is Transformers'
    model: object,  # noqa: ARG001 - the target, in the place where Transformers passes it
    input_ids: Int[Tensor, "batch seq"],
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    target: TargetView,
    proposer: Proposer | None,
    stats: SpeculationStats,
    rule: AcceptanceRule | None = None,
    **model_inputs: Any,
) -> Int[Tensor, "batch length"]:
    """Generate as Transformers' own decoding methods do, in rounds.

    This is the callable that ``base.generate(custom_generate=...)`` enters with everything
    resolved: settings, processors, criteria, expanded rows. Greedy decoding has one rule, the
    exact one, whatever `rule` says; None is the exact rule too.

    Returns:
        Prompt and new tokens, ended rows padded on the right.

    Raises:
        NeedsPlainDecoding: Before anything is computed, if a setting asks for more than this loop
            gives.
        PromptError: If the prompt is longer than the model's positions.
        NumericalError: If the target's logits are not numbers.
        OptionError: If the rule needs drafts of a kind that the proposer does not make.
        DraftError: If the proposer returns a draft of the wrong shape.
    """
    if rule is None or not generation_config.do_sample:
        rule = ExactRule()
    _require_drafts_for(rule, proposer)
    require_supported(generation_config, logits_processor, stopping_criteria, model_inputs)
    input_ids = input_ids.long()
    attention_mask = model_inputs.get("attention_mask")
    num_padding = left_padding(input_ids, attention_mask)
    target.require_prompt_fits(input_ids.shape[1])
    rows = Rows(
        batch=input_ids.shape[0],
        # Plain decoding checks the length after a token, so there is always one.
        max_new_tokens=max(generation_config.max_length - input_ids.shape[1], 1),
        eos_token_ids=eos_token_ids(stopping_criteria),
    )
    run = _Run(
        target=target,
        proposer=proposer,
        chooser=TokenChooser(list(logits_processor), is_greedy=not generation_config.do_sample),
        rows=rows,
        num_prompt_tokens=input_ids.shape[1],
        max_length=generation_config.max_length,
        cache=target.new_cache(num_padding),
        stats=stats,
        rule=rule,
    )
    stats.acceptance, stats.is_lossy = rule.name, rule.is_lossy
    temperature = (generation_config.temperature or 1.0) if generation_config.do_sample else 0.0
    try:
        with target.decoding(run.features):
            run.start(
                input_ids, attention_mask, model_inputs.get("position_ids"), temperature=temperature
            )
            while rows.any_live:
                run.round()
    finally:
        if run.noise is not None:  # also after an error: the generator is the caller's
            run.noise.finish(rows.num_steps)
    pad_token = generation_config._pad_token_tensor
    return rows.sequences(input_ids, 0 if pad_token is None else int(pad_token))


@dataclass(slots=True)
class _Run:
    """The state of one generation."""

    target: TargetView
    proposer: Proposer | None
    chooser: TokenChooser
    rows: Rows
    num_prompt_tokens: int
    max_length: int
    cache: TreeCache
    stats: SpeculationStats
    rule: AcceptanceRule
    draws: Draws | None = None
    noise: PositionNoise | None = None
    roots: Tensor | None = None

    @property
    def features(self) -> TargetFeatures:
        """What the proposer asks the target for."""
        return TargetFeatures.NONE if self.proposer is None else self.proposer.features

    @property
    def _sampler(self) -> DraftSampler | None:
        """What drafts have to be drawn with, if they have to be drawn."""
        if self.rule.draft_sampling is DraftSampling.NONE:
            return None
        assert self.draws is not None, "a rule for drawn drafts draws too"
        return DraftSampler(self.chooser, self.draws)

    def start(
        self,
        tokens: Int[Tensor, "batch seq"],
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        *,
        temperature: float,
    ) -> None:
        """Run the prompt, whose last tokens are the first roots, and verify the first draft.

        Nothing but roots to verify is plain decoding's own prefill. Otherwise one forward does
        for the prompt and the draft, which saves one of what may be few.
        """
        stats, batch, length = self.stats, *tokens.shape
        stats.rows = [RowStats() for _ in range(batch)]
        self.roots = tokens[:, -1]
        if self.rule.uses_draws:
            self.draws = seeded_draws(tokens.device)
        if self.rule.uses_noise and not self.chooser.is_greedy:
            self.noise = PositionNoise(
                batch=batch, vocab_size=self.target.vocab_size, device=tokens.device
            )
        prompt = Prefill(
            tokens=tokens[:, :-1],
            num_padding=self.cache.num_padding,
            first_tokens=self.roots,
            temperature=temperature,
            max_new_tokens=self.rows.most_remaining,
            eos_token_ids=self.rows.eos_token_ids,
            sampler=self._sampler,
        )
        draft = _roots_alone(self.roots)
        needs_features = self.features is not TargetFeatures.NONE
        with stats.phase("prefill"):
            if self.proposer is not None and not needs_features:
                self.proposer.begin(prompt)
                if length <= MAX_MERGED_PROMPT:
                    draft = self._propose()
            if draft.topology.num_nodes == 1:
                logits = self.target.prefill(
                    tokens, self.cache, attention_mask=attention_mask, position_ids=position_ids
                )[:, None]
                self.cache.split(length - 1, num_pending=1)
            else:
                logits = self.target.forward_tree(
                    draft.tokens,
                    draft.topology,
                    self.cache,
                    prompt=tokens[:, :-1],
                    max_length=self.max_length,
                )
            if self.proposer is not None and needs_features:
                assert self.target.features is not None
                self.proposer.begin(replace(prompt, features=self.target.features[:, :-1]))
        taken = self._settle(draft, logits)
        for row, emitted in zip(stats.rows, taken.emitted, strict=True):
            row.prefill_tokens = len(emitted)

    def round(self) -> None:
        """Propose, verify, accept and commit once."""
        stats, rows = self.stats, self.rows
        if self.noise is not None:
            self.noise.seek(rows.num_tokens, live=rows.is_live)
        with stats.phase("draft"):
            draft = self._propose()
        with stats.phase("verify"):
            logits = self.target.forward_tree(
                draft.tokens, draft.topology, self.cache, max_length=self.max_length
            )
        self._count(draft, self._settle(draft, logits))
        stats.rounds += 1

    def _settle(self, draft: Draft, logits: Float[Tensor, "batch nodes vocab"]) -> Accepted:
        """Accept, take over and commit; return what was taken."""
        with self.stats.phase("accept"):
            taken = self.rows.admit(self._accept(draft, logits))
            if self.target.features is not None:
                nodes = draft.topology.num_nodes
                taken = taken.with_features(self.target.features[:, -nodes:])
        with self.stats.phase("commit"):
            if self.rows.any_live:
                self._commit(taken)
        return taken

    def _propose(self) -> Draft:
        assert self.roots is not None
        room = self.rows.most_remaining - 1  # the bonus token needs no draft
        if self.proposer is None or room < 1:
            return _roots_alone(self.roots)
        draft = self.proposer.propose(self.roots, noise=self.noise)
        _require_valid(draft, self.roots)
        if self.rule.draft_sampling is not DraftSampling.NONE:
            _require_laws(draft, self.target.vocab_size)
        if self._crosses_last_position(draft.topology.max_depth):
            return _roots_alone(self.roots)
        tokens = torch.cat([self.roots[:, None], draft.tokens[:, 1:]], dim=1)  # whatever it says
        return replace(draft, tokens=tokens)

    def _crosses_last_position(self, depth: int) -> bool:
        """Tell whether a draft of that depth goes beyond the last position, unlike its root.

        Learned positions end there. Plain decoding fails once it arrives, if it ever does; with
        rotary positions it goes on, and so do drafts from there.
        """
        last = (self.target.max_positions or self.max_length) - 1
        if self.max_length <= last + 1:
            return False
        roots = [self.num_prompt_tokens - 1 + new for new in self.rows.num_tokens]
        # Syncs, but only where a row may outgrow the positions that the model was built for.
        return any(
            root - padding <= last < root - padding + depth
            for root, padding in zip(roots, self.cache.num_padding.tolist(), strict=True)
        )

    def _accept(self, draft: Draft, logits: Float[Tensor, "batch nodes vocab"]) -> Accepted:
        accepted = self.rule.accept(
            Verified(
                tokens=draft.tokens,
                topology=draft.topology,
                logits=logits,
                chooser=self.chooser,
                is_live=self.rows.is_live,
                noise=self.noise,
                draws=self.draws,
                laws=draft.laws,
            )
        )
        for row, emitted in enumerate(accepted.emitted):
            if self.rows.is_live[row]:
                self._require_number(emitted, logits)
        return accepted

    def _commit(self, taken: Accepted) -> None:
        self.cache.keep(taken.paths)
        if self.proposer is not None:
            self.proposer.commit(taken)
        self.roots = torch.tensor(self.rows.last_tokens, device=self.cache.lengths.device)

    def _count(self, draft: Draft, taken: Accepted) -> None:
        """Count the round in the rows that emitted something."""
        sizes, depths = draft.topology.host_sizes, draft.topology.host_depths
        for row, path in enumerate(taken.paths):
            if path:
                shape = row if len(sizes) > 1 else 0
                self.stats.rows[row].add_round(
                    accepted_length=len(path) - 1,
                    depth=depths[shape],
                    num_draft_tokens=sizes[shape] - 1,
                )

    def _require_number(self, tokens: list[int], logits: Tensor) -> None:
        if any(token < 0 for token in tokens):
            remedy = (
                "float16 overflows beyond 65504: load the model with dtype=torch.bfloat16"
                if logits.dtype == torch.float16
                else "check the weights and inputs; in float16 an overflow would be the likely "
                "cause, and bfloat16 the remedy"
            )
            raise NumericalError(
                f"{self.target.name} produced logits that are NaN, in {logits.dtype}; {remedy}"
            )


def _roots_alone(roots: Int[Tensor, " batch"]) -> Draft:
    """Return the draft that makes a round a step of plain decoding."""
    return Draft(tokens=roots[:, None], topology=chain(0, device=roots.device), probs=None)


def _require_drafts_for(rule: AcceptanceRule, proposer: Proposer | None) -> None:
    """Refuse a rule for drawn drafts beside a proposer that does not draw."""
    wanted = rule.draft_sampling
    if proposer is None or wanted in {DraftSampling.NONE, proposer.draft_sampling}:
        return
    raise OptionError(
        f"acceptance {rule.name!r} expected drafts drawn {wanted.value}, with their laws, found "
        f"{type(proposer).__name__}, which does not draw; use a draft model or Medusa heads, or "
        "acceptance='exact', which is lossless with any proposer"
    )


def _require_laws(draft: Draft, vocab_size: int) -> None:
    """Check that a draft comes with the laws that it was drawn from."""
    found = None if draft.laws is None else tuple(draft.laws.shape)
    expected = (*draft.tokens.shape, vocab_size)
    if draft.topology.max_depth > 0 and found != expected:
        raise DraftError(
            f"draft has laws of shape {found}, the accept rule expected {expected}: a proposer "
            "that declares draft_sampling returns the law after every node; see Prefill.sampler"
        )


def _require_valid(draft: object, roots: Int[Tensor, " batch"]) -> None:
    """Check what a wrong proposer would otherwise break far from its cause."""
    if not isinstance(draft, Draft):
        raise DraftError(
            f"propose returned a {type(draft).__name__}, expected a Draft; "
            "see speclm.testing.check_proposer"
        )
    batch, nodes = draft.tokens.shape
    topology = draft.topology
    if nodes > MAX_NODES or topology.max_depth > MAX_DEPTH:
        raise TreeBudgetError(
            f"draft has {nodes} nodes on {topology.max_depth} levels, a round holds at most "
            f"{MAX_NODES} nodes on {MAX_DEPTH} levels; draft fewer tokens"
        )
    if (
        batch != len(roots)
        or nodes != topology.num_nodes
        or len(topology.parents) not in {1, batch}
    ):
        raise DraftError(
            f"draft has tokens of shape {tuple(draft.tokens.shape)} and parents of shape "
            f"{tuple(topology.parents.shape)}, expected {len(roots)} rows and one parent a node; "
            "see speclm.testing.check_proposer"
        )
    if draft.tokens.dtype != torch.long or draft.tokens.device != roots.device:
        raise DraftError(
            f"draft tokens are {draft.tokens.dtype} on {draft.tokens.device}, expected "
            f"torch.int64 on {roots.device}; see speclm.testing.check_proposer"
        )
