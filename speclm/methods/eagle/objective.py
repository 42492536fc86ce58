"""The module that is trained: EAGLE heads on top of a frozen base."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from speclm.config import require_count, require_in_range
from speclm.errors import OptionError
from speclm.methods.eagle.loss import (
    Sources,
    distribution_loss,
    feature_loss,
    find_sources,
    rank_targets,
)
from speclm.methods.eagle.network import EagleHeads
from speclm.methods.medusa.loss import weighted_loss
from speclm.target import TargetFeatures, TargetView
from speclm.target.features import FeatureTap

MAX_STEPS = 32
MAX_LOGITS = 2**27
"""Logits that are kept for the backward pass, half a gigabyte; beyond, they are recomputed."""

_NOISE_LENGTH = 512  # of a text whose features get noise of the width given


@dataclass(frozen=True, slots=True)
class EagleObjective:
    """What the heads are trained for.

    Args:
        num_steps: Guesses in a row that are trained from every slot.
        num_measured: Guesses in a row that are ranked, of which those that are not trained are
            run without gradients.
        decay: Weight of a step's loss relative to that of the step before it.
        distribution_weight: Weight of the cross-entropy against the target's distribution.
        feature_weight: Weight of the distance to the target's next features, of EAGLE-1 alone.
        noise: Width of the uniform noise on the features of a text of 512 tokens; shorter ones get
            as much more.
    """

    num_steps: int = 7
    num_measured: int = 7
    decay: float = 0.8
    distribution_weight: float = 1.0
    feature_weight: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        require_count("num_steps", self.num_steps, low=1, high=MAX_STEPS)
        require_count("num_measured", self.num_measured, low=self.num_steps, high=MAX_STEPS)
        require_in_range("decay", self.decay, low=0.0, high=1.0)
        for name in ("distribution_weight", "feature_weight", "noise"):
            require_in_range(name, getattr(self, name), low=0.0, high=1e6)

    @classmethod
    def usual(cls, kind: str) -> Self:
        """Return what the authors of EAGLE-1 (``"eagle"``) or EAGLE-3 (``"eagle3"``) train for.

        Source: Li et al. 2024 (EAGLE), Li et al. 2025 (EAGLE-3) and their code.
        """
        if kind == "eagle3":
            return cls()
        return cls(
            num_steps=1, num_measured=5, distribution_weight=0.1, feature_weight=1.0, noise=0.2
        )


class EagleTrainingModel(nn.Module):
    """Computes the loss of EAGLE heads from one forward of the base.

    The base is frozen, put into eval mode and kept outside the module tree: parameters and state
    are those of the heads alone, and wrappers for several devices leave the base where it is.
    Embeddings of the heads' own stay as they are.
    """

    def __init__(
        self, base: PreTrainedModel, heads: EagleHeads, *, objective: EagleObjective
    ) -> None:
        """Put heads on a base.

        Args:
            base: A causal language model; its parameters stop requiring gradients.
            heads: Heads of the base's width and vocabulary.
            objective: What they are trained for.

        Raises:
            UnsupportedModelError: If `base` is not a decoder-only language model.
            OptionError: If it has too few layers for the features that the heads read, or heads of
                EAGLE-3 are to learn its next features.
        """
        super().__init__()
        is_eagle3 = heads.config.kind == "eagle3"
        if is_eagle3 and objective.feature_weight:
            raise OptionError(
                f"feature_weight is {objective.feature_weight!r}, expected 0 with heads of eagle3: "
                "their states do not stand for the target's last ones; leave it out"
            )
        self.view = TargetView(base)
        base.requires_grad_(requires_grad=False)
        base.train(mode=False)
        if heads.embed_tokens is not None:
            heads.embed_tokens.requires_grad_(requires_grad=False)
        self.heads = heads
        self.objective = objective
        self._layers = heads.config.layers_to_read(self.view.num_layers) if is_eagle3 else (-1,)

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"],
        loss_mask: Bool[Tensor, "batch seq"],
    ) -> dict[str, Tensor]:
        """Return the loss of a batch and what its figures are made of.

        Args:
            input_ids: Rows, padded on the right.
            attention_mask: 1 at tokens, 0 at padding.
            loss_mask: True at tokens that the heads are to guess.

        Returns:
            ``loss``; of each step ``loss_sums`` and ``counts``, of the slots that are trained on;
            and ``ranks`` ``[batch, seq, steps]`` that step k gave, from the slot at position t, to
            token ``t + 2 + k`` where all tokens between were guessed right: -1 where that token
            does not count.
        """
        objective, device = self.objective, self.heads.fc.weight.device
        features, last = self.read_base(input_ids, attention_mask)
        tokens, loss_mask = input_ids.to(device), loss_mask.to(device)
        sources = find_sources(tokens, loss_mask, num_steps=objective.num_measured)
        distributions = self._distributions(last, sources)
        outputs = roll_out(
            self.heads,
            self._with_noise(features),
            tokens,
            sources.indices,
            num_steps=objective.num_measured,
            embedding=self._embed,
        )
        sums, counts = [], []
        # Sources that pad a row stand at slot 0 with rank -1, beneath that of any real one.
        ranks = torch.full(
            (*tokens.shape, objective.num_measured), -1, device=device, dtype=torch.long
        )
        for step in range(objective.num_measured):
            is_trained = step < objective.num_steps
            with torch.set_grad_enabled(torch.is_grad_enabled() and is_trained):
                scored = self._score(next(outputs), distributions, sources, step)
            ranks[:, :, step].scatter_reduce_(1, sources.indices, scored.ranks, reduce="amax")
            if is_trained:
                sums.append(scored.loss_sum)
                counts.append(scored.count)
        loss_sums, counted = torch.stack(sums), torch.stack(counts)
        return {
            "loss": weighted_loss(loss_sums, counted, decay=objective.decay),
            "loss_sums": loss_sums.detach(),
            "counts": counted,
            "ranks": ranks,
        }

    @torch.no_grad()
    def read_base(
        self, input_ids: Int[Tensor, "batch seq"], attention_mask: Int[Tensor, "batch seq"]
    ) -> tuple[Float[Tensor, "batch seq features"], Float[Tensor, "batch seq hidden"]]:
        """Return the features that the heads read and what the base's output matrix reads."""
        device = self.view.device
        taken: list[Tensor] = []
        wanted = self._layers if self._layers == (-1,) else (*self._layers, -1)
        tap = FeatureTap(TargetFeatures(wanted), is_own=lambda: True, take=taken.append)
        with tap.on(self.view.decoder, self.view.num_layers):
            self.view.decoder(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                use_cache=False,
            )
        (states,) = taken
        last = states[..., -self.heads.config.target_hidden_size :]
        features = last if wanted == (-1,) else states[..., : -last.shape[-1]]
        return features.to(self.heads.fc.weight.device), last

    def _with_noise(
        self, features: Float[Tensor, "batch seq features"]
    ) -> Float[Tensor, "batch seq features"]:
        if not self.training or not self.objective.noise:
            return features
        width = self.objective.noise * _NOISE_LENGTH / features.shape[1]
        return features + (torch.rand_like(features) - 0.5) * width

    def _embed(self, tokens: Tensor) -> Tensor:
        stored = self.view.stored_embeddings(tokens.to(self.view.device))
        return stored.to(tokens.device)

    def _lm_head(self, states: Tensor) -> Tensor:
        # Heads are trained in float32 above a base that may be narrower, or on another device.
        view = self.view
        return view.head_logits(states.to(view.model.dtype).to(view.device)).to(states.device)

    @torch.no_grad()
    def _distributions(
        self, last: Float[Tensor, "batch seq hidden"], sources: Sources
    ) -> "_Distributions":
        """Return what the target says at the positions that are guessed."""
        ahead = 1 + torch.arange(sources.targets.shape[2], device=sources.indices.device)
        batch, length = last.shape[:2]
        places = (sources.indices[:, :, None] + ahead).clamp(max=length - 1)
        rows = torch.arange(batch, device=places.device)[:, None, None]
        needed, where = torch.unique(places + rows * length, return_inverse=True)
        hidden = last.flatten(0, 1)[needed.to(last.device)]
        logits = self.view.head_logits(hidden).float().to(where.device)
        columns = self.heads.draft_columns
        if columns is None:
            return _Distributions(logits.softmax(-1), logits.new_ones(len(logits)), hidden, where)
        can_guess = torch.isin(logits.argmax(-1), columns).float()
        return _Distributions(logits[:, columns].softmax(-1), can_guess, hidden, where)

    def _score(
        self,
        hidden: Float[Tensor, "batch sources hidden"],
        distributions: "_Distributions",
        sources: Sources,
        step: int,
    ) -> "_Scored":
        """Return the loss of a step and the ranks of its guesses, in chunks if memory asks."""
        targets = sources.targets[:, :, step]
        is_target = targets >= 0
        rows, wanted, where = (
            hidden[is_target],
            targets[is_target],
            distributions.where[:, :, step][is_target],
        )
        size = max(1, MAX_LOGITS // (self.heads.config.draft_vocab_size * self.objective.num_steps))
        if len(rows) <= size:
            loss_sum, found = self._score_rows(rows, wanted, where, distributions)
        else:
            parts = [
                checkpoint(self._score_rows, *part, distributions, use_reentrant=False)
                for part in zip(
                    *(torch.split(given, size) for given in (rows, wanted, where)), strict=True
                )
            ]
            loss_sum, found = (
                torch.stack([part[0] for part in parts]).sum(),
                torch.cat([part[1] for part in parts]),
            )
        ranks = torch.full_like(targets, -1)
        ranks[is_target] = found
        return _Scored(loss_sum, distributions.can_guess[where].sum().long(), ranks)

    def _score_rows(
        self,
        hidden: Float[Tensor, "rows hidden"],
        targets: Int[Tensor, " rows"],
        where: Int[Tensor, " rows"],
        distributions: "_Distributions",
    ) -> tuple[Float[Tensor, ""], Int[Tensor, " rows"]]:
        objective = self.objective
        logits = self.heads.logits(hidden, lm_head=self._lm_head)
        losses = objective.distribution_weight * distribution_loss(
            logits, distributions.probs[where]
        )
        if objective.feature_weight:
            wanted = distributions.hidden[where.to(distributions.hidden.device)].to(hidden.device)
            losses = losses + objective.feature_weight * feature_loss(hidden, wanted)
        ranks = rank_targets(logits, targets, self.heads.draft_columns)
        return (losses * distributions.can_guess[where]).sum(), ranks


@dataclass(frozen=True, slots=True, eq=False)
class _Distributions:
    """What the target says at the positions that are guessed.

    Args:
        probs: Its distribution over the draft vocabulary.
        can_guess: 1 where its likeliest token is in that vocabulary, else 0.
        hidden: Its last hidden states.
        where: Which of these each source's steps are about, ``[batch, sources, steps]``.
    """

    probs: Float[Tensor, "places draft_vocab"]
    can_guess: Float[Tensor, " places"]
    hidden: Float[Tensor, "places hidden"]
    where: Int[Tensor, "batch sources steps"]


@dataclass(frozen=True, slots=True, eq=False)
class _Scored:
    """One step: sum of the losses, how many there are, and the ranks of the targets."""

    loss_sum: Float[Tensor, ""]
    count: Int[Tensor, ""]
    ranks: Int[Tensor, "batch sources"]


def roll_out(
    heads: EagleHeads,
    features: Float[Tensor, "batch seq features"],
    tokens: Int[Tensor, "batch seq"],
    sources: Int[Tensor, "batch sources"],
    *,
    num_steps: int,
    embedding: Callable[[Tensor], Tensor],
) -> Iterator[Float[Tensor, "batch sources hidden"]]:
    """Yield the outputs of one step after another, with gradients.

    Args:
        heads: The heads.
        features: The target's features of each token.
        tokens: Rows, padded on the right, of at least two tokens.
        sources: Slots whose outputs are wanted: slot t joins the features at t with token t + 1.
        num_steps: Steps; the last ones of slots near the end of a row read tokens that are not
            there, and mean nothing.
        embedding: Looks up rows of the target's embedding matrix, as they are stored.
    """
    batch, num_slots = tokens.shape[0], tokens.shape[1] - 1
    store = _Slots()
    slots = torch.arange(num_slots, device=tokens.device)
    hidden = heads(
        heads.fuse(features[:, :-1]),
        heads.embed(tokens[:, 1:], embedding=embedding),
        position_ids=slots.expand(batch, -1),
        past_key_values=store,
    )
    hidden = hidden.gather(1, sources[:, :, None].expand(-1, -1, hidden.shape[2]))
    yield hidden
    for step in range(1, num_steps):
        read = tokens.gather(1, (sources + 1 + step).clamp(max=num_slots))
        hidden = heads(
            hidden,
            heads.embed(read, embedding=embedding),
            position_ids=sources + step,
            attention_mask=_visible(sources, num_slots, step, heads.config.sliding_window),
            past_key_values=store,
        )
        yield hidden


class _Slots:
    """Keys and values of all steps so far, with their gradients."""

    def __init__(self) -> None:
        self._layers: dict[int, tuple[list[Tensor], list[Tensor]]] = {}

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, /) -> tuple[Tensor, Tensor]:
        """Add those of a step, and return all."""
        parts = self._layers.setdefault(layer_idx, ([], []))
        for part, new in zip(parts, (keys, values), strict=True):
            part.append(new)
        return torch.cat(parts[0], dim=2), torch.cat(parts[1], dim=2)


def _visible(
    sources: Int[Tensor, "batch sources"], num_slots: int, step: int, window: int | None
) -> Bool[Tensor, "batch 1 sources slots"]:
    """Return what each source sees at a step: slots of step 0, then its own of each step since."""
    slots = torch.arange(num_slots, device=sources.device)
    behind = sources[:, :, None] - slots  # [batch, sources, slots], at step 0
    seen = behind >= 0
    if window is not None:
        seen &= behind + step < window
    itself = torch.eye(sources.shape[1], dtype=torch.bool, device=sources.device)
    since = [
        itself if window is None or step - earlier < window else torch.zeros_like(itself)
        for earlier in range(1, step + 1)
    ]
    return torch.cat([seen, torch.cat(since, dim=1).expand(len(sources), -1, -1)], dim=2)[:, None]
