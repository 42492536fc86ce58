"""Training objective of EAGLE heads: the base's distribution and, in EAGLE-1, its features."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from speclm.config import require_count, require_in_range
from speclm.drafting.heads_folder import hub_id
from speclm.errors import OptionError
from speclm.methods.eagle.checkpoint import eagle_checkpoint, write_eagle
from speclm.methods.eagle.method import MAX_STEPS
from speclm.methods.eagle.network import EagleHeads
from speclm.methods.eagle.proposer import EagleProposer
from speclm.methods.eagle.rollout import roll_out
from speclm.training.acceptance_meter import AcceptanceMeter
from speclm.training.targets import Sources, count_shifted, find_sources
from speclm.training.training_model import (
    BaseGoals,
    TrainingModel,
    rank_columns,
    score_in_chunks,
    soft_cross_entropy,
    weighted_loss,
)

_NOISE_LENGTH = 512  # length of a text whose features get noise of the given width


@dataclass(frozen=True, slots=True)
class EagleObjective:
    """Settings of the loss.

    Args:
        num_steps: Draft tokens in a row that are trained from every position.
        num_measured: Draft tokens in a row that are ranked; steps beyond `num_steps` run without
            gradients.
        decay: Weight of a step's loss relative to that of the step before it.
        distribution_weight: Weight of the cross-entropy against the base's distribution.
        feature_weight: Weight of the distance to the base's next features; only for EAGLE-1.
        noise: Width of the uniform noise on the features of a text of 512 tokens; it grows in
            inverse proportion to the length.
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
        """Return the objective of the authors of EAGLE-1 (``"eagle"``) or EAGLE-3 (``"eagle3"``).

        Source: Li et al. 2024 (EAGLE), Li et al. 2025 (EAGLE-3) and their code.
        """
        if kind == "eagle3":
            return cls()
        return cls(
            num_steps=1, num_measured=5, distribution_weight=0.1, feature_weight=1.0, noise=0.2
        )


