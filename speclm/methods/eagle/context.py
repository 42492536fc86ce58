"""The outputs of EAGLE heads at committed positions, from which drafts start."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from speclm.acceptance import Accepted
from speclm.attention import TreeStep
from speclm.cache.tree_cache import TreeCache
from speclm.devices import is_host, upload
from speclm.drafting.committed import Committed, CommittedRounds
from speclm.drafting.decoder_parts import CausalMasks
from speclm.drafting.interface import Prefill
from speclm.engines import Engine
from speclm.engines.engine import Outputs
from speclm.methods.eagle.network import EagleHeads, LevelRun
from speclm.methods.eagle.stages import (
    EagleStages,
    ReadStage,
    StagedRun,
    laid_out,
    padded,
    weights_of,
)
from speclm.target import TargetView, product_weight

COUNTS = (2, 4, 8, 16)
"""Numbers of new positions that a stage is prepared for; more are read eagerly."""


class EagleContext:
    """Keeps the heads' keys, values and last outputs at the committed tokens.

    Positions computed from draft tokens are dropped in every round.
    """

    def __init__(self, heads: EagleHeads, view: TargetView) -> None:
        """Create a context for any number of generations."""
        self._heads, self._view = heads, view
        self._causal = CausalMasks()
        self._prompt: Prefill | None = None  # until it is read
        self._rounds = CommittedRounds()  # since the last draft
        self._kept: EagleStages | None = None  # for the next call with its engine
        self._stages: EagleStages | None = None
        self._at_roots: Outputs = ()  # what a stage has computed of their children
        self.cache: TreeCache | None = None
        self.hidden: Float[Tensor, "batch hidden"] | None = None
        """Outputs at the position before each root."""

    def begin(self, prompt: Prefill) -> None:
        """Start a generation; its prompt is read by the first draft."""
        self._prompt, self.cache, self.hidden = prompt, None, None
        self._rounds, self._at_roots = CommittedRounds(), ()
        self._stages = self._staged(prompt.engine)

    def commit(self, accepted: Accepted) -> None:
        """Drop the nodes of the draft, and keep what was committed for the next one."""
        if self.cache is not None:
            self.cache.keep([[] for _ in accepted.emitted])
        self._rounds.add(accepted)

    def catch_up(self, *, num_ranks: int | None = None) -> None:
        """Run the heads over the features of what was committed since the last draft.

        Args:
            num_ranks: See `start`.
        """
        if self.cache is None:
            assert self._prompt is not None, "propose before begin"
            self.cache, self._prompt = self._read_prompt(self._prompt), None
        new = self._rounds.take()
        if new is None:
            return
        if not self._read_by_engine(new, num_ranks):
            self.hidden = self._read(new)
        self.cache.keep([range(count) for count in new.counts])

    def start(
        self, widths: list[int], *, width: int = 0, num_ranks: int | None = None
    ) -> LevelRun | StagedRun:
        """Return a run of the heads from the roots.

        Args:
            widths: Maximum nodes of each level.
            width: Maximum nodes of any level, if they may be padded to it; 0 if not.
            num_ranks: Children that are ranked by the heads' probabilities; None if more decides.
        """
        cache, hidden = self.cache, self.hidden
        assert cache is not None
        assert hidden is not None
        maps = self._embedding(), self._lm_head()

        def eager() -> LevelRun:
            return LevelRun(
                self._heads, cache, hidden=hidden, widths=widths, maps=maps, causal=self._causal
            )

        stages = self._stages
        if stages is None or stages.obstacle is not None or not (widths and width):
            return eager()
        return StagedRun(
            stages,
            cache,
            roots=(hidden, *self._at_roots),
            shape=(len(widths), width),
            num_ranks=num_ranks,
            eager=eager,
        )

    def _staged(self, engine: Engine | None) -> EagleStages | None:
        """Return the stages of an engine, new ones for other weights; None to run eagerly."""
        # On a CPU, a call of compiled code takes longer than the calls of such small heads.
        if engine is None or is_host(self._heads.fc.weight.device):
            return None
        before = self._kept
        if before is not None:
            if before.engine is engine and before.state == weights_of(self._heads, self._view):
                return before
            before.close()
        self._kept = EagleStages(self._heads, self._view, engine)
        return self._kept

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_stages": None, "_kept": None}  # of another object

    def _read_by_engine(self, committed: Committed, num_ranks: int | None) -> bool:
        """Run the heads over new positions by a stage; return whether it could."""
        self._at_roots = ()
        tokens, features, counts = committed.tokens, committed.features, committed.counts
        stages, cache, hidden = self._stages, self.cache, self.hidden
        bucket = next((size for size in COUNTS if size >= tokens.shape[1]), None)
        if stages is None or stages.obstacle is not None or bucket is None:
            return False
        if cache is None or cache.capacity == 0 or hidden is None:
            return False
        cache.reserve(bucket)
        new = padded(tokens, bucket), padded(features, bucket), upload(counts, tokens.device)
        inputs = [*new, laid_out(hidden), cache.lengths, cache.num_padding]
        stage, parts = stages.pair(num_ranks)[0], cache.parts()
        if ReadStage in stages.unproven:
            found = stages.tried(stage, inputs, parts)
            self.hidden = self._read(committed)  # overwrites what was written
            if found is not None:
                stages.compare(stage, found[0], self.hidden)
            return True
        found = stages.run(stage, inputs, parts)
        if found is None:
            return False
        self.hidden, self._at_roots = found[0], found[1:]
        cache.append(tokens.shape[1])
        return True

    def _read(self, new: Committed) -> Float[Tensor, "batch hidden"]:
        """Run the heads over new positions; return the last output of each row."""
        assert self.cache is not None
        if len(new.counts) == 1 and not self.cache.has_padding:
            return self._read_row(new.tokens[0], new.features[0])
        num_new = new.tokens.shape[1]
        visible = torch.ones(1, num_new, num_new, dtype=torch.bool, device=new.tokens.device)
        return new.newest(
            self._run(new.tokens, new.features, visible.tril_(), self.cache), self.hidden
        )

    def _embedding(self) -> Callable[[Tensor], Tensor]:
        """Return the look-up in the target's embeddings, without finding them every time."""
        if self._heads.embed_tokens is not None:
            return self._view.stored_embeddings
        weight = self._view.embedding_weight
        return lambda tokens: F.embedding(tokens, weight)

    def _lm_head(self) -> Callable[[Tensor], Tensor]:
        """Return the target's map to logits, without asking every time what it does."""
        own = self._heads.lm_head is not None
        weight = None if own else product_weight(self._view.model)
        if weight is None:
            return self._heads.among_drafted(self._view.head_logits)
        transposed = self._heads.drafted_rows(weight).t()
        return lambda hidden: hidden.to(transposed.dtype) @ transposed

    def _read_prompt(self, prompt: Prefill) -> TreeCache:
        """Run the heads over the prompt's features, each joined with the token after it."""
        features = prompt.features
        assert features is not None
        following = torch.cat([prompt.tokens[:, 1:], prompt.first_tokens[:, None]], dim=1)
        length = features.shape[1]  # only the last positions if a cache held the first ones
        padding = (prompt.num_padding - (prompt.tokens.shape[1] - length)).clamp(min=0)
        stages = self._stages
        cache = TreeCache(
            num_layers=self._heads.config.num_layers,
            num_padding=padding,
            allocate=None if stages is None or stages.obstacle is not None else stages.allocate,
        )
        if length > 0:
            indices = torch.arange(length, device=padding.device)
            visible = (indices[:, None] >= indices) & (indices >= padding[:, None])[:, None]
            visible |= torch.eye(length, dtype=torch.bool, device=padding.device)
            hidden = self._run(following[:, -length:], features, visible, cache)
            cache.keep([list(range(length))] * len(padding))
            self.hidden = hidden[:, -1]
        return cache

    def _read_row(
        self, tokens: Int[Tensor, " new"], features: Float[Tensor, "new features"]
    ) -> Float[Tensor, "1 hidden"]:
        """Run the heads over new positions of the only row; return the last output."""
        heads, cache, num_new, mask = self._heads, self.cache, len(features), None
        assert cache is not None
        start = cache.tree_start
        if heads.config.sliding_window is None and num_new > 1:
            mask = self._causal.cut(num_new, num_cached=start, like=heads.fc.weight)
        cache.reserve(num_new)
        hidden: Tensor = heads(
            heads.fuse(features),
            heads.embed(tokens, embedding=self._view.stored_embeddings),
            rotation=heads.rotation_from(start, num_new),
            attention_mask=mask,
            past_key_values=cache,
            batch=1,
        )
        cache.append(num_new)
        return hidden[-1:]

    def _run(
        self,
        tokens: Int[Tensor, "batch nodes"],
        features: Float[Tensor, "batch nodes features"],
        visible: Bool[Tensor, "rows nodes nodes"],
        cache: TreeCache,
    ) -> Float[Tensor, "batch nodes hidden"]:
        """Run the heads over consecutive positions of all rows, which become pending."""
        heads, num_nodes = self._heads, tokens.shape[1]
        cache.reserve(num_nodes)
        depths = torch.arange(num_nodes, device=tokens.device)[None]
        first = cache.lengths - cache.num_padding
        step = TreeStep(visible, depths, cache)
        output: Tensor = heads(
            heads.fuse(features),
            heads.embed(tokens, embedding=self._view.stored_embeddings),
            position_ids=(first[:, None] + depths).clamp(min=0),
            attention_mask=step.bias(heads.config.sliding_window, heads.dtype),
            past_key_values=cache,
        )
        cache.append(num_nodes)
        return output
