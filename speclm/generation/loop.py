"""The decode loop: propose, verify, accept, commit, until every row has ended."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from speclm.acceptance.accepted import Accepted
from speclm.acceptance.exact import ExactRule
from speclm.acceptance.interface import AcceptanceRule, Verified
from speclm.cache import TreeCache, import_cache
from speclm.config import MAX_DEPTH, MAX_MERGED_PROMPT, MAX_NODES
from speclm.errors import DraftError, OptionError, TreeBudgetError
from speclm.generation.delegation import (
    eos_token_ids,
    left_padding,
    prompt_length,
    reads_positions,
    require_importable,
    require_supported,
)
from speclm.generation.frontier import Frontier, nan_logits
from speclm.generation.handover import hand_over
from speclm.generation.pace import Pace, PaceMemory
from speclm.generation.rows import Rows
from speclm.proposers.interface import Draft, Prefill, Proposer
from speclm.sampling.chooser import TokenChooser, first_text_dependent
from speclm.sampling.drafts import DraftSampler, DraftSampling
from speclm.sampling.draws import Draws, seeded_draws
from speclm.sampling.noise import PositionNoise
from speclm.stats import RowStats, SpeculationStats
from speclm.target import TargetFeatures, TargetView
from speclm.tree.topology import chain, from_parents


@dataclass(frozen=True, slots=True, eq=False)
class Generated:
    """What a generation returns; fields are None where nobody asked for them.

    Args:
        sequences: Prompt and new tokens, ended rows padded on the right.
        scores: Processed scores of each new position, ``[batch, vocab]``.
        logits: The target's logits of each new position, in float32, ``[batch, vocab]``.
        past_key_values: The cache that was passed in or would have been made, with all tokens
            but the last.
    """

    sequences: Int[Tensor, "batch length"]
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    past_key_values: DynamicCache | None = None


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
    streamer: BaseStreamer | None = None,
    extends_cache: bool = False,
    paces: PaceMemory | None = None,
    **model_inputs: Any,
) -> Generated:
    """Generate as Transformers' own decoding methods do, in rounds.

    This is the callable that ``base.generate(custom_generate=...)`` enters with everything
    resolved: settings, processors, criteria, expanded rows. Greedy decoding has one rule, the
    exact one, whatever `rule` says; None is the exact rule too. `extends_cache` says that the
    cache among the inputs is the caller's, who finds it extended. `paces` is what earlier calls
    measured; None to draft in every round, whether it pays or not.

    Rows run ahead of each other, unless something looks at positions one by one: a processor that
    reads the text, a criterion, a streamer, or a caller who wants scores or the cache back.

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
    require_supported(generation_config, logits_processor, model_inputs, rule)
    wants_details = bool(generation_config.return_dict_in_generate)
    input_ids = input_ids.long()
    attention_mask = model_inputs.get("attention_mask")
    given = model_inputs.get("past_key_values") if extends_cache or wants_details else None
    length = prompt_length(input_ids, attention_mask, generation_config, given)
    if given is not None:
        require_importable(given, target.num_layers, batch=len(input_ids), num_tokens=length)
    num_padding = left_padding(input_ids, attention_mask, length=length)
    target.require_prompt_fits(length)
    rows = Rows(
        batch=input_ids.shape[0],
        # Plain decoding checks the length after a token, so there is always one.
        max_new_tokens=max(generation_config.max_length - input_ids.shape[1], 1),
        eos_token_ids=eos_token_ids(stopping_criteria),
    )
    frontier = None
    if (
        streamer is not None
        or (wants_details and (generation_config.output_scores or generation_config.output_logits))
        or first_text_dependent(logits_processor) is not None
        or reads_positions(stopping_criteria, generation_config)
    ):
        frontier = Frontier(
            input_ids,
            rows,
            processors=logits_processor,
            criteria=stopping_criteria,
            streamer=streamer,
            is_greedy=not generation_config.do_sample,
            pad_token_id=_pad_token_id(generation_config),
            keeps_scores=bool(wants_details and generation_config.output_scores),
            keeps_logits=bool(wants_details and generation_config.output_logits),
            target_name=target.name,
        )
    run = _Run(
        target=target,
        proposer=proposer,
        chooser=TokenChooser(list(logits_processor), is_greedy=not generation_config.do_sample),
        rows=rows,
        frontier=frontier,
        num_prompt_tokens=input_ids.shape[1],
        num_unseen=length - input_ids.shape[1],
        max_length=generation_config.max_length,
        cache=target.new_cache(num_padding),
        keeps_cache=given is not None,
        stats=stats,
        rule=rule,
    )
    if given is not None:
        import_cache(run.cache, given, room=input_ids.shape[1])
    if paces is not None and proposer is not None:
        run.pace = Pace(
            paces,
            batch=len(input_ids),
            num_prompt_tokens=length,
            setting=(rule.name, temperature, *map(type, logits_processor)),
            proposer=proposer,
            stats=stats,
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
            sequences = rows.sequences(input_ids, _pad_token_id(generation_config))
            if given is not None:
                run.hand_over(given, sequences)
    finally:
        if run.noise is not None:  # also after an error: the generator is the caller's
            run.noise.finish(rows.num_steps)
    if frontier is None:
        return Generated(sequences, past_key_values=given)
    frontier.finish()
    return Generated(
        sequences, scores=frontier.scores, logits=frontier.logits, past_key_values=given
    )


def _pad_token_id(generation_config: GenerationConfig) -> int:
    pad_token = generation_config._pad_token_tensor
    return 0 if pad_token is None else int(pad_token)


@dataclass(slots=True)
class _Run:
    """The state of one generation."""

    target: TargetView
    proposer: Proposer | None
    chooser: TokenChooser
    rows: Rows
    frontier: Frontier | None
    num_prompt_tokens: int
    num_unseen: int
    """Slots in front of the prompt, of which the cache that was passed in knows the tokens."""
    max_length: int
    cache: TreeCache
    keeps_cache: bool
    stats: SpeculationStats
    rule: AcceptanceRule
    draws: Draws | None = None
    noise: PositionNoise | None = None
    roots: Tensor | None = None
    pace: Pace | None = None

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
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        *,
        temperature: float,
    ) -> None:
        """Run the prompt, whose last tokens are the first roots, and verify the first draft.

        Nothing but roots to verify is plain decoding's own prefill. Otherwise one forward does
        for the prompt and the draft, which saves one of what may be few.
        """
        stats, batch = self.stats, len(tokens)
        stats.rows = [RowStats() for _ in range(batch)]
        self.roots = tokens[:, -1]
        new = tokens[:, max(self.cache.tree_start - self.num_unseen, 0) :]
        if self.rule.uses_draws:
            self.draws = seeded_draws(tokens.device)
        if self.rule.uses_noise and not self.chooser.is_greedy:
            self.noise = PositionNoise(
                batch=batch, vocab_size=self.target.vocab_size, device=tokens.device
            )
        prompt = Prefill(
            tokens=tokens[:, :-1],
            num_padding=(self.cache.num_padding - self.num_unseen).clamp(min=0),
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
                if new.shape[1] <= MAX_MERGED_PROMPT and self._pays:
                    draft = self._propose()
            if draft.topology.num_nodes == 1:
                logits = self.target.prefill(
                    new, self.cache, attention_mask=attention_mask, position_ids=position_ids
                )[:, None]
                self.cache.split(self.cache.tree_start - 1, num_pending=1)
            else:
                logits = self.target.forward_tree(
                    draft.tokens,
                    draft.topology,
                    self.cache,
                    prompt=new[:, :-1] if new.shape[1] > 1 else None,
                    max_length=self._max_slots,
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
        num_live = sum(rows.is_live)
        if self.noise is not None:
            self.noise.seek(rows.num_tokens, live=rows.is_live)
        may_draft = self._pays and self.proposer is not None and rows.most_remaining > 1
        with stats.phase("draft"):
            draft = self._propose() if may_draft else _roots_alone(self._fed_roots)
        with stats.phase("verify"):
            logits = self.target.forward_tree(
                draft.tokens, draft.topology, self.cache, max_length=self._max_slots
            )
        taken = self._settle(draft, logits)
        self._count(draft, taken)
        stats.rounds += 1
        if self.pace is not None:
            self.pace.record(
                tokens=sum(map(len, taken.emitted)), drafted=may_draft, num_live=num_live
            )

    def hand_over(self, into: DynamicCache, sequences: Int[Tensor, "batch length"]) -> None:
        """Extend the cache that was passed in to what plain decoding leaves in it."""
        if self.num_unseen:  # their tokens are not needed: the cache has them
            unseen = sequences.new_zeros(len(sequences), self.num_unseen)
            sequences = torch.cat([unseen, sequences], dim=1)
        hand_over(self.target, self.cache, into, sequences)

    @property
    def _pays(self) -> bool:
        """Whether a draft is expected to be worth its time."""
        return self.pace is None or self.pace.wants_draft()

    @property
    def _fed_roots(self) -> Int[Tensor, " batch"]:
        """Tokens to feed next: the roots, and padding behind the end of rows that go on with it."""
        assert self.roots is not None
        return self.roots if self.frontier is None else self.frontier.ids[:, -1]

    def _settle(self, draft: Draft, logits: Float[Tensor, "batch nodes vocab"]) -> Accepted:
        """Accept, take over and commit; return what was taken."""
        with self.stats.phase("accept"):
            if self.frontier is None:
                taken = self.rows.admit(self._accept(draft, logits))
                kept = taken.paths
            else:
                taken, kept = self._advance(self.frontier, draft, logits)
            if self.target.features is not None:
                nodes = draft.topology.num_nodes
                taken = taken.with_features(self.target.features[:, -nodes:])
        with self.stats.phase("commit"):
            if self.rows.any_live or self.keeps_cache:
                self.cache.keep(kept)
            if self.rows.any_live:
                self._commit(taken)
        return taken

    def _advance(
        self, frontier: Frontier, draft: Draft, logits: Float[Tensor, "batch nodes vocab"]
    ) -> tuple[Accepted, list[list[int]]]:
        """Decide position by position for all rows, as far as all of them follow the draft.

        Returns:
            What running rows were given, and the nodes to keep in all rows, ended ones included.
        """
        decided = None if self.rule.is_exact else self._accept(draft, logits).emitted
        batch = torch.arange(len(logits), device=logits.device)
        tokens, parents = draft.tokens.tolist(), draft.topology.host_parents
        nodes = [0] * len(tokens)
        kept: list[list[int]] = [[] for _ in tokens]
        paths: list[list[int]] = [[] for _ in tokens]
        emitted: list[list[int]] = [[] for _ in tokens]
        for depth in range(draft.topology.max_depth + 1):
            was_live = self.rows.is_live
            at_nodes = torch.tensor(nodes, device=logits.device)
            column = frontier.advance(
                logits[batch, at_nodes],
                self.noise,
                depth=depth,
                chosen=None if decided is None else [_at(row, depth) for row in decided],
            )
            for row, (node, token) in enumerate(zip(nodes, column, strict=True)):
                kept[row].append(node)
                if was_live[row]:
                    paths[row].append(node)
                    emitted[row].append(token)
            children = [
                _child(parents[row if len(parents) > 1 else 0], tokens[row], node, token)
                for row, (node, token) in enumerate(zip(nodes, column, strict=True))
            ]
            is_decided = decided is None or all(
                len(row) > depth + 1
                for row, live in zip(decided, self.rows.is_live, strict=True)
                if live
            )
            if None in children or not is_decided or not self.rows.any_live:
                break
            nodes = [child for child in children if child is not None]
        frontier.end_round(len(kept[0]) - 1)
        return Accepted.from_host(paths, emitted, device=logits.device), kept

    def _propose(self) -> Draft:
        assert self.roots is not None
        room = self.rows.most_remaining - 1  # the bonus token needs no draft
        if self.proposer is None or room < 1:
            return _roots_alone(self._fed_roots)
        draft = self.proposer.propose(self.roots, noise=self.noise)
        _require_valid(draft, self.roots)
        if self.rule.draft_sampling is not DraftSampling.NONE:
            _require_laws(draft, self.target.vocab_size)
        if self._crosses_last_position(draft.topology.max_depth):
            return _roots_alone(self._fed_roots)
        tokens = torch.cat([self.roots[:, None], draft.tokens[:, 1:]], dim=1)  # whatever it says
        draft = replace(draft, tokens=tokens)
        if self.frontier is None or all(self.rows.is_live):
            return draft
        return _with_padding(
            draft,
            self.frontier.ids[:, -1],
            self.rows.is_live,
            pad_token_id=self.frontier.pad_token_id,
        )

    def _crosses_last_position(self, depth: int) -> bool:
        """Tell whether a draft of that depth goes beyond the last position, unlike its root.

        Learned positions end there. Plain decoding fails once it arrives, if it ever does; with
        rotary positions it goes on, and so do drafts from there.
        """
        last = (self.target.max_positions or self._max_slots) - 1
        if self._max_slots <= last + 1:
            return False
        first = self.num_unseen + self.num_prompt_tokens - 1
        roots = [first + new for new in self.rows.num_tokens]
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
                lengths=[self.num_prompt_tokens + new for new in self.rows.num_tokens],
            )
        )
        for row, emitted in enumerate(accepted.emitted):
            if self.rows.is_live[row] and any(token < 0 for token in emitted):
                raise nan_logits(self.target.name, logits.dtype)
        return accepted

    def _commit(self, taken: Accepted) -> None:
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


