"""One generation: propose, verify, accept and commit, round by round."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from statistics import fmean
from time import perf_counter

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache

from speclm.acceptance import Accepted
from speclm.acceptance.interface import AcceptanceRule, Verified
from speclm.adaptive.memory import forward_timings
from speclm.adaptive.pausing import Pausing
from speclm.adaptive.tuner import TreeTuner
from speclm.config import MAX_MERGED_PROMPT
from speclm.drafting.interface import Draft, Prefill, Proposer
from speclm.generation.callbacks import Listener
from speclm.generation.draft_checks import (
    cut_to_plan,
    deepest_paths,
    hand_plan,
    require_distributions,
    require_valid,
    roots_alone,
    with_padding,
)
from speclm.generation.lockstep import Lockstep, nan_logits
from speclm.generation.sequences import Rows
from speclm.sampling.chooser import TokenChooser
from speclm.sampling.draws import DraftSampler, DraftSampling, Draws, seeded_draws
from speclm.sampling.noise import PositionNoise, undisturbed
from speclm.self_check.fingerprint import Fingerprint
from speclm.stats import RowStats, SpeculationStats
from speclm.target import Session, TargetFeatures, TargetView
from speclm.tree.plan import TreePlan


@dataclass(slots=True)
class Run:
    """The state of one generation, and what a round does with it."""

    target: TargetView
    proposer: Proposer | None
    chooser: TokenChooser
    rows: Rows
    lockstep: Lockstep | None
    listener: Listener | None
    """What is told of every position of a single row; None where the lockstep does it, or nobody
    asks."""
    num_prompt_tokens: int
    num_unseen: int
    """Slots before the prompt, of which the cache that was passed in knows the tokens."""
    first_token: int
    """What stands for the prompt's last token where it has none."""
    max_length: int
    pad_token_id: int
    """What follows the end of a row that ends before others."""
    num_padding: Int[Tensor, " batch"]
    session: Session
    keeps_cache: bool
    stats: SpeculationStats
    rule: AcceptanceRule
    draws: Draws | None = None
    noise: PositionNoise | None = None
    roots: Tensor | None = None
    pausing: Pausing | None = None
    """What says whether a round should have a draft; None for one in every round."""
    plan: TreePlan | None = None
    """What every draft should be; None for what the proposer's own settings say."""
    tuner: TreeTuner | None = None
    """What changes the plan from round to round; None for one that stays."""
    kind: Fingerprint | None = None
    """What the target's timings are kept under, where they are to be measured."""
    isolates: bool = False  # whether to undo what the proposer draws from default generators
    own_nodes: list[list[int]] | None = None
    """The proposer's nodes that the last draft is made of, where nodes of its were left out."""

    @property
    def features(self) -> TargetFeatures:
        """What the proposer asks the target for."""
        return TargetFeatures.NONE if self.proposer is None else self.proposer.features

    @property
    def _max_slots(self) -> int:
        """Tokens at which every row ends, those that only the cache knows included."""
        return self.num_unseen + self.max_length

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
        *,
        embeddings: Tensor | None = None,
        temperature: float,
    ) -> None:
        """Run the prompt, whose last tokens are the first roots, and verify the first draft.

        Nothing but roots to verify is regular generation's own prefill. Otherwise one forward does
        for the prompt and the draft, which saves one of what may be few. Embeddings are read by
        the former; where they come without tokens, proposers know of a single one, `first_token`.
        """
        stats, batch = self.stats, len(tokens)
        stats.rows = [RowStats() for _ in range(batch)]
        has_tokens = tokens.shape[1] > 0
        self.roots = tokens[:, -1] if has_tokens else tokens.new_full((batch,), self.first_token)
        new = tokens[:, max(self.session.num_cached - self.num_unseen, 0) :]
        if self.rule.uses_draws:
            self.draws = seeded_draws(tokens.device)
        if self.rule.uses_noise and not self.chooser.is_greedy:
            self.noise = PositionNoise(
                batch=batch, vocab_size=self.target.vocab_size, device=tokens.device
            )
        # An image may stand in the text as a token that no vocabulary has.
        known = tokens[:, :-1].clamp(max=self.target.vocab_size - 1)
        prompt = Prefill(
            tokens=known,
            num_padding=(self.num_padding - self.num_unseen).clamp(min=0),
            first_tokens=self.roots,
            temperature=temperature,
            max_new_tokens=self.rows.most_remaining,
            eos_token_ids=self.rows.eos_token_ids,
            sampler=self._sampler,
            chooser=self.chooser,
        )
        draft, seconds = roots_alone(self.roots), None
        needs_features = self.features != TargetFeatures.NONE
        with stats.phase("prefill"):
            if self.proposer is not None and not needs_features:
                with self._undisturbed():
                    self.proposer.begin(prompt)
                can_merge = embeddings is None and self.session.merges_prompt
                if can_merge and new.shape[1] <= MAX_MERGED_PROMPT and self._wants_draft():
                    start = perf_counter()
                    draft = self._propose()
                    seconds = perf_counter() - start
            if draft.topology.num_nodes == 1:
                logits = self.session.prefill(new if embeddings is None else embeddings)
            else:
                logits = self.session.verify(
                    draft.tokens,
                    draft.topology,
                    prompt=new[:, :-1] if new.shape[1] > 1 else None,
                    max_length=self._max_slots,
                )
            if self.proposer is not None and needs_features:
                assert self.target.features is not None
                features = self.target.features[:, :-1]
                first = max(features.shape[1] - prompt.tokens.shape[1], 0)  # of embeddings alone
                with self._undisturbed():
                    self.proposer.begin(replace(prompt, features=features[:, first:]))
        taken = self._settle(draft, logits)
        for row, emitted in zip(stats.rows, taken.emitted, strict=True):
            row.prefill_tokens = len(emitted)
        if self.pausing is not None:
            self.pausing.record_prefill(tokens=_mean_length(taken, range(batch)), seconds=seconds)

    def round(self) -> None:
        """Propose, verify, accept and commit once."""
        stats, rows = self.stats, self.rows
        last_rows = rows.last()
        if self.noise is not None:
            self.noise.seek(rows.num_tokens, live=rows.is_live)
        may_draft = (
            self._wants_draft()
            and not self.session.is_behind
            and self.proposer is not None
            and rows.most_remaining > 1
        )
        if may_draft and self.tuner is not None:
            self._plan_round(self.tuner)
        before = None if self.tuner is None else dict(stats.seconds)
        with stats.phase("draft"):
            draft = self._propose() if may_draft else roots_alone(self._fed_roots)
        with stats.phase("verify"):
            logits = self.session.verify(draft.tokens, draft.topology, max_length=self._max_slots)
        taken = self._settle(draft, logits)
        self._count(draft, taken)
        stats.rounds += 1
        if may_draft and self.tuner is not None and before is not None:
            seconds = {name: stats.seconds[name] - past for name, past in before.items()}
            self.tuner.record(draft, taken.paths, is_whole=rows.is_live, seconds=seconds)
        is_usual = self.tuner is None or not (may_draft and self.tuner.is_exploring)
        if self.pausing is not None:
            self.pausing.record(
                tokens=_mean_length(taken, last_rows),
                drafted=may_draft,
                seconds=None if is_usual else math.nan,
            )

    def hand_over(self, into: DynamicCache, sequences: Int[Tensor, "batch length"]) -> None:
        """Extend the cache that was passed in to what regular generation leaves in it."""
        if self.num_unseen:  # their tokens are not needed: the cache has them
            unseen = sequences.new_zeros(len(sequences), self.num_unseen)
            sequences = torch.cat([unseen, sequences], dim=1)
        self.session.hand_over(into, sequences)

    @property
    def can_time_forwards(self) -> bool:
        """Whether forwards over any tree can be timed in the midst of the generation."""
        return not self.session.needs_lockstep and self.target.rotary_switch is None

    @property
    def _fed_roots(self) -> Int[Tensor, " batch"]:
        """Tokens to feed next: the roots, and padding behind the end of rows that go on with it."""
        assert self.roots is not None
        return self.roots if self.lockstep is None else self.lockstep.ids[:, -1]

    def _wants_draft(self) -> bool:
        """Start the round's clock; return whether a draft is expected to be worth its time."""
        return self.pausing is None or self.pausing.wants_draft()

    def _plan_round(self, tuner: TreeTuner) -> None:
        """Have the next draft as the tuner wants it."""
        assert self.proposer is not None
        if tuner.timings is None and self.can_time_forwards:
            tuner.timings = forward_timings(
                self.kind,
                self.session,
                self._fed_roots,
                context=self.num_unseen + self.num_prompt_tokens + self.rows.num_steps,
                max_length=self._max_slots,
            )
            if self.pausing is not None:  # what was measured is no part of the round
                self.pausing.restart_clock()
        plan = tuner.next_plan()
        if plan != self.plan:
            self.plan = plan
            hand_plan(self.proposer, plan)

    def _settle(self, draft: Draft, logits: Float[Tensor, "batch nodes vocab"]) -> Accepted:
        """Accept, take over and commit; return what was taken."""
        with self.stats.phase("accept"):
            if self.lockstep is None:
                taken = self._take(self._accept(draft, logits))
                kept = taken.paths
            else:
                decided = None if self.rule.is_exact else self._accept(draft, logits).emitted
                taken, kept = self.lockstep.follow(draft, logits, self.noise, decided=decided)
            if self.target.features is not None:
                nodes = draft.topology.num_nodes
                taken = taken.with_features(self.target.features[:, -nodes:])
        with self.stats.phase("commit"):
            if self.rows.any_live or self.keeps_cache:
                self.session.keep(kept)
            if self.rows.any_live:
                self._commit(taken)
        return taken

    def _take(self, accepted: Accepted) -> Accepted:
        """Take over what rows may take, and tell who listens."""
        if self.listener is None:
            return self.rows.admit(accepted)
        cut = self.rows.cut(accepted)
        return cut.cut([self.listener.hear(cut.emitted[0], self.noise)])

    def _undisturbed(self) -> AbstractContextManager[None]:
        return undisturbed(self.num_padding.device, self.noise) if self.isolates else nullcontext()

    def _propose(self) -> Draft:
        assert self.roots is not None
        room = self.rows.most_remaining - 1  # the bonus token needs no draft
        if self.proposer is None or room < 1:
            return roots_alone(self._fed_roots)
        with self._undisturbed():
            draft = self.proposer.propose(self.roots, noise=self.noise)
        require_valid(draft, self.roots)
        if self.rule.draft_sampling is not DraftSampling.NONE:
            require_distributions(draft, self.target.vocab_size)
        draft, self.own_nodes = cut_to_plan(draft, self.plan)
        if self._is_too_deep(draft.topology.max_depth):
            return roots_alone(self._fed_roots)
        tokens = torch.cat([self.roots[:, None], draft.tokens[:, 1:]], dim=1)  # whatever it says
        draft = replace(draft, tokens=tokens)
        if self.session.needs_lockstep:
            draft, nodes = deepest_paths(draft, depth=room)
            self.own_nodes = nodes if self.own_nodes is None else _through(self.own_nodes, nodes)
        if self.lockstep is None or all(self.rows.is_live):
            return draft
        return with_padding(
            draft,
            self.lockstep.ids[:, -1],
            self.rows.is_live,
            pad_token_id=self.lockstep.pad_token_id,
        )

    def _is_too_deep(self, depth: int) -> bool:
        """Return whether regular generation might get elsewhere than a draft of that depth.

        That is where the rotation of keys changes, and behind the last learned position: plain
        decoding fails once it arrives there, if it ever does. With rotary positions it goes on,
        and so do drafts from there.
        """
        num_positions = self.target.max_positions or self._max_slots
        switch = self.target.rotary_switch
        if switch is None and self._max_slots <= num_positions:
            return False
        first = self.num_unseen + self.num_prompt_tokens - 1
        num_tokens = self.rows.num_tokens
        if self.lockstep is not None:  # ended rows go on with padding, next to the others
            num_tokens = [max(num_tokens)] * len(num_tokens)
        # Syncs, but only where a row may get there.
        roots = [
            first + new - padding
            for new, padding in zip(num_tokens, self.num_padding.tolist(), strict=True)
        ]
        if switch is not None and switch.excludes_drafts(max(roots), depth):
            return True
        return any(root < num_positions <= root + depth for root in roots)

    def _accept(self, draft: Draft, logits: Float[Tensor, "batch nodes vocab"]) -> Accepted:
        accepted = self.rule.accept(
            Verified(
                draft_tokens=draft.tokens,
                topology=draft.topology,
                logits=logits,
                chooser=self.chooser,
                is_live=self.rows.is_live,
                noise=self.noise,
                draws=self.draws,
                draft_distributions=draft.distributions,
                lengths=[self.num_prompt_tokens + new for new in self.rows.num_tokens],
            )
        )
        for row, emitted in enumerate(accepted.emitted):
            if self.rows.is_live[row] and any(token < 0 for token in emitted):
                raise nan_logits(self.target.name, logits.dtype)
        return accepted

    def _commit(self, taken: Accepted) -> None:
        if self.proposer is not None:
            if self.own_nodes is not None:
                taken = taken.with_paths(_through(self.own_nodes, taken.paths))
                self.own_nodes = None
            with self._undisturbed():
                self.proposer.commit(taken)
        self.roots = self.num_padding.new_tensor(self.rows.last_tokens)

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


def _mean_length(taken: Accepted, rows: Sequence[int]) -> float:
    """Return the mean number of tokens that some rows were given."""
    return fmean(len(taken.emitted[row]) for row in rows)


def _through(nodes: list[list[int]], paths: list[list[int]]) -> list[list[int]]:
    """Return the nodes of another draft that each row's nodes are made of."""
    return [[own[node] for node in path] for own, path in zip(nodes, paths, strict=True)]