class EagleTrainingModel(TrainingModel):
    """Computes the loss of EAGLE heads from one forward of the base.

    An embedding matrix of the heads themselves is not trained.
    """

    heads: EagleHeads

    def __init__(
        self, base: PreTrainedModel, heads: EagleHeads, *, objective: EagleObjective | None = None
    ) -> None:
        """Put heads on a base, and freeze the base.

        Args:
            base: The target.
            heads: Heads to train, see `new_eagle_heads` and `load_eagle_heads`.
            objective: Settings of the loss; None for the usual ones of their kind.

        Raises:
            UnsupportedModelError: If `base` is not a decoder-only language model.
            VocabularyMismatchError: If the heads were made for another vocabulary.
            OptionError: If the heads have another width than the base, the base has too few layers
                for their features, or EAGLE-3 heads are to learn the base's next features.
        """
        is_eagle3 = heads.config.kind == "eagle3"
        objective = objective or EagleObjective.usual(heads.config.kind)
        if is_eagle3 and objective.feature_weight:
            raise OptionError(
                f"feature_weight is {objective.feature_weight!r}, expected 0 with heads of eagle3: "
                "their states do not stand for the target's last ones; leave it out"
            )
        EagleProposer(heads, target=base)  # checks that they fit
        super().__init__(base, heads.train())
        if heads.embed_tokens is not None:
            heads.embed_tokens.requires_grad_(requires_grad=False)
        self.objective = objective
        self._layers = heads.config.layers_to_read(self.view.num_layers) if is_eagle3 else (-1,)

    @property
    @override
    def layers_read(self) -> tuple[int, ...]:
        return self._layers if self._layers == (-1,) else (*self._layers, -1)

    @property
    @override
    def max_length(self) -> int | None:
        bounds = (self.view.max_positions, self.heads.config.max_position_embeddings)
        return min(bound for bound in bounds if bound is not None)

    @override
    def count_targets(self, loss_mask: Bool[Tensor, "batch seq"]) -> Float[Tensor, " steps"]:
        return count_shifted(loss_mask, num_drafted=self.objective.num_steps)

    @override
    def new_meter(self) -> AcceptanceMeter:
        num_drafted = self.objective.num_measured
        chain = tuple((0,) * depth for depth in range(1, num_drafted + 1))
        return AcceptanceMeter(chain, num_drafted=num_drafted, name="step")

    @override
    def write(self, folder: Path) -> None:
        base_id = hub_id(self.view.model.config.name_or_path)  # paths are not written
        checkpoint = eagle_checkpoint(self.heads, base_name_or_path=base_id)
        write_eagle(folder, checkpoint, num_target_layers=self.view.num_layers)

    @override
    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"],
        loss_mask: Bool[Tensor, "batch seq"],
        shares: Float[Tensor, " parts"] | None = None,
    ) -> dict[str, Tensor]:
        objective, device = self.objective, self.heads.fc.weight.device
        features, last = self.read_base(input_ids, attention_mask, self._layers)
        tokens, loss_mask = input_ids.to(device), loss_mask.to(device)
        sources = find_sources(tokens, loss_mask, num_steps=objective.num_measured)
        ahead = 1 + torch.arange(objective.num_measured, device=device)
        logits, goals = self.base_goals(
            last, sources.indices[:, :, None] + ahead, loss_mask, columns=self.heads.draft_columns
        )
        probs = logits.softmax(-1)
        del logits  # as large
        outputs = roll_out(
            self.heads,
            self._with_noise(features.to(device)),
            tokens,
            sources.indices,
            num_steps=objective.num_measured,
            embedding=self._embed,
        )
        sums, counts = [], []
        # Padding sources are at position 0 and have rank -1, below any real rank.
        ranks = torch.full(
            (*tokens.shape, objective.num_measured), -1, device=device, dtype=torch.long
        )
        for step in range(objective.num_measured):
            is_trained = step < objective.num_steps
            with torch.set_grad_enabled(torch.is_grad_enabled() and is_trained):
                loss_sum, count, found = self._score_step(
                    next(outputs), goals, probs, sources, step
                )
            ranks[:, :, step].scatter_reduce_(1, sources.indices, found, reduce="amax")
            if is_trained:
                sums.append(loss_sum)
                counts.append(count)
        loss_sums, counted = torch.stack(sums), torch.stack(counts)
        return {
            "loss": weighted_loss(loss_sums, counted, decay=objective.decay, shares=shares),
            "loss_sums": loss_sums.detach(),
            "counts": counted,
            "ranks": ranks,
            "base_tokens": goals.base_tokens,
        }

    def _with_noise(
        self, features: Float[Tensor, "batch seq features"]
    ) -> Float[Tensor, "batch seq features"]:
        if not self.training or not self.objective.noise:
            return features
        width = self.objective.noise * _NOISE_LENGTH / features.shape[1]
        return features + (torch.rand_like(features) - 0.5) * width

    def _embed(self, tokens: Tensor) -> Tensor:
        return self.view.stored_embeddings(tokens.to(self.view.device)).to(tokens.device)

    def _score_step(
        self,
        hidden: Float[Tensor, "batch sources hidden"],
        goals: BaseGoals,
        probs: Float[Tensor, "positions draft_vocab"],
        sources: Sources,
        step: int,
    ) -> tuple[Float[Tensor, ""], Int[Tensor, ""], Int[Tensor, "batch sources"]]:
        """Return the sum of a step's losses, their number, and the ranks of the base's tokens."""
        is_target = sources.targets[:, :, step] >= 0
        indices = goals.indices[:, :, step][is_target]
        config = self.heads.config
        width = config.draft_vocab_size if config.has_own_lm_head else config.vocab_size
        loss_sum, found = score_in_chunks(
            partial(self._score, goals, probs),
            hidden[is_target],
            indices,
            logits_per_row=width * self.objective.num_steps,
        )
        ranks = torch.full_like(sources.indices, -1)
        ranks[is_target] = found
        return loss_sum, goals.is_draftable[indices].sum().long(), ranks

    def _score(
        self,
        goals: BaseGoals,
        probs: Float[Tensor, "positions draft_vocab"],
        hidden: Float[Tensor, "rows hidden"],
        indices: Int[Tensor, " rows"],
    ) -> tuple[Float[Tensor, ""], Int[Tensor, " rows"]]:
        objective = self.objective
        logits = self.heads.logits(hidden, lm_head=self.heads.among_drafted(self.lm_head))
        losses = objective.distribution_weight * soft_cross_entropy(logits, probs[indices])
        if objective.feature_weight:
            wanted = goals.hidden[indices.to(goals.hidden.device)].to(hidden.device)
            losses = losses + objective.feature_weight * feature_loss(hidden, wanted)
        ranks = rank_columns(logits, goals.chosen[indices], self.heads.draft_columns)
        return (losses * goals.is_draftable[indices]).sum(), ranks


def feature_loss(
    hidden: Float[Tensor, "*rows hidden"], wanted: Float[Tensor, "*rows hidden"]
) -> Float[Tensor, "*rows"]:
    """Return the mean smooth L1 distance of each row.

    Source: Li et al. 2024 (EAGLE), feature regression.
    """
    return F.smooth_l1_loss(hidden.float(), wanted.float(), reduction="none").mean(-1)
