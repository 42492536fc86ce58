"""The decode loop: read the prompt, then propose, verify, accept and commit until all rows end."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList

from speclm.acceptance import Accepted
from speclm.acceptance.interface import TargetCandidates, Verified
from speclm.adaptive.memory import forward_timings
from speclm.adaptive.pausing import Pausing
from speclm.adaptive.tuner import TreeTuner, describe_tree
from speclm.config import MAX_MERGED_PROMPT
from speclm.drafting.interface import Draft, Prefill
from speclm.generation.drafts import Drafter, planned, root_only
from speclm.generation.lockstep import Lockstep, nan_logits
from speclm.generation.request import Request, Setup, resolve_request
from speclm.generation.sequences import Listener, Sequences, StopStrings
from speclm.generation.sessions import open_session
from speclm.sampling.chooser import TokenChooser
from speclm.sampling.draws import DraftSampler, DraftSampling, Draws, seeded_draws
from speclm.sampling.noise import PositionNoise
from speclm.self_check.fingerprint import fingerprint
from speclm.stats import RowStats, SpeculationStats
from speclm.target import TargetFeatures


@dataclass(frozen=True, slots=True, eq=False)
class Generated:
    """Result of a call; fields that were not requested are None.

    Args:
        sequences: Prompt and new tokens, ended rows padded on the right.
        scores: Processed scores of each new position, ``[batch, vocab]``.
        logits: The target's logits of each new position, in float32, ``[batch, vocab]``.
        cache: The cache, with all tokens but the last.
    """

    sequences: Int[Tensor, "batch length"]
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    cache: DynamicCache | None = None


def generate_tokens(
    input_ids: Int[Tensor, "batch seq"],
    setup: Setup,
    stats: SpeculationStats,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_inputs: Any,
) -> Generated:
    """Generate in rounds, as a custom decoding method of Transformers.

    ``base.generate`` calls this with everything resolved: settings, processors, criteria and
    expanded rows. The caller ends the streamer.

    Raises:
        NeedsRegularGeneration: Before anything is computed, if this loop does not support a
            setting.
        PromptError: If the prompt is longer than the model's positions.
        NumericalError: If the target's logits are not numbers.
        OptionError: If the rule needs drafts of a kind that the proposer does not make.
        DraftError: If the proposer returns a draft of the wrong shape.
    """
    request = resolve_request(
        input_ids,
        setup,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        generation_config=generation_config,
        model_inputs=model_inputs,
    )
    generation = Generation(request, setup, stats)
    sequences, lockstep = generation.run(), generation.lockstep
    return Generated(
        sequences,
        scores=None if lockstep is None else lockstep.scores,
        logits=None if lockstep is None else lockstep.logits,
        cache=request.prompt.cache,
    )


class Generation:
    """The state of one call, and the rounds that change it."""

    def __init__(self, request: Request, setup: Setup, stats: SpeculationStats) -> None:
        """Set up a call without computing anything; `stats` is filled during the call."""
        prompt, target = request.prompt, setup.target
        self.request, self.setup, self.stats, self.target = request, setup, stats, target
        self.session = open_session(prompt, setup)
        stop_strings = request.stop_strings
        self.sequences = Sequences(
            batch=len(prompt.input_ids),
            max_new_tokens=request.max_length - prompt.input_ids.shape[1],
            eos_token_ids=request.eos_token_ids,
            stop_strings=StopStrings(stop_strings, prompt.input_ids) if stop_strings else None,
        )
        self.chooser = TokenChooser(list(request.processors), is_greedy=request.is_greedy)
        self.lockstep: Lockstep | None = None
        self.listener: Listener | None = None
        if request.needs_lockstep(setup, self.session):
            self.lockstep = Lockstep(
                request, self.sequences, setup.streamer, target_name=target.name
            )
        elif request.foreign_criteria or setup.streamer is not None:
            self.listener = Listener(request, self.sequences, setup.streamer)
        self.drafter = Drafter(
            request, setup, self.sequences, self.lockstep, needs_chains=self.session.needs_lockstep
        )
        self.noise: PositionNoise | None = None
        self.draws: Draws | None = None
        self.roots = prompt.num_padding  # until the prompt is read
        self.pausing = _begin_pausing(request, setup, stats)
        self.tuner = _begin_tuning(request, setup)
        # Forwards over any tree can be timed unless lockstep or a change of rotation forbids it, or
        # an engine would have to prepare every size.
        can_time = not (self.session.needs_lockstep or target.rotary_switch or setup.static)
        self.times_forwards = can_time and self.tuner is not None and self.tuner.timings is None
        self.timings_key = fingerprint(target) if self.times_forwards else None
        stats.acceptance, stats.is_lossy = request.rule.name, request.rule.is_lossy

    def run(self) -> Int[Tensor, "batch length"]:
        """Decode until the last row ends; clean up also after an error."""
        request, prompt = self.request, self.request.prompt
        try:
            with (
                planned(self.setup.proposer, self.setup.plan),
                self.target.decoding(self.drafter.features),
            ):
                self._read_prompt()
                with self.target.steps():
                    while self.sequences.any_live:
                        self._run_round()
                if self.pausing is not None:
                    self.pausing.finish(self.sequences.num_steps)
                sequences = self.sequences.to_tensor(prompt.input_ids, request.pad_token_id)
                if prompt.cache is not None:
                    # The tokens before the prompt are in the cache already, so any ids will do.
                    unseen = sequences.new_zeros(len(sequences), prompt.num_unseen)
                    self.session.hand_over(prompt.cache, torch.cat([unseen, sequences], dim=1))
        except BaseException:
            self.session.abandon()
            raise
        finally:
            if self.noise is not None:  # also after an error: the generator is the caller's
                self.noise.finish(self.sequences.num_steps)
        self.stats.num_regular_steps = self.sequences.num_steps - 1
        self.stats.tree = describe_tree(
            self.drafter.plan if self.tuner is None else self.tuner.best
        )
        return sequences

    def _read_prompt(self) -> None:
        """Run the prompt, whose last tokens are the first roots, and verify the first draft.

        Without a draft this is the prefill of regular generation. Otherwise one forward reads the
        prompt and verifies the draft, which saves a forward. A prompt of embeddings always has its
        own forward; embeddings without tokens stand for a single token, `Prompt.first_token`.
        """
        request, prompt, stats = self.request, self.request.prompt, self.stats
        tokens, batch = prompt.input_ids, len(prompt.input_ids)
        stats.rows = [RowStats() for _ in range(batch)]
        has_tokens = tokens.shape[1] > 0
        self.roots = tokens[:, -1] if has_tokens else tokens.new_full((batch,), prompt.first_token)
        new = tokens[:, max(self.session.num_cached - prompt.num_unseen, 0) :]
        self._draw_noise()
        prefill = self._prefill()
        draft, seconds = root_only(self.roots), None
        needs_features = self.drafter.features != TargetFeatures.NONE
        with stats.phase("prefill"):
            if not needs_features:
                self.drafter.begin(prefill, self.noise)
                can_merge = prompt.embeddings is None and self.session.merges_prompt
                if can_merge and new.shape[1] <= MAX_MERGED_PROMPT and self._wants_draft():
                    start = perf_counter()
                    draft = self.drafter.propose(self.roots, self.noise)
                    seconds = perf_counter() - start
            if draft.topology.num_nodes == 1:
                logits = self.session.prefill(
                    new if prompt.embeddings is None else prompt.embeddings
                )
            else:
                logits = self.session.verify(
                    draft.tokens,
                    draft.topology,
                    prompt=new[:, :-1] if new.shape[1] > 1 else None,
                    max_length=request.total_length,
                )
            if needs_features:
                assert self.target.features is not None
                features = self.target.features[:, :-1]
                first = max(features.shape[1] - prefill.tokens.shape[1], 0)  # only of embeddings
                self.drafter.begin(replace(prefill, features=features[:, first:]), self.noise)
        self._book_preparing("prefill")
        taken = self._accept_and_commit(draft, logits)
        for row, emitted in zip(stats.rows, taken.emitted, strict=True):
            row.prefill_tokens = len(emitted)
        if self.pausing is not None:
            self.pausing.record_prefill(tokens=_mean_length(taken, range(batch)), seconds=seconds)

    def _run_round(self) -> None:
        """Propose, verify, accept and commit once."""
        stats, sequences = self.stats, self.sequences
        slowest = sequences.slowest()
        if self.noise is not None:
            self.noise.seek(sequences.num_tokens, live=sequences.is_live)
        wants, is_behind = self._wants_draft(), self.session.is_behind
        drafts = wants and not is_behind and sequences.most_remaining > 1
        if drafts and self.tuner is not None:
            self._plan_round(self.tuner)
        before = dict(stats.seconds)
        with stats.phase("draft"):
            draft = self.drafter.propose(self.roots, self.noise, drafts=drafts)
        has_prepared = self._book_preparing("draft")
        with stats.phase("verify"):
            logits = self.session.verify(
                draft.tokens, draft.topology, max_length=self.request.total_length
            )
        is_usual = not self._book_preparing("verify") and not has_prepared
        observes = drafts or self.pausing is None or self.pausing.observes(stats.rounds)
        taken = self._accept_and_commit(draft, logits, observes=observes)
        topology = draft.topology
        stats.count_round(taken.paths, sizes=topology.host_sizes, depths=topology.host_depths)
        seconds = {name: stats.seconds[name] - past for name, past in before.items()}
        if topology.num_nodes == 1 and is_usual:
            fastest = stats.plain_round_seconds or math.inf
            stats.plain_round_seconds = min(fastest, sum(seconds.values()))
        is_explored = drafts and self.tuner is not None and self.tuner.is_exploring
        if drafts and self.tuner is not None and is_usual:
            self.tuner.record(draft, taken.paths, is_whole=sequences.is_live, seconds=seconds)
        if self.pausing is not None:  # rejected drafts have made it necessary to catch up
            self.pausing.record(
                tokens=_mean_length(taken, slowest),
                drafted=drafts or (wants and is_behind),
                seconds=math.nan if is_explored or not is_usual else None,
            )

    def _book_preparing(self, phase: str) -> bool:
        """Return whether an engine has prepared something in a phase, whose time is no round's."""
        if (static := self.setup.static) is None:
            return False
        self.stats.engine = static.describe(is_used=self.session.static is not None)
        return self.stats.count_preparing(static.take_seconds(), phase=phase)

    def _accept_and_commit(
        self, draft: Draft, logits: Float[Tensor, "batch nodes vocab"], *, observes: bool = True
    ) -> Accepted:
        """Keep what is accepted of a draft; the proposer sees likely tokens if it `observes`."""
        with self.stats.phase("accept"):
            if self.lockstep is None:
                taken = self._take(self._accept(draft, logits))
                kept = taken.paths
            else:
                is_exact = self.request.rule.is_exact
                decided = None if is_exact else self._accept(draft, logits).emitted
                taken, kept = self.lockstep.follow(draft, logits, self.noise, decided=decided)
            if self.target.features is not None:
                nodes = draft.topology.num_nodes
                taken = taken.with_features(self.target.features[:, -nodes:])
            if observes and (num := self.drafter.num_observed):
                taken = taken.with_candidates(TargetCandidates.best(logits, num=num))
        with self.stats.phase("commit"):
            is_live = self.sequences.any_live
            if is_live or self.request.prompt.cache is not None:
                self.session.keep(kept, device_paths=None if self.lockstep else taken.sent_path)
            if is_live or self.drafter.remembers:  # the last round is worth remembering too
                self.drafter.commit(taken, self.noise)
            if is_live:
                self.roots = taken.roots_or_sent(self.sequences.last_tokens)
        return taken

    def _accept(self, draft: Draft, logits: Float[Tensor, "batch nodes vocab"]) -> Accepted:
        """Apply the acceptance rule."""
        num_prompt_tokens = self.request.prompt.input_ids.shape[1]
        is_plain = self.chooser.takes_maxima
        by_stage = self.session.accept_greedily(draft.topology) if is_plain else None
        accepted = by_stage or self.request.rule.accept(
            Verified(
                draft_tokens=draft.tokens,
                topology=draft.topology,
                logits=logits,
                chooser=self.chooser,
                is_live=self.sequences.is_live,
                noise=self.noise,
                draws=self.draws,
                draft_distributions=draft.distributions,
                lengths=[num_prompt_tokens + new for new in self.sequences.num_tokens],
            )
        )
        for emitted, is_live in zip(accepted.emitted, self.sequences.is_live, strict=True):
            if is_live and any(token < 0 for token in emitted):
                raise nan_logits(self.target.name, logits.dtype)
        return accepted

    def _take(self, accepted: Accepted) -> Accepted:
        """Append the accepted tokens that fit into the rows, and return them."""
        if self.listener is None:
            return self.sequences.admit(accepted)
        cut = self.sequences.cut(accepted)
        return cut.cut([self.listener.take(cut.emitted[0], self.noise)])

    def _draw_noise(self) -> None:
        """Prepare the random numbers that the acceptance rule needs, if any."""
        rule, tokens = self.request.rule, self.request.prompt.input_ids
        if rule.uses_draws:
            self.draws = seeded_draws(tokens.device)
        if rule.uses_noise and not self.request.is_greedy:
            self.noise = PositionNoise(
                batch=len(tokens), vocab_size=self.target.vocab_size, device=tokens.device
            )

    def _prefill(self) -> Prefill:
        """Return what the proposer is told about the prompt before the first draft."""
        request, prompt = self.request, self.request.prompt
        draws_drafts = request.rule.draft_sampling is not DraftSampling.NONE
        assert self.draws is not None or not draws_drafts
        return Prefill(
            # Placeholders of images may have ids outside the vocabulary.
            tokens=prompt.input_ids[:, :-1].clamp(max=self.target.vocab_size - 1),
            num_padding=(prompt.num_padding - prompt.num_unseen).clamp(min=0),
            first_tokens=self.roots,
            temperature=request.temperature,
            max_new_tokens=self.sequences.most_remaining,
            eos_token_ids=request.eos_token_ids,
            sampler=DraftSampler(self.chooser, self.draws) if draws_drafts and self.draws else None,
            chooser=self.chooser,
            engine=None if (static := self.session.static) is None else static.engine,
            cache=self.session.cache,
        )

    def _wants_draft(self) -> bool:
        """Start the round's clock; return whether a draft is expected to be worth its time."""
        return self.pausing is None or self.pausing.wants_draft()

    def _plan_round(self, tuner: TreeTuner) -> None:
        """Choose the tree of the next draft."""
        if tuner.timings is None and self.times_forwards:
            tuner.timings = forward_timings(
                self.timings_key,
                self.session,
                self.drafter.fed_roots(self.roots),
                context=self.request.prompt.length + self.sequences.num_steps,
                max_length=self.request.total_length,
            )
            if self.pausing is not None:  # the measurement is not part of the round
                self.pausing.restart_clock()
        self.drafter.change_plan(tuner.next_plan())