def _roots_alone(roots: Int[Tensor, " batch"]) -> Draft:
    """Return the draft that makes a round a step of plain decoding."""
    return Draft(tokens=roots[:, None], topology=chain(0, device=roots.device), probs=None)


def _with_padding(
    draft: Draft, roots: Int[Tensor, " batch"], is_live: list[bool], *, pad_token_id: int
) -> Draft:
    """Let ended rows go on with padding as deep as the others may go.

    Args:
        draft: What was drafted; what it holds in ended rows is dropped.
        roots: Last token of each row; a row that has just ended begins with its last own one.
        is_live: Rows that have not ended.
        pad_token_id: The padding token.
    """
    topology, tokens = draft.topology, draft.tokens.clone()
    parents, depth = topology.host_parents, topology.max_depth
    if len(parents) == 1:  # one tree for all: padding along its longest path, nowhere else
        node = topology.host_node_depths[0].index(depth)
        path = [node]
        while node:
            node = parents[0][node]
            path.append(node)
        padding = torch.full_like(tokens[0], int(pad_token_id == 0))  # any token but that
        padding[path] = pad_token_id
    else:
        padding = torch.full_like(tokens[0], pad_token_id)
        line = [0, *range(depth)]
        rows = [own if live else line for own, live in zip(parents, is_live, strict=True)]
        topology = from_parents(rows, device=tokens.device)
    ended = [row for row, live in enumerate(is_live) if not live]
    tokens[ended] = padding
    tokens[:, 0] = roots
    return replace(draft, tokens=tokens, topology=topology)


def _child(parents: list[int], tokens: list[int], node: int, token: int) -> int | None:
    """Return the first child of a node with the given token."""
    return next(
        (
            child
            for child in range(node + 1, len(parents))
            if parents[child] == node and tokens[child] == token
        ),
        None,
    )


def _at(row: list[int], depth: int) -> int:
    """Return a row's token at a depth; any number behind the end of a row that is not running."""
    return row[depth] if depth < len(row) else 0


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