def _setting_of(request: Request) -> tuple[object, ...]:
    """Return what acceptance depends on, apart from the text."""
    return (request.rule.name, request.temperature, *map(type, request.processors))


def _begin_pausing(request: Request, setup: Setup, stats: SpeculationStats) -> Pausing | None:
    """Return the control that pauses drafts; None drafts in every round."""
    if setup.pauses is None or setup.proposer is None:
        return None
    return Pausing(
        setup.pauses,
        batch=len(request.prompt.input_ids),
        num_prompt_tokens=request.prompt.length,
        setting=(_setting_of(request), setup.plan, setup.trees is None),
        proposer=setup.proposer,
        stats=stats,
    )


def _begin_tuning(request: Request, setup: Setup) -> TreeTuner | None:
    """Return the tuner that chooses trees; None keeps the plan."""
    # Drawn trees get their shape before their tokens, so a small one is not part of a larger one.
    is_drawn = request.rule.draft_sampling is not DraftSampling.NONE
    if setup.trees is None or setup.proposer is None or is_drawn:
        return None
    return TreeTuner(
        setup.trees,
        batch=len(request.prompt.input_ids),
        num_prompt_tokens=request.prompt.length,
        max_depth=setup.proposer.config.depth,
        setting=_setting_of(request),
        proposer=setup.proposer,
    )


def _mean_length(taken: Accepted, rows: Sequence[int]) -> float:
    """Return the mean number of tokens that some rows were given."""
    return fmean(len(taken.emitted[row]) for row in rows)
